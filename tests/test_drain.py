"""Does a process end its batchers in time, in the order that they need?"""

from __future__ import annotations

from typing import Any

from tests.children import once, run

pytestmark = once


def calls_that_would_linger() -> Any:
    """Drain a batcher whose calls wait for others, and one that is idle."""
    from ubatch import Stopped, UBatch
    from ubatch.drain import drain

    def make(name: str) -> UBatch[int, int]:
        return UBatch(9, 3600, handler=lambda n: n, linger="full", name=name).start()

    lingers, idle, unused = make("lingers"), make("idle"), make("unused")
    called = idle.map(range(9))
    waiting = [lingers.submit(number) for number in (1, 2)]
    drain(lambda: 30)
    refused = []
    for each in (lingers, idle, unused):
        try:
            each.submit(3)
        except Stopped:
            refused.append(each.name)
    return called, [future.result(0) for future in waiting], refused


def test_calls_that_wait_for_others_go_at_once() -> None:
    """However long they would have lingered; and whoever comes later is refused."""
    called, answers, refused = run(calls_that_would_linger)
    assert list(range(9)) == called
    assert [1, 2] == answers
    assert ["lingers", "idle", "unused"] == refused


def a_hub_that_stands_still() -> Any:
    """Drain a batcher of another thread's hub, which its inline handler blocks."""
    import logging
    import time
    from threading import Thread

    import gevent

    from ubatch import UBatch
    from ubatch.backends.native import allocate_lock
    from ubatch.drain import drain

    logging.getLogger("ubatch").addHandler(logging.NullHandler())
    entered, gate = allocate_lock(), allocate_lock()
    entered.acquire()
    gate.acquire()

    def handler(items: list[int]) -> list[int]:
        entered.release()
        gate.acquire()
        return items

    ub = UBatch(1, 0.0, handler=handler, backend="gevent", executor="inline")
    ends: list[Any] = []

    def serve() -> None:
        call = gevent.spawn(ub.start().ubatch, 1)
        call.join()
        ends.append(call.value)

    thread = Thread(target=serve)
    thread.start()
    entered.acquire()
    until = time.monotonic() + 0.3
    drain(lambda: until - time.monotonic())
    ended_meanwhile = list(ends)
    gate.release()
    thread.join()
    return ended_meanwhile


def test_a_hub_that_stands_still_holds_nobody_up() -> None:
    """What cannot be reached is given up when the time is up."""
    assert [] == run(a_hub_that_stands_still)


def interrupted() -> Any:
    """Interrupt a drain as a signal does, while a handler runs."""
    import logging

    from ubatch import Stopped, UBatch
    from ubatch.backends.native import allocate_lock
    from ubatch.drain import drain

    logging.getLogger("ubatch").addHandler(logging.NullHandler())
    gate = allocate_lock()
    gate.acquire()

    def handler(items: list[int]) -> list[int]:
        gate.acquire()
        return items

    def left() -> float:
        if ub.stats().running:
            raise SystemExit(0)
        return 30

    ub = UBatch(1, 0.0, handler=handler).start()
    future = ub.submit(1)
    try:
        drain(left)
    except SystemExit:
        error = future.exception(0)
        gate.release()
        return isinstance(error, Stopped)


def test_a_drain_that_is_interrupted_ends_its_calls() -> None:
    """A second signal cuts it short; whoever waits is told."""
    assert run(interrupted)
