"""Does the service go on when a handler does not return?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from gevent.event import Event
from gevent.threadpool import ThreadPool

from tests.children import once, run
from tests.fakes import Gate, HubGate, Recorder, World
from ubatch import BackendError, DeadlineExceeded, Stopped, UBatch
from ubatch.backends import thread

LIMIT = 0.2
"""Seconds; long enough for a quick handler on a busy machine."""


class Sticky:
    """A handler that waits at a gate for some items."""

    def __init__(self, gate: Gate | HubGate) -> None:
        self.gate = gate
        self.batches: list[list[Any]] = []

    def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(items)
        if "stuck" in items:
            self.gate.wait()
        return items


def sticky(world: World, **options: Any) -> tuple[UBatch[str, str], Sticky]:
    handler = Sticky(world.gate(options.get("executor")))
    options.setdefault("handler_timeout", LIMIT)
    ub: UBatch[str, str] = UBatch(
        8, 0.0, handler=handler, backend=world.backend, name="sticky", **options
    )
    return ub.start(), handler


def end(world: World, ub: UBatch[str, str], handler: Sticky) -> None:
    """Let the stuck ones go, and see that nothing is left of them."""
    handler.gate.open()
    world.until(lambda: not ub.stats().stuck)
    assert "after" == ub.ubatch("after")
    ub.stop()
    assert (0, 0) == (ub.stats().pending, ub.stats().running)


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", ["threadpool", "inline"])
def test_callers_of_a_stuck_handler_are_answered_and_others_served(
    world: World, executor: str
) -> None:
    """Its batch gets DeadlineExceeded; the next one runs on a new worker."""
    ub, handler = sticky(world, executor=executor)
    with pytest.raises(DeadlineExceeded, match="handler_timeout=0.2 seconds"):
        ub.ubatch("stuck")
    seen = ub.stats()
    assert (1, 1, 1) == (seen.stuck, seen.stuck_total, seen.expired_total)
    assert "next" == ub.ubatch("next")
    end(world, ub, handler)
    assert 1 == ub.stats().stuck_total


@pytest.mark.concurrency
def test_what_waits_behind_a_stuck_handler_is_run(world: World) -> None:
    """Calls that came while it was stuck need no newcomer to set them going."""
    ub, handler = sticky(world)
    stuck = world.spawn(ub.ubatch, "stuck")
    world.until(lambda: ub.stats().running)
    waiting = [ub.submit(n) for n in "abc"]
    assert list("abc") == [future.result(20) for future in waiting]
    with pytest.raises(DeadlineExceeded):
        stuck.result()
    end(world, ub, handler)


@pytest.mark.concurrency
@pytest.mark.parametrize("workers", [1, 3])
def test_replacements_are_bounded_and_then_nobody_waits_in_vain(
    world: World, workers: int
) -> None:
    """With all of twice the workers stuck, who waits and who comes is refused."""
    ub, handler = sticky(world, workers=workers)
    for _ in range(2 * workers - 1):
        with pytest.raises(DeadlineExceeded):
            ub.ubatch("stuck")
    last = world.spawn(ub.ubatch, "stuck")
    world.until(lambda: len(handler.batches) == 2 * workers)
    waiting = world.spawn(ub.ubatch, "in vain")
    world.until(lambda: ub.stats().pending)
    with pytest.raises(BackendError, match="stuck in the handler"):
        waiting.result()
    with pytest.raises(DeadlineExceeded):
        last.result()
    with pytest.raises(BackendError, match="restart this process"):
        ub.ubatch("in vain")
    assert 2 * workers == ub.stats().stuck
    end(world, ub, handler)
    assert ["in vain"] not in handler.batches


def no_thread(_: Callable[[], None]) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.concurrency
def test_without_a_thread_to_log_it_callers_of_a_stuck_handler_are_answered(
    threads: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stuck handlers use threads up; nobody's answer, nor the alarm, hangs on one."""
    ub, handler = sticky(threads, workers=2)
    stuck = [ub.submit("stuck")]
    threads.until(lambda: handler.batches)
    with monkeypatch.context() as patch:
        patch.setattr(thread, "start_thread", no_thread)
        assert isinstance(stuck[0].exception(20), DeadlineExceeded)
    stuck.append(ub.submit("stuck"))
    assert isinstance(stuck[1].exception(20), DeadlineExceeded)
    end(threads, ub, handler)


