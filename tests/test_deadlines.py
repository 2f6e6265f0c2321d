"""Is everybody answered in time, whoever waits and whatever the workers do?"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import gevent
import pytest

from tests.fakes import Caller, Gated, Recorder, World
from ubatch import DeadlineExceeded, Future, QueueFull, UBatch
from ubatch.backends.thread import ThreadAlarm, ThreadWake
from ubatch.batch import ONE_ITEM, Batch
from ubatch.deadlines import Deadlines
from ubatch.pace import NOTICE, PROBE_AFTER, RECENT, RESERVE, Recent

TASKS = Path("/proc/self/task")


class Alarm:
    """Remembers what it is set for, and whether it is."""

    def __init__(self) -> None:
        self.at = inf

    def set(self, at: float) -> None:
        self.at = at

    def clear(self) -> None:
        self.at = inf

    close = clear


def batch(running: bool = False) -> Batch:
    made = Batch(None, ONE_ITEM, None, 0.0)  # type: ignore[arg-type]
    made.running = running
    return made


def put(deadlines: Deadlines, into: Batch, caller: str, at: float) -> None:
    into.calls[caller] = caller
    into.deadlines[caller] = at, at
    deadlines.note(into, at, now=0.0)


def test_the_alarm_is_set_for_the_earliest_and_only_while_somebody_waits() -> None:
    """One alarm serves all batches, and is off once they are gone."""
    alarm = Alarm()
    deadlines = Deadlines(alarm, lambda now: 0.0)
    first, second = batch(), batch()
    put(deadlines, first, "a", 5.0)
    put(deadlines, first, "b", 7.0)
    assert 5.0 == alarm.at
    put(deadlines, second, "c", 3.0)
    assert 3.0 == alarm.at
    assert ([(second, ["c"])], []) == deadlines.due(3.0)
    assert 5.0 == alarm.at
    deadlines.forget(first)
    deadlines.forget(second)
    assert inf == alarm.at == deadlines.next


def test_an_alarm_that_rings_too_early_is_set_again() -> None:
    """Timers may hurry; nothing is lost by that."""
    alarm = Alarm()
    deadlines = Deadlines(alarm, lambda now: 0.0)
    one = batch()
    put(deadlines, one, "a", 5.0)
    alarm.clear()  # it rang
    deadlines.rang()
    assert ([], []) == deadlines.due(4.999)
    assert 5.0 == alarm.at


def test_who_waits_is_given_up_ahead_of_time_and_who_runs_is_not() -> None:
    """The handler's time counts for a call that it does not have yet."""
    alarm = Alarm()
    deadlines = Deadlines(alarm, lambda now: 2.0)
    waiting, running = batch(), batch(running=True)
    put(deadlines, waiting, "a", 5.0)
    put(deadlines, running, "b", 5.0)
    assert 3.0 == alarm.at
    assert ([(waiting, ["a"])], []) == deadlines.due(3.0)
    assert 5.0 == alarm.at
    assert ([(running, ["b"])], []) == deadlines.due(5.0)


def test_a_batch_past_its_limit_is_given_up_whole() -> None:
    """A handler's own limit is watched by the same alarm."""
    alarm = Alarm()
    deadlines = Deadlines(alarm, lambda now: 0.0)
    one = batch(running=True)
    put(deadlines, one, "a", 9.0)
    one.limit = 4.0
    deadlines.note(one, one.limit, now=0.0)
    assert 4.0 == alarm.at
    assert ([], [one]) == deadlines.due(4.0)


def recent(*seconds: float) -> Recent:
    """Return what is known after batches of one call that took so long, up to 100.0."""
    known = Recent()
    for one in seconds:
        known.add(100.0 - one, 100.0, 1)
    return known


def test_a_batch_closes_early_enough_for_the_slowest_time_seen() -> None:
    """A tenth more than the slowest of the last batches is left for the handler."""
    known = recent(0.1, 0.4, 0.2)
    assert 1.0 - 0.44 - NOTICE == pytest.approx(known.spare(101.0, 99.0, 100.0))
    known = recent(0.001)
    assert 1.0 - 2.0 * RESERVE == pytest.approx(known.spare(101.0, 99.0, 100.0))


