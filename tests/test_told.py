"""Is everybody told once, and nobody who waits for something else by now?"""

from __future__ import annotations

import gc
import sys
import time
import weakref
from typing import Any

import gevent
import pytest
from gevent import socket
from greenlet import greenlet

from tests.fakes import Caller, Gate, HubGate, Recorder, World
from ubatch import BackendError, DeadlineExceeded, UBatch
from ubatch.backends.gevent import GeventBackend


def doubled(items: list[int]) -> list[int]:
    return [2 * item for item in items]


def full(size: int, **options: Any) -> UBatch[int, int]:
    """Return a batcher that waits for so many calls."""
    options.setdefault("handler", doubled)
    return UBatch(size, 60.0, backend="gevent", linger="full", **options).start()


def held(hub: World) -> tuple[UBatch[int, int], Caller, Gate | HubGate]:
    """Return a batcher whose worker is held at a gate, with who holds it."""
    gate = hub.gate()

    def handler(items: list[int]) -> list[int]:
        gate.wait()
        return doubled(items)

    ub = UBatch(99, 0.0, handler=handler, backend="gevent").start()
    first = hub.spawn(ub.ubatch, 0)
    hub.until(lambda: ub.stats().running)
    return ub, first, gate


def test_who_leaves_an_expired_call_and_calls_again_is_told(hub: World) -> None:
    """A retry may join the batch that it left, between its end and hearing of it."""

    def client() -> int:
        with gevent.Timeout(0.05, False):  # due in the same turn of the loop
            with pytest.raises(DeadlineExceeded):
                ub.with_options(deadline=0.05).ubatch(10)
        return ub.ubatch(20)

    for _ in range(10):
        ub, first, gate = held(hub)
        keeps_it_open = hub.spawn(ub.ubatch, 1)
        caller = hub.spawn(client)
        hub.until(lambda: ub.stats().calls_total == 4)
        last = hub.spawn(ub.ubatch, 3)
        hub.until(lambda: ub.stats().pending == 3)
        gate.open()
        assert [2, 40, 6] == [keeps_it_open.result(), caller.result(), last.result()]
        assert 0 == first.result()
        ub.stop()


def test_what_a_call_is_told_reaches_no_later_call(hub: World) -> None:
    """One expires, another joins, the first is thrown out: all in one turn."""
    ub, first, gate = held(hub)
    ended: list[Any] = []

    class ThrownOut(Exception):
        pass

    def client() -> None:
        with pytest.raises(ThrownOut):
            ub.with_options(deadline=0.05).ubatch(1)
        ended.extend(ub.ubatch(n) for n in (2, 3))

    def call_after(seconds: float, n: int) -> int:
        gevent.sleep(seconds)
        return ub.ubatch(n)

    others = [hub.spawn(ub.ubatch, 0)]
    leaver = gevent.spawn(ub.ubatch, 9)
    hub.until(lambda: ub.stats().pending == 2)
    caller = gevent.spawn(client)
    hub.until(lambda: ub.stats().pending == 3)
    leaver.kill()
    others.append(hub.spawn(call_after, 0.05, 5))
    timer = gevent.get_hub().loop.timer(0.05)
    gevent.sleep(0)
    timer.start(caller.throw, ThrownOut, update=True)
    gevent.get_hub().loop.run_callback(gate.open)
    end = time.monotonic() + 0.08
    while time.monotonic() < end:  # so that all of it is due at once
        pass
    gevent.joinall([caller], timeout=20)
    timer.close()
    assert [4, 6] == ended
    assert [0, 0, 10] == [other.result() for other in (first, *others)]
    assert (0, 0) == (ub.stats().pending, ub.stats().running)
    ub.stop()


def test_a_caller_may_end_the_next_one_before_it_is_told(hub: World) -> None:
    """Who is thrown at hears that, and those behind it get their answers."""
    ub = full(3)
    ended: list[Any] = []

    def throw_at_the_next() -> None:
        ended.append(ub.ubatch(1))
        gevent.get_hub().loop.run_callback(gevent.getcurrent().switch)  # or it is lost
        victim.throw(gevent.GreenletExit)

    def wait() -> None:
        try:
            ended.append(ub.ubatch(2))
        except gevent.GreenletExit:
            ended.append("thrown")
            gevent.sleep(0.01)  # whoever switches here now did it to the wrong wait
            ended.append("slept")

    first = gevent.spawn(throw_at_the_next)
    victim = gevent.spawn(wait)
    third = gevent.spawn(lambda: ended.append(ub.ubatch(3)))
    gevent.joinall([first, victim, third], timeout=20)
    assert [2, "thrown", 6, "slept"] == ended
    seen = ub.stats()
    assert (3, 0, 0) == (seen.results_total, seen.pending, seen.running)
    ub.stop()


def test_a_bare_greenlet_that_raises_keeps_nobody_from_being_told(hub: World) -> None:
    """Its error goes to its parent, the hub, which was about to tell the others."""
    ub = full(3)
    ended: list[Any] = []
    hub_itself = gevent.get_hub()
    silent, hub_itself.exception_stream = hub_itself.exception_stream, None

    def fail() -> None:
        ended.append(ub.ubatch(1))
        raise ValueError("nobody's")

    bare = greenlet(fail, parent=hub_itself)
    hub_itself.loop.run_callback(bare.switch)
    others = [gevent.spawn(lambda n: ended.append(ub.ubatch(n)), n) for n in (2, 3)]
    gevent.joinall(others, timeout=20)
    hub_itself.exception_stream = silent
    assert [2, 4, 6] == ended
    ub.stop()


