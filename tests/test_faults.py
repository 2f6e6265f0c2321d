"""Faults that a hostile reading found: each of these tests failed before its fix."""

from __future__ import annotations

import _thread
import gc
import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, ProcessPoolExecutor
from typing import Any

import gevent
import pytest
from gevent import monkey

from tests.fakes import Gated, World
from ubatch import (
    BackendError,
    BadBatchOutputSize,
    DeadlineExceeded,
    Stopped,
    UBatch,
    ubatch_decorator,
)
from ubatch.backends.thread import ThreadBackend
from ubatch.collector import Collector

TOO_SHORT = 2e-6
"""A deadline that an option cannot have, so that every interleaving comes up."""


def same(items: list[Any]) -> list[Any]:
    return items


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_a_callback_that_raises_system_exit_ends_nothing(
    world: World, error: BaseException
) -> None:
    """Neither the batcher, nor the other futures of its batch, nor the process."""

    def callback(_: Any) -> None:
        raise error

    with UBatch(2, 9.0, handler=same, backend=world.backend, linger="full") as ub:
        first = ub.submit(1)
        first.add_done_callback(callback)
        second = ub.submit(2)
        assert [1, 2] == [first.result(30), second.result(30)]
        assert [3, 4] == ub.map([3, 4])


def test_a_result_that_cannot_be_looked_at_is_delivered(world: World) -> None:
    """Results are told from errors by type: a proxy may raise at any other look."""

    class Local:
        pass

    proxies = [weakref.proxy(Local()) for _ in range(2)]  # dead ones
    with UBatch(1, 0.0, handler=lambda _: [proxies[0]], backend=world.backend) as ub:
        assert ub.ubatch(1) is proxies[0]
        assert ub.ubatch(2) is proxies[0]


