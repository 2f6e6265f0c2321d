"""Does a batcher start, stop, start again and go away as it should?"""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import gevent
import pytest

from tests.fakes import Gated, Recorder, World
from ubatch import HandlerAlreadySet, HandlerNotSet, Stopped, UBatch


def test_start_needs_a_handler() -> None:
    """start() without a handler says how to give one."""
    with pytest.raises(HandlerNotSet, match="set_handler"):
        UBatch(1, 0.0).start()


def test_a_second_handler_is_refused() -> None:
    """A batcher keeps the handler it has."""
    ub: UBatch[int, str] = UBatch(1, 0.0)
    ub.set_handler(Recorder())
    with pytest.raises(HandlerAlreadySet, match="Recorder"):
        ub.set_handler(Recorder())


@pytest.mark.concurrency
def test_a_call_before_start_waits_for_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls that come early are answered when start() is called; one warning."""
    handler = Recorder()
    ub: UBatch[int, str] = UBatch(9, 0.0, backend=world.backend)
    gevent.sleep(0)  # so that on the main greenlet the hub is there
    callers = [world.spawn(ub.ubatch, n) for n in range(3)]
    world.until(lambda: ub.stats().pending == 3)
    ub.set_handler(handler)
    assert [] == handler.batches
    ub.start()
    assert list("012") == [c.result() for c in callers]
    ub.stop()
    assert 1 == caplog.text.count("called before start()")


@pytest.mark.concurrency
def test_stop_answers_what_was_accepted_and_refuses_newcomers(world: World) -> None:
    """stop() drains, returns when all is done, and may be called again."""
    handler = Gated(world.gate())
    ub = UBatch(2, 0.0, handler=handler, backend=world.backend).start()
    futures = [ub.submit(n) for n in range(7)]
    world.until(lambda: handler.batches)
    stoppers = [world.spawn(ub.stop) for _ in range(2)]
    world.until(lambda: "stopping" in repr(ub))
    for refused in (ub.ubatch, ub.submit, lambda n: ub.map([n])):
        with pytest.raises(Stopped, match="start"):
            refused(9)
    assert not any(stopper.ended for stopper in stoppers)
    handler.gate.open()
    for stopper in stoppers:
        stopper.result()
    assert list("0123456") == [f.result(0) for f in futures]
    assert "stopped" in repr(ub)
    ub.stop()


@pytest.mark.concurrency
def test_stop_with_a_timeout_ends_what_is_left(world: World) -> None:
    """A handler that never returns: its callers and those behind get Stopped."""
    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend).start()
    callers = [world.spawn(ub.ubatch, n) for n in range(3)]
    world.until(lambda: ub.stats().running == 1 and ub.stats().pending == 2)
    ub.stop(timeout=0.01)
    for caller in callers:
        with pytest.raises(Stopped):
            caller.result()
    seen = ub.stats()
    assert (0, 0, 3) == (seen.pending, seen.running, seen.failures_total)
    handler.gate.open()  # its late answer is dropped
    ub.start()
    assert "9" == ub.ubatch(9)
    assert 1 == ub.stats().results_total
    ub.stop()


def test_start_again_after_stop_works(world: World) -> None:
    """The same batcher serves again, and its counters go on."""
    ub = UBatch(1, 0.0, handler=Recorder(), backend=world.backend)
    for round_ in range(3):
        with ub:
            assert "1" == ub.ubatch(1)
        with pytest.raises(Stopped):
            ub.ubatch(1)
        assert round_ + 1 == ub.stats().results_total


def test_stop_before_anything_happened_is_harmless(world: World) -> None:
    """A batcher that never ran stops at once, and then refuses calls."""
    ub = UBatch(1, 0.0, handler=Recorder(), backend=world.backend)
    ub.stop()
    with pytest.raises(Stopped):
        ub.ubatch(1)


@pytest.mark.concurrency
def test_stop_ends_calls_that_waited_for_start(world: World) -> None:
    """What can never run is answered with Stopped."""
    ub: UBatch[int, int] = UBatch(1, 0.0, backend=world.backend)
    caller = world.spawn(ub.ubatch, 1)
    world.until(lambda: ub.stats().pending == 1)
    ub.stop()
    with pytest.raises(Stopped):
        caller.result()


@pytest.mark.concurrency
def test_a_forgotten_batcher_answers_and_goes_away(world: World) -> None:
    """Without stop(): accepted calls are answered, then nothing is left of it."""
    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend, workers=2).start()
    futures = [ub.submit(n) for n in range(4)]
    world.until(lambda: len(handler.batches) == 2)
    gone = weakref.ref(ub)
    del ub
    gc.collect()
    assert gone() is None
    handler.gate.open()
    assert list("0123") == [f.result(30) for f in futures]
    # The fixture sees to it that no thread and no greenlet is left.


def test_a_forgotten_idle_batcher_goes_away(world: World) -> None:
    """The same for one that waits for calls."""
    ub = UBatch(1, 0.0, handler=Recorder(), backend=world.backend).start()
    assert "1" == ub.ubatch(1)
    del ub
    gc.collect()


@pytest.mark.concurrency
def test_many_threads_may_make_the_first_call(threads: World) -> None:
    """A race of first calls makes one collector, and every call is answered."""
    for _ in range(20):
        handler = Recorder()
        with UBatch(64, 0.0, handler=handler, backend="thread") as ub:
            callers = [threads.spawn(ub.ubatch, n) for n in range(8)]
            assert list("01234567") == [c.result() for c in callers]
            assert 8 == ub.stats().results_total


@pytest.mark.concurrency
def test_start_and_stop_may_race_with_calls(world: World) -> None:
    """Under start/stop storms each call ends: its own answer, or Stopped."""
    ub = UBatch(4, 0.0, handler=Recorder(), backend=world.backend, workers=2).start()
    ended = [0]

    def call(n: int) -> str:
        try:
            for step in range(50):
                try:
                    assert str(step) == ub.ubatch(step)
                except Stopped:
                    ub.start()
            return "done"
        finally:
            ended[0] += 1

    def storm() -> None:
        while ended[0] < 8:
            ub.stop()
            ub.start()
            gevent.sleep(0.001) if world.is_gevent else None

    callers = [world.spawn(call, n) for n in range(8)]
    stormer = world.spawn(storm)
    assert ["done"] * 8 == [c.result() for c in callers]
    stormer.result()
    ub.stop()
    seen = ub.stats()
    assert seen.calls_total == seen.results_total
    assert (0, 0) == (seen.pending, seen.running)


def test_one_log_line_says_which_backend_and_why(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first call in a process, once."""
    caplog.set_level(logging.INFO)
    with UBatch(1, 0.0, handler=Recorder(), backend=world.backend, name="model") as ub:
        assert ub.backend is None
        ub.ubatch(1)
        ub.ubatch(2)
        assert world.backend == ub.backend
    lines = [r.getMessage() for r in caplog.records if "backend" in r.getMessage()]
    assert [
        f"model: backend {world.backend} (asked for by name), executor threadpool, "
        "workers 1"
    ] == lines


def test_repr_shows_name_backend_state_and_counts(world: World) -> None:
    """repr() tells what a person at a prompt wants to know."""
    ub: Any = UBatch(1, 0.0, backend=world.backend, name="model")
    assert "<UBatch 'model'" in repr(ub) and "new" in repr(ub)
    ub.set_handler(Recorder())
    with ub:
        ub.map([1, 2])
        assert (
            f"<UBatch 'model' {world.backend}, started: 0 pending, 0 running, "
            "2 batches, 2 results>" == repr(ub)
        )


def test_a_callback_of_the_hub_can_stop(hub: World) -> None:
    """It begins to, and does not wait: a signal may strike in the hub."""
    handler = Gated(hub.gate())
    ub = UBatch(1, 0.0, handler=handler, backend="gevent").start()
    caller = hub.spawn(ub.ubatch, 1)
    hub.until(lambda: handler.batches)
    stopped: list[str] = []
    gevent.get_hub().loop.run_callback(lambda: stopped.append(str(ub.stop())))
    hub.until(lambda: stopped)
    with pytest.raises(Stopped):
        ub.submit(2)
    handler.gate.open()
    assert "1" == caller.result()