def test_while_nothing_is_known_half_the_time_is_for_the_handler() -> None:
    """A first batch waits for half of its earliest deadline."""
    assert 0.5 == pytest.approx(recent().spare(10.0, 8.0, 8.5))


def test_a_call_is_hopeless_only_by_the_fastest_of_enough_batches() -> None:
    """One slow batch, a model's first, dooms nobody; nor do times that grew old."""
    assert 0.0 == recent(*[5.0] * (RECENT - 1)).lead(100.0)
    assert 5.0 == recent(*[5.0] * RECENT).lead(100.0)
    assert 0.1 == pytest.approx(recent(*[5.0] * RECENT, 0.1).lead(100.0))
    assert 0.0 == recent(*[5.0] * RECENT).lead(105.1)
    assert 0.0 == recent(*[0.1] * RECENT).lead(100.1 + PROBE_AFTER)


def test_retry_after_is_the_backlog_over_the_throughput_seen() -> None:
    """Calls answered per second of the time in which any of the last batches ran."""
    known = Recent()
    assert inf == known.seconds_for(10)
    known.add(0.0, 1.0, 10)
    known.add(100.0, 101.0, 25)  # after a quiet time
    known.add(100.5, 101.5, 5)  # beside the one before
    assert 6.25 == pytest.approx(known.seconds_for(100))


def held(world: World, **options: Any) -> tuple[UBatch[int, str], Gated, Caller]:
    """Return a batcher whose only worker is busy until the gate opens."""
    handler = Gated(world.gate())
    ub: UBatch[int, str] = UBatch(
        9, 0.0, handler=handler, backend=world.backend, **options
    ).start()
    first = world.spawn(ub.ubatch, 0)
    world.until(lambda: handler.batches)
    return ub, handler, first


class CountedWake(ThreadWake):
    """Counts how often it was set, and waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.sets = self.waits = 0

    def set(self) -> None:
        self.sets += 1
        super().set()

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        return super().wait(timeout)


@pytest.mark.concurrency
def test_lone_calls_do_not_wake_the_thread_of_the_alarm(threads: World) -> None:
    """Each sets it and clears it; the thread sleeps on until a time that was set."""
    alarm = ThreadAlarm(lambda: None)
    alarm._wake = wake = CountedWake()
    for _ in range(100):
        alarm.set(time.monotonic() + 60.0)
        alarm.clear()
        threads.until(lambda: wake.waits == wake.sets + 1)
    assert wake.sets <= 1
    alarm.close()


@pytest.mark.concurrency
def test_a_futures_callbacks_hear_of_its_deadline_while_workers_are_busy(
    world: World,
) -> None:
    """Nobody has to ask, and no worker has to be free."""
    ub, handler, first = held(world)
    told: list[Future[str]] = []
    ub.with_options(deadline=0.01).submit(1).add_done_callback(told.append)
    world.until(lambda: told)
    assert isinstance(told[0].exception(), DeadlineExceeded)
    assert 1 == ub.stats().running
    handler.gate.open()
    first.result()
    ub.stop()


@pytest.mark.concurrency
def test_gevent_wait_hears_of_a_deadline_while_workers_are_busy(hub: World) -> None:
    """gevent.wait returns when a future's time is up."""
    ub, handler, first = held(hub)
    future = ub.with_options(deadline=0.01).submit(1)
    assert [future] == gevent.wait([future], timeout=20)
    assert isinstance(future.exception(), DeadlineExceeded)
    handler.gate.open()
    first.result()
    ub.stop()