class Broken(logging.Handler):
    """A log handler that fails, as pytest's own and many a socket's do."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("no disk")


@pytest.fixture
def broken_log() -> Iterator[None]:
    logger, handler = logging.getLogger("ubatch"), Broken()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("broken_log")
def test_a_log_handler_that_raises_costs_nobody_an_answer(world: World) -> None:
    """The error of a batch reaches its callers, and the next batch runs."""
    with UBatch(
        1, 0.0, handler=lambda xs: [1 // x for x in xs], backend=world.backend
    ) as ub:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                ub.ubatch(0)
            assert 1 == ub.ubatch(1)


@pytest.mark.usefixtures("broken_log")
def test_a_log_handler_that_raises_ends_no_callbacks(world: World) -> None:
    """A callback's error that cannot be logged does not silence the next ones."""
    told: list[Any] = []
    with UBatch(2, 9.0, handler=same, backend=world.backend, linger="full") as ub:
        for _ in range(2):
            futures = [ub.submit(1)]
            futures[0].add_done_callback(lambda _: 1 // 0)
            futures[0].add_done_callback(told.append)
            futures.append(ub.submit(2))
            world.until(lambda: futures[0] in told)


@pytest.mark.usefixtures("broken_log")
def test_a_log_handler_that_raises_does_not_refuse_the_first_call(
    world: World,
) -> None:
    """The line that says which backend runs is worth no call."""
    logger = logging.getLogger("ubatch")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        with UBatch(1, 0.0, handler=same, backend=world.backend) as ub:
            assert 1 == ub.ubatch(1)
    finally:
        logger.setLevel(before)


@pytest.mark.usefixtures("broken_log")
def test_a_warning_about_a_stalled_hub_costs_nobody_an_answer(hub: World) -> None:
    """The batch that kept the hub is answered, whatever becomes of the warning."""
    sleep = monkey.get_original("time", "sleep")

    def handler(items: list[float]) -> list[float]:
        sleep(0.15)
        return items

    with UBatch(1, 0.0, handler=handler, backend="gevent", executor="inline") as ub:
        assert 1 == ub.ubatch(1)


@pytest.mark.concurrency
def test_all_callbacks_of_a_batcher_run_on_one_thread(threads: World) -> None:
    """1. One looks for it; 2. another starts it; 3. the first does not start two."""
    backend = ThreadBackend()
    ran: list[int] = []

    def defer() -> None:
        backend.defer(lambda: ran.append(threading.get_ident()))

    class Lying:
        """The lock, which lets another thread go first."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock

        def acquire(self, blocking: bool) -> bool:
            backend._starting = self.lock
            threads.spawn(defer).result()
            return bool(self.lock.acquire(blocking))

        def release(self) -> None:
            self.lock.release()

    lying: Any = Lying(backend._starting)
    backend._starting = lying
    defer()
    for _ in range(20):
        defer()
    threads.until(lambda: len(ran) == 22)
    backend.close()
    assert 1 == len(set(ran))
    # The fixture sees to it that no thread is left.


@pytest.mark.concurrency
def test_a_first_caller_killed_while_it_logs_leaves_a_working_batcher(
    hub: World,
) -> None:
    """Whoever makes the first call may be killed anywhere on the way."""
    entered = []

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            entered.append(record)
            gevent.sleep(30)

    logger, handler = logging.getLogger("ubatch"), Slow(logging.INFO)
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    ub = UBatch(1, 0.0, handler=same, backend="gevent").start()
    try:
        first = hub.spawn(ub.ubatch, 1)
        hub.until(lambda: entered)
        first.greenlet.kill()  # type: ignore[attr-defined]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert 2 == ub.ubatch(2)
    ub.stop()


@pytest.mark.concurrency
@pytest.mark.usefixtures("switching")
def test_the_shortest_deadline_never_hangs(world: World) -> None:
    """A call may expire before its caller begins to wait."""
    with UBatch(4, 0.0, handler=same, backend=world.backend, workers=2) as ub:

        def call() -> int:
            expired = 0
            for n in range(1000):
                try:
                    assert n == ub._call((n,), {}, TOO_SHORT)
                except DeadlineExceeded:
                    expired += 1
            return expired

        callers = [world.spawn(call) for _ in range(8)]
        expired = sum(c.result() for c in callers)
        seen = ub.stats()
    assert (8000, expired) == (seen.calls_total, seen.expired_total)


@pytest.mark.concurrency
@pytest.mark.usefixtures("switching")
def test_a_wait_for_a_future_ends_in_its_result_or_its_deadline(
    world: World,
) -> None:
    """result() without a timeout never says that a timeout passed."""
    with UBatch(4, 0.0, handler=same, backend=world.backend) as ub:

        def call() -> None:
            for n in range(1000):
                try:
                    assert n == ub._submit((n,), {}, TOO_SHORT).result()
                except TimeoutError as error:
                    assert isinstance(error, DeadlineExceeded)

        for caller in [world.spawn(call) for _ in range(8)]:
            caller.result()


@pytest.mark.concurrency
def test_a_callback_of_an_expired_call_may_block(world: World) -> None:
    """It holds up no worker."""
    handler = Gated(world.gate())
    blocked = world.gate("inline")
    called: list[Any] = []

    def callback(future: Any) -> None:
        called.append(future)
        blocked.wait()

    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        first = ub.submit(0)
        world.until(lambda: handler.batches)
        late = ub.with_options(deadline=0.001).submit(1)
        late.add_done_callback(callback)
        world.until(late.done)
        world.until(lambda: called)
        handler.gate.open()
        assert "0" == first.result(30)
        assert "2" == ub.ubatch(2)
        blocked.open()


@pytest.mark.concurrency
def test_stop_may_cross_the_first_call(threads: World) -> None:
    """The call is answered or gets Stopped; a stopped batcher accepts no more."""
    for _ in range(100):
        ub = UBatch(1, 0.0, handler=same, backend="thread").start()
        callers = [threads.spawn(ub.ubatch, n) for n in range(3)]
        ub.stop()
        for n, caller in enumerate(callers):
            caller.join()
            assert caller.value == n or isinstance(caller.error, Stopped)
        with pytest.raises(Stopped):
            ub.ubatch(1)
        ub.start()
        assert 5 == ub.ubatch(5)
        ub.stop()


@pytest.mark.concurrency
def test_stop_in_a_signal_handler_does_not_lock_up(threads: World) -> None:
    """A handler that strikes inside a call begins to stop, and the process goes on."""
    ubs: list[UBatch[int, int]] = []
    struck = [0]

    def strike(*_: Any) -> None:
        struck[0] += 1
        ubs[-1].stop()

    before = signal.signal(signal.SIGUSR1, strike)
    pid, going = os.getpid(), [True]

    def shoot() -> None:
        while going[0]:
            os.kill(pid, signal.SIGUSR1)

    try:
        ubs.append(UBatch(4, 0.0, handler=same, backend="thread").start())
        shooter = threads.spawn(shoot)
        while struck[0] < 300:
            try:
                ubs[-1].submit(1)
            except Stopped:
                ubs.append(UBatch(4, 0.0, handler=same, backend="thread").start())
        going[0] = False
        shooter.result()
    finally:
        going[0] = False
        signal.signal(signal.SIGUSR1, before)
    for ub in ubs:
        ub.stop()


def test_outputs_without_an_end_fail_the_batch(world: World) -> None:
    """What says it has a length and then never stops is cut off."""

    class Endless:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> int:
            return index

    with UBatch(1, 0.0, handler=lambda _: Endless(), backend=world.backend) as ub:
        with pytest.raises(BadBatchOutputSize):
            ub.ubatch(1)


def test_starting_and_stopping_leaves_no_collectors(world: World) -> None:
    """A hundred lives of one batcher take no more memory than one."""
    ub = UBatch(1, 0.0, handler=same, backend=world.backend, name="phoenix")
    for _ in range(100):
        with ub:
            ub.ubatch(1)
    gc.collect()
    collectors = [found for found in gc.get_objects() if isinstance(found, Collector)]
    assert 1 == sum(found.name == "phoenix" for found in collectors)


def test_a_batcher_of_a_bound_method_goes_away_with_its_owner(world: World) -> None:
    """``self.batcher = UBatch(handler=self.predict)`` is the commonest use of all."""

    class Model:
        def __init__(self) -> None:
            self.batcher = UBatch(1, 0.0, handler=self.predict, backend=world.backend)
            self.batcher.start()

        def predict(self, items: list[int]) -> list[int]:
            return items

    model = Model()
    assert 1 == model.batcher.ubatch(1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    # The fixture sees to it that no thread and no greenlet is left.


@pytest.mark.parametrize("executor", ["threadpool", "inline"])
def test_the_items_of_a_failed_batch_are_let_go_without_the_collector_of_cycles(
    world: World, executor: Any
) -> None:
    """A failed batch is no cycle that waits for gc."""

    class Item:
        pass

    def handler(items: list[Item]) -> list[Item]:
        del items  # the handler's own frame is in the traceback
        raise ValueError("no")

    kept = []
    gc.disable()
    try:
        with UBatch(
            1, 0.0, handler=handler, backend=world.backend, executor=executor
        ) as ub:
            for _ in range(5):
                item = Item()
                kept.append(weakref.ref(item))
                try:
                    ub.ubatch(item)
                except ValueError:
                    pass
                del item
            world.until(lambda: not any(reference() for reference in kept))
    finally:
        gc.enable()


def test_a_copy_of_an_error_has_its_slots_and_runs_no_constructor(
    world: World,
) -> None:
    """Every caller's copy is whole, and made without side effects."""
    made = []

    class Slotted(Exception):
        __slots__ = ("code",)

        def __init__(self, code: int) -> None:
            super().__init__("slotted")
            self.code = code
            made.append(self)

    def handler(items: list[int]) -> list[int]:
        raise Slotted(5)

    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        with pytest.raises(Slotted, match="slotted") as caught:
            ub.ubatch(1)
    assert 5 == caught.value.code
    assert 1 == len(made) and caught.value is not made[0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(2, "no such file", "model.bin"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        StopIteration(3),
        KeyError("k"),
        ImportError("no", name="torch"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_keep_state_in_c_are_copied_whole(
    world: World, error: Exception
) -> None:
    """errno, start and end, value, exceptions, name: all there."""

    def handler(items: list[int]) -> list[int]:
        raise error

    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        mine = ub.submit(1).exception(30)
    assert mine is not error and type(mine) is type(error)
    assert str(mine) == str(error) and mine.args == error.args
    for name in ("errno", "filename", "start", "end", "value", "exceptions", "name"):
        assert getattr(mine, name, None) == getattr(error, name, None)


def test_a_handlers_cancelled_error_is_not_a_cancelled_call(world: World) -> None:
    """Only cancel() cancels."""

    def handler(items: list[int]) -> list[int]:
        raise CancelledError

    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        future = ub.submit(1)
        assert isinstance(future.exception(30), CancelledError)
        assert not future.cancelled() and not future.cancel()
        assert 1 == ub.stats().failures_total


@pytest.mark.concurrency
def test_no_more_threads_is_an_error_of_the_call_that_needed_one(
    threads: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next call, when there are threads again, works."""

    def refuse(*_: Any) -> int:
        raise RuntimeError("can't start new thread")

    with UBatch(1, 0.0, handler=same, backend="thread") as ub:
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", refuse)
            with pytest.raises(BackendError, match="cannot start a worker"):
                ub.ubatch(1)
        assert 0 == ub.stats().pending
        assert 2 == ub.ubatch(2)


@pytest.mark.concurrency
def test_a_callback_that_no_thread_can_be_had_for_costs_nobody_an_answer(
    threads: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other futures of the batch are told; the callback runs when there are threads."""

    def refuse(*_: Any) -> int:
        raise RuntimeError("can't start new thread")

    called: list[int] = []
    gate = threads.gate()
    with UBatch(9, 0.0, handler=Gated(gate, int), backend="thread") as ub:
        ub.submit(0)
        threads.until(lambda: ub.stats().running)
        calls = [ub.submit(n) for n in (1, 2)]
        calls[0].add_done_callback(lambda call: called.append(call.result()))
        with monkeypatch.context() as patch:
            waiter = threads.spawn(calls[1].result)
            threads.until(lambda: calls[1]._links)
            patch.setattr(_thread, "start_new_thread", refuse)
            gate.open()
            assert 2 == waiter.result()
            assert not called
    threads.until(lambda: called == [1])


def test_a_greenlet_is_refused_by_a_batcher_of_threads(threads: World) -> None:
    """It would stall its hub; the error says how to say "gevent"."""
    with UBatch(1, 0.0, handler=same, backend="thread") as ub:
        assert 1 == ub.ubatch(1)  # the main greenlet, as in a script
        for call in (ub.ubatch, lambda n: ub.submit(n).result()):
            with pytest.raises(BackendError, match="backend='gevent'"):
                gevent.spawn(call, 2).get()


def test_a_first_call_from_a_handler_takes_the_handlers_backend(hub: World) -> None:
    """A pool's thread makes the first call; greenlets make the next."""
    inner: UBatch[int, int] = UBatch(1, 0.0, handler=same)
    outer: UBatch[int, int] = UBatch(1, 0.0, handler=inner.map, backend="gevent")
    with inner, outer:
        assert 1 == outer.ubatch(1)
        assert "gevent" == inner.backend
        assert 2 == gevent.spawn(inner.ubatch, 2).get()


def test_a_decorated_function_runs_in_a_process_pool() -> None:
    """It is sent there by its name, under which it is the decorated one."""
    assert 9 == tripled.ubatch(3)
    tripled.stop()
    PROCESSES.shutdown()


PROCESSES = ProcessPoolExecutor(1)  # starts nothing yet


@ubatch_decorator(4, 0.0, executor=PROCESSES)
def tripled(numbers: list[int]) -> list[int]:
    return [3 * number for number in numbers]