@pytest.mark.parametrize("junk", [(), (None,), ("a", "b")], ids=repr)
def test_a_switch_by_somebody_else_is_an_error_and_no_answer(
    hub: World, junk: tuple[Any, ...]
) -> None:
    """It says so, and gives the place up."""
    ub = full(2)
    caller = hub.spawn(ub.ubatch, 1)
    hub.until(lambda: ub.stats().pending == 1)
    gevent.get_hub().loop.run_callback(caller.greenlet.switch, *junk)  # type: ignore
    with pytest.raises(BackendError, match="somebody else switched"):
        caller.result()
    assert (0, 1) == (ub.stats().pending, ub.stats().cancelled_total)
    ub.stop()


def test_greenlets_that_are_equal_are_not_mixed_up(hub: World) -> None:
    """Not even two whose class says that they are the same."""

    class Job(gevent.Greenlet):  # type: ignore[type-arg]
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Job)

        def __hash__(self) -> int:
            return 1

    ub = full(2)
    jobs = [Job(ub.ubatch, 1), Job(ub.ubatch, 2)]
    for job in jobs:
        job.start()
    assert [2, 4] == [job.get(timeout=20) for job in jobs]
    ub.stop()


def test_a_call_without_stack_gets_no_later_calls_answer(hub: World) -> None:
    """RecursionError may strike anywhere in a call; the next one is another one."""
    for depth in range(sys.getrecursionlimit() - 60, sys.getrecursionlimit()):
        ub = UBatch(2, 0.01, handler=doubled, backend="gevent", linger="full").start()
        other = hub.spawn(ub.ubatch, 1)

        def call(deeper: int) -> int:
            return call(deeper - 1) if deeper else ub.ubatch(10)

        def call_twice(depth: int = depth) -> int:
            try:
                assert 20 == call(depth)
            except RecursionError:
                pass
            return ub.ubatch(20)

        caller = hub.spawn(call_twice)
        assert [2, 40] == [other.result(), caller.result()]
        ub.stop()


def test_nothing_is_armed_when_nobody_waits(hub: World) -> None:
    """A call that leaves takes the timers along that were set for it."""
    for options in {}, {"deadline": 60.0}:
        ub = full(9, **options)
        caller = gevent.spawn(ub.ubatch, 1)
        hub.until(lambda: ub.stats().pending == 1)
        caller.kill()
        assert gevent.get_hub().join(timeout=20), "a timer kept the loop alive"
        ub.stop()


def test_a_kept_future_keeps_no_other_caller_alive(hub: World) -> None:
    """Nor what the others still hold."""
    ub = full(3, deadline=60.0)
    kept = ub.submit(0)
    callers = [gevent.spawn(ub.ubatch, n) for n in (1, 2)]
    gevent.joinall(callers, timeout=20)
    alive = [weakref.ref(caller) for caller in callers]
    del callers
    hub.until(lambda: gc.collect() >= 0 and not any(one() for one in alive))
    assert 0 == kept.result(0)
    ub.stop()


def test_short_inline_batches_starve_no_socket(hub: World) -> None:
    """Their callers' own work counts: one turn of the loop at least every few ms."""
    recorder = Recorder(lambda item: item)
    ub = UBatch(8, 0.01, handler=recorder, backend="gevent", executor="inline").start()
    here, there = socket.socketpair()
    counts: list[int] = []

    def work() -> None:
        while True:
            ub.ubatch(1)
            sum(range(20_000))  # about 0.3 ms

    callers = [gevent.spawn(work) for _ in range(16)]
    echo = gevent.spawn(lambda: [there.send(there.recv(1)) for _ in range(30)])
    for _ in range(30):
        before = len(recorder.batches)
        here.send(b".")
        here.recv(1)
        counts.append(len(recorder.batches) - before)
    gevent.killall([*callers, echo])
    here.close()
    there.close()
    ub.stop()
    assert sum(counts) > 30, "it was not busy"
    assert max(counts) <= 12


@pytest.mark.timing  # it lingers for callers who come back as fast as before
def test_lingering_for_the_missing_takes_no_processor(
    hub: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps until they are due; it does not turn round and round."""
    turns: list[None] = []
    turn = GeventBackend.turn

    def counted(backend: GeventBackend, wake: Any) -> None:
        turns.append(None)
        turn(backend, wake)

    def cooperate(items: list[int]) -> list[int]:
        gevent.sleep(0.2)
        return items

    ub = UBatch(64, 1.0, handler=cooperate, backend="gevent", executor="inline").start()
    for _ in range(4):
        callers = [hub.spawn(ub.ubatch, n) for n in range(10)]
        for caller in callers:
            caller.join()
        gevent.sleep(0.05)  # as long as these callers are away
    monkeypatch.setattr(GeventBackend, "turn", counted)
    before = ub.stats().queued_seconds
    assert 1 == ub.ubatch(1)
    assert ub.stats().queued_seconds - before > 0.01, "it did not linger"
    assert len(turns) < 1000
    ub.stop()