@pytest.mark.concurrency
def test_many_deadlines_in_any_order_end_each_at_its_own(world: World) -> None:
    """Whatever the order of calling, no call ends before its time, and all end."""
    ub, handler, first = held(world)
    began, ended = time.monotonic(), {}

    def call(seconds: float) -> None:
        with pytest.raises(DeadlineExceeded):
            ub.with_options(deadline=seconds).ubatch(1)
        ended[seconds] = time.monotonic() - began

    times = [0.02 + (n * 37 % 50) / 500 for n in range(50)]
    callers = [world.spawn(call, seconds) for seconds in times]
    for caller in callers:
        caller.result()
    assert all(seconds <= ended[seconds] for seconds in times)
    handler.gate.open()
    first.result()
    ub.stop()
    assert [[0]] == handler.batches


@pytest.mark.concurrency
def test_an_early_alarm_is_followed_by_another(world: World) -> None:
    """A timer that rings before its time costs a call nothing."""
    ub, handler, first = held(world)
    caller = world.spawn(ub.with_options(deadline=0.1).ubatch, 1)
    world.until(lambda: ub.stats().pending)
    collector: Any = ub._collector
    collector.endings.ring()
    assert 1 == ub.stats().pending
    with pytest.raises(DeadlineExceeded):
        caller.result()
    handler.gate.open()
    first.result()
    ub.stop()


@pytest.mark.concurrency
def test_an_idle_strand_holds_nothing_of_a_call_that_it_gave_up(world: World) -> None:
    """Who forgets a future that expired frees it, and its batch with it."""
    ub, handler, first = held(world)
    future = ub.with_options(deadline=0.01).submit(1)
    collector: Any = ub._collector
    collector.deadlines._alarm.clear()  # so that the strand finds it, not the alarm
    end = time.monotonic() + 0.01
    world.until(lambda: time.monotonic() > end)
    handler.gate.open()
    assert "0" == first.result()
    world.until(future.done)
    del future

    def freed() -> bool:
        gc.collect()
        return not any(isinstance(one, Future) for one in gc.get_objects())

    world.until(freed)
    ub.stop()


@pytest.mark.timing
def test_a_batch_that_lingers_closes_in_time_for_its_deadline(world: World) -> None:
    """linger="full" and a long timeout do not cost a call its deadline."""
    handler = Recorder()
    ub: UBatch[int, str] = UBatch(
        9, 60.0, handler=handler, backend=world.backend, linger="full", deadline=1.0
    )
    with ub:
        began = time.monotonic()
        assert "0" == ub.ubatch(0)
        assert 0.4 < time.monotonic() - began < 0.9  # nothing is known: half of it
        began = time.monotonic()
        assert "1" == ub.ubatch(1)
        assert 0.8 < time.monotonic() - began < 1.0
        assert {"deadline": 2} == ub.stats().dispatch_reasons


@pytest.mark.timing
def test_a_call_that_joins_late_has_its_deadline_heeded(world: World) -> None:
    """The earliest deadline counts, whoever of the batch has it."""
    handler = Recorder()
    ub: UBatch[int, str] = UBatch(
        9, 60.0, handler=handler, backend=world.backend, linger="full"
    )
    with ub:
        first = world.spawn(ub.ubatch, 0)
        world.until(lambda: ub.stats().pending)
        assert "1" == ub.with_options(deadline=0.5).ubatch(1)
        assert "0" == first.result()
    assert [[0, 1]] == handler.batches


def slow(seconds: float, runs: list[list[int]]) -> Any:
    def handler(items: list[int]) -> list[int]:
        runs.append(items)
        time.sleep(seconds)
        return items

    return handler


@pytest.mark.timing
@pytest.mark.parametrize("shed", [True, False])
def test_a_call_that_cannot_make_it_is_not_run(world: World, shed: bool) -> None:
    """It is answered at once, well before its deadline; unless one opts out."""
    runs: list[list[int]] = []
    ub: UBatch[int, int] = UBatch(
        9, 0.0, handler=slow(0.1, runs), backend=world.backend, shed=shed
    )
    with ub:
        for n in range(RECENT):
            ub.ubatch(n)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="0.08 s" if shed else "deadline"):
            ub.with_options(deadline=0.08).ubatch(-1)
        assert shed == (time.monotonic() - began < 0.07)
        assert 1 == ub.stats().expired_total
        world.until(lambda: not ub.stats().running)
        assert shed == ([-1] not in runs)
        future = ub.with_options(deadline=0.08).submit(-2)
        assert isinstance(future.exception(), DeadlineExceeded)
        assert 5 == ub.with_options(deadline=30.0).ubatch(5)