@pytest.mark.concurrency
def test_if_no_worker_is_to_be_had_beside_the_stuck_nobody_waits_for_one(
    threads: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits, and who comes, is told; later ones are served if there are threads."""
    ub, handler = sticky(threads, handler_timeout=0.3)
    ub.submit("stuck")
    threads.until(lambda: handler.batches)
    with monkeypatch.context() as patch:
        patch.setattr(thread, "start_thread", no_thread)
        waiting = ub.submit("waiting")
        assert isinstance(waiting.exception(20), BackendError)
        with pytest.raises(BackendError, match="cannot start a worker"):
            ub.submit("new")
    assert (0, 0) == (ub.stats().pending, ub.stats().running)
    assert "later" == ub.ubatch("later")
    end(threads, ub, handler)
    assert ["waiting"] not in handler.batches


@pytest.mark.concurrency
def test_replaced_workers_leave_when_they_return(world: World) -> None:
    """No more than the workers run at once afterwards."""
    ub, handler = sticky(world, workers=2)
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            ub.ubatch("stuck")
    handler.gate.open()
    world.until(lambda: not ub.stats().stuck)
    collector: Any = ub._collector
    world.until(lambda: collector.strands.hired == 2)
    assert list("abcdef") == ub.map("abcdef")
    ub.stop()


@pytest.mark.concurrency
def test_stop_does_not_wait_for_what_is_stuck(world: World) -> None:
    """Its callers have been answered, so there is nothing to wait for."""
    ub, handler = sticky(world)
    stuck = world.spawn(ub.ubatch, "stuck")
    world.until(lambda: ub.stats().running)
    waiting = ub.submit("a")
    ub.stop()
    assert "a" == waiting.result(20)
    with pytest.raises(DeadlineExceeded):
        stuck.result()
    with pytest.raises(Stopped):
        ub.ubatch("b")
    ub.start()
    assert "c" == ub.ubatch("c")
    ub.stop()
    handler.gate.open()
    world.until(lambda: not ub.stats().stuck)


@pytest.mark.concurrency
def test_a_handler_whose_callers_were_given_up_is_not_waited_for_either(
    world: World,
) -> None:
    """One stop() loses patience; another, that has all the time, ends by the limit."""
    ub, handler = sticky(world)
    stuck = world.spawn(ub.ubatch, "stuck")
    world.until(lambda: handler.batches)
    ub.stop(0)
    with pytest.raises(Stopped):
        stuck.result()
    try:
        world.spawn(ub.stop).result()
        seen = ub.stats()
        assert (1, 1, 0) == (seen.stuck, seen.stuck_total, seen.expired_total)
    finally:
        handler.gate.open()
    world.until(lambda: not ub.stats().stuck)


@pytest.mark.concurrency
def test_nothing_polls_for_the_end_of_what_is_stuck(
    hub: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After stop() its thread is let go when it returns, and not looked for before."""
    killed: list[Any] = []
    monkeypatch.setattr(ThreadPool, "kill", lambda pool: killed.append(pool))
    ub, handler = sticky(hub)
    with pytest.raises(DeadlineExceeded):
        ub.ubatch("stuck")
    ub.stop()
    gevent.sleep()
    assert not killed
    handler.gate.open()
    hub.until(lambda: killed)
    monkeypatch.undo()
    killed[0].kill()
    assert 1 == len(killed) and 0 == ub.stats().stuck


@pytest.mark.concurrency
def test_what_a_stuck_handler_returns_at_last_goes_nowhere(world: World) -> None:
    """The next call of the same caller gets its own answer."""
    ub, handler = sticky(world, on_error="isolate")

    def twice() -> str:
        with pytest.raises(DeadlineExceeded):
            ub.ubatch("stuck")
        handler.gate.open()
        return ub.ubatch("mine")

    assert "mine" == world.spawn(twice).result()
    world.until(lambda: not ub.stats().stuck)
    seen = ub.stats()
    assert (1, 1, 2) == (seen.results_total, seen.expired_total, seen.calls_total)
    ub.stop()


@pytest.mark.concurrency
def test_a_stuck_handler_is_logged_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """One line: whose handler, how long, how many calls, how many more may stick."""
    ub, handler = sticky(world)
    with caplog.at_level(logging.WARNING, "ubatch"):
        with pytest.raises(DeadlineExceeded):
            ub.ubatch("stuck")
        world.until(lambda: caplog.messages)
        end(world, ub, handler)
    assert 1 == ub.stats().stuck_total
    (message,) = [one for one in caplog.messages if "workers stuck: 1" in one]
    assert message.startswith("sticky: the handler has run for 0.2 s, its handler_")
    assert message.endswith("(workers stuck: 1, still at work or to be had: 1)")


def test_a_handler_in_time_is_left_alone(world: World) -> None:
    """The limit counts from the batch's start, and a quick handler never meets it."""
    handler = Recorder()
    ub: UBatch[int, str] = UBatch(
        4, 0.0, handler=handler, backend=world.backend, handler_timeout=30.0
    )
    with ub:
        assert [str(n) for n in range(100)] == ub.map(range(100))
        seen = ub.stats()
    assert (0, 0, 0) == (seen.stuck, seen.stuck_total, seen.expired_total)


@pytest.mark.concurrency
def test_no_alarm_is_left_when_nobody_waits(hub: World) -> None:
    """A batch that was run in time takes its alarm along."""
    ub: UBatch[int, str] = UBatch(
        4, 0.0, handler=Recorder(), backend="gevent", handler_timeout=30.0, deadline=9.0
    ).start()
    assert ["1", "2"] == ub.map([1, 2])
    collector: Any = ub._collector
    assert collector.deadlines._alarm._timer is None
    ub.stop()


@pytest.mark.concurrency
def test_a_cooperative_handler_that_waits_for_ever_is_replaced(hub: World) -> None:
    """An inline handler on a dead upstream does not end the service."""
    upstream = Event()

    def handler(items: list[str]) -> list[str]:
        if "stuck" in items:
            upstream.wait()
        return items

    ub = UBatch(
        8, 0.0, handler=handler, backend="gevent", executor="inline",
        handler_timeout=LIMIT,
    ).start()  # fmt: skip
    with pytest.raises(DeadlineExceeded):
        ub.ubatch("stuck")
    assert "next" == ub.ubatch("next")
    upstream.set()
    hub.until(lambda: not ub.stats().stuck)
    ub.stop()


def end_beside_a_stuck_handler(backend: str, patch: bool) -> list[Any]:
    """Stop, and end the process, while a handler never returns."""
    if patch:
        from gevent import monkey

        monkey.patch_all()
    import logging

    from ubatch import DeadlineExceeded, UBatch
    from ubatch.backends.native import allocate_lock

    lock = allocate_lock()
    lock.acquire()
    logging.disable()

    def handler(items: list[int]) -> list[int]:
        lock.acquire()
        return items

    ub = UBatch(
        8, 0.0, handler=handler, backend=backend, handler_timeout=0.05  # type: ignore
    ).start()
    try:
        ub.ubatch(1)
    except DeadlineExceeded:
        pass
    ub.stop()
    return [ub.stats().stuck, ub.stats().expired_total]


@once
@pytest.mark.parametrize(
    "backend, patch", [("gevent", False), ("gevent", True), ("thread", False)]
)
def test_a_process_ends_beside_a_stuck_handler(backend: str, patch: bool) -> None:
    """Neither stop() nor the interpreter's end waits for it."""
    assert [1, 1] == run(end_beside_a_stuck_handler, backend, patch, timeout=20)