@pytest.mark.timing
def test_a_handler_that_was_slow_is_tried_again(world: World) -> None:
    """Shedding ends by itself: it is not believed for ever that nobody can make it."""
    runs: list[list[int]] = []
    pause = iter([0.3] * RECENT)

    def handler(items: list[int]) -> list[int]:
        runs.append(items)
        time.sleep(next(pause, 0.0))
        return items

    with UBatch(1, 0.0, handler=handler, backend=world.backend, deadline=30.0) as ub:
        ub.map(range(RECENT))
        soon = ub.with_options(deadline=0.1)
        with pytest.raises(DeadlineExceeded):
            soon.ubatch(-1)
        assert [-1] not in runs

        def answered() -> bool:
            try:
                return soon.ubatch(-2) == -2
            except DeadlineExceeded:
                return False

        world.until(answered)
        assert -3 == soon.ubatch(-3)


def test_queue_full_says_how_many_wait_and_when_to_come_back(world: World) -> None:
    """Its retry_after is about what the backlog takes, by the last batches."""
    ub, handler, first = held(world, max_pending=3)
    waiting = [ub.submit(n) for n in (1, 2, 3)]
    with pytest.raises(QueueFull, match="3 calls waiting, max_pending=3") as refused:
        ub.ubatch(4)
    assert (3, 3, 1.0) == (
        refused.value.pending,
        refused.value.max_pending,
        refused.value.retry_after,
    )
    handler.gate.open()
    assert ["1", "2", "3"] == [future.result(20) for future in waiting]
    first.result()
    assert 1 == ub.stats().rejected_total
    ub.stop()


@pytest.fixture
def burners() -> Iterator[None]:
    """Keep both cores busy."""
    burn = "import os\nwhile os.getppid() == %d: sum(range(9999))" % os.getpid()
    children = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(2)]
    yield
    for child in children:
        child.kill()
        child.wait()


def starved() -> float:
    """Return the seconds that our threads have waited for a processor."""
    waits = [path.read_text().split()[1] for path in TASKS.glob("*/schedstat")]
    return sum(map(int, waits)) / 1e9


@pytest.mark.timing
@pytest.mark.skipif(not TASKS.exists(), reason="asks Linux who waits for a processor")
def test_deadlines_are_kept_beside_a_handler_that_holds_the_gil(
    hub: World, burners: None
) -> None:
    """Of 1000 callers none hears of it 50 ms late, but for waits for a processor."""
    pinned = True

    def handler(items: list[int]) -> list[int]:
        while pinned:
            sum(range(1000))
        return items

    late: list[float] = []
    ub: UBatch[int, int] = UBatch(9, 0.0, handler=handler, backend="gevent").start()
    first = gevent.spawn(ub.ubatch, 0)
    hub.until(lambda: ub.stats().running)
    soon = ub.with_options(deadline=0.5)

    def call() -> None:
        began = time.monotonic()
        try:
            soon.ubatch(1)
        except DeadlineExceeded:
            late.append(time.monotonic() - began - 0.5)

    for _ in range(10):  # a shared machine may take the processor away for a while
        callers = [gevent.spawn(call) for _ in range(1000)]
        gevent.sleep(0.4)
        before = starved()
        gevent.joinall(callers, timeout=20, raise_error=True)
        assert 1000 == len(late)
        waited = starved() - before
        worst, late = max(late) - waited, []
        print(f"{1e3 * worst:.1f} ms late, and {1e3 * waited:.1f} for a processor")
        if worst < 0.05:
            break
    pinned = False
    first.get(timeout=20)
    ub.stop()
    assert worst < 0.05
