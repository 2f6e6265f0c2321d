"""Do concurrent calls become few batches, and does each get its own answer?"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import gevent
import numpy
import pytest
from gevent.threadpool import ThreadPool

from tests.fakes import Gated, Recorder, World
from ubatch import BackendError, QueueFull, UBatch

EXECUTORS = ["threadpool", "inline"]


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("linger", ["settle", "full", "now"])
def test_every_caller_gets_its_own_answer(
    world: World, executor: Any, linger: Any
) -> None:
    """300 concurrent callers get 300 right answers, in batches of 32 at most."""
    handler = Recorder(lambda x: x * 10)
    with UBatch(
        32,
        0.005,
        handler=handler,
        backend=world.backend,
        executor=executor,
        linger=linger,
    ) as ub:
        callers = [world.spawn(ub.ubatch, n) for n in range(300)]
        assert [n * 10 for n in range(300)] == [c.result() for c in callers]
    assert max(map(len, handler.batches)) <= 32
    assert list(range(300)) == sorted(sum(handler.batches, []))


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_batch_grows_until_a_worker_is_free(world: World, executor: Any) -> None:
    """While one batch runs, newcomers gather; they are not run one by one."""
    handler = Gated(world.gate(executor))
    with UBatch(
        8,
        0.0,
        handler=handler,
        backend=world.backend,
        executor=executor,
        linger="now",
    ) as ub:
        first = world.spawn(ub.ubatch, 0)
        world.until(lambda: handler.batches)
        rest = []
        for n in range(1, 6):
            rest.append(world.spawn(ub.ubatch, n))
            world.until(lambda: ub.stats().pending == n)
        handler.gate.open()
        assert list("012345") == [c.result() for c in (first, *rest)]
    assert [[0], [1, 2, 3, 4, 5]] == handler.batches


@pytest.mark.concurrency
def test_calls_are_batched_first_come_first_served(world: World) -> None:
    """Calls that wait keep their order, within a batch and between batches."""
    handler = Gated(world.gate())
    with UBatch(4, 0.0, handler=handler, backend=world.backend, linger="now") as ub:
        futures = [ub.submit("first")]
        world.until(lambda: handler.batches)
        futures += [ub.submit(n) for n in range(10)]
        handler.gate.open()
        for future in futures:
            future.result(30)
    assert [["first"], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] == handler.batches


def test_max_size_is_a_cap_when_stop_drains_too(world: World) -> None:
    """stop() runs what was accepted in batches of max_size at most."""
    handler = Gated(world.gate())
    ub = UBatch(3, 9.0, handler=handler, backend=world.backend, linger="full").start()
    futures = [ub.submit(n) for n in range(3)]
    world.until(lambda: handler.batches)
    futures += [ub.submit(n) for n in range(3, 10)]
    stopping = world.spawn(ub.stop)
    handler.gate.open()
    stopping.result()
    assert list("0123456789") == [f.result(0) for f in futures]
    assert [3, 3, 3, 1] == [len(batch) for batch in handler.batches]
    assert {"full": 3, "stop": 1} == ub.stats().dispatch_reasons


def test_full_lingers_until_timeout_and_says_so(world: World) -> None:
    """linger="full" holds a batch open for timeout, then closes it for that."""
    handler = Recorder()
    with UBatch(9, 0.05, handler=handler, backend=world.backend, linger="full") as ub:
        callers = [world.spawn(ub.ubatch, n) for n in range(3)]
        assert list("012") == [c.result() for c in callers]
        seen = ub.stats()
    assert [[0, 1, 2]] == handler.batches
    assert {"timeout": 1} == seen.dispatch_reasons
    assert seen.queued_seconds >= 0.05


def test_a_full_batch_does_not_wait_for_timeout(world: World) -> None:
    """The call that fills a lingering batch closes it."""
    with UBatch(
        2, 3600.0, handler=Recorder(), backend=world.backend, linger="full"
    ) as ub:
        callers = [world.spawn(ub.ubatch, n) for n in range(2)]
        assert ["0", "1"] == [c.result() for c in callers]
        assert {"full": 1} == ub.stats().dispatch_reasons


def test_settle_gathers_a_burst_and_lets_a_lone_caller_go(hub: World) -> None:
    """On gevent a burst is one batch, and a lone caller does not wait for timeout."""
    handler = Recorder()
    with UBatch(99, 3600.0, handler=handler, backend="gevent") as ub:
        assert "lone" == ub.ubatch("lone")
        callers = [hub.spawn(ub.ubatch, n) for n in range(20)]
        for caller in callers:
            caller.result()
        assert {"settled": 2} == ub.stats().dispatch_reasons
    assert [["lone"], list(range(20))] == handler.batches


def test_settle_does_not_hold_a_lone_thread_for_timeout(threads: World) -> None:
    """On threads too a lone caller goes when no more are coming."""
    with UBatch(99, 3600.0, handler=Recorder(), backend="thread") as ub:
        assert "lone" == ub.ubatch("lone")
        assert {"settled": 1} == ub.stats().dispatch_reasons


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", EXECUTORS)
def test_as_many_batches_run_at_once_as_there_are_workers(
    world: World, executor: Any
) -> None:
    """workers=3 runs three batches at once, and a fourth waits."""
    handler = Gated(world.gate(executor))
    with UBatch(
        1,
        0.0,
        handler=handler,
        backend=world.backend,
        executor=executor,
        workers=3,
    ) as ub:
        callers = [world.spawn(ub.ubatch, n) for n in range(4)]
        world.until(lambda: ub.stats().running == 3 and len(handler.batches) == 3)
        assert 1 == ub.stats().pending
        handler.gate.open()
        assert list("0123") == [c.result() for c in callers]


@pytest.mark.concurrency
def test_a_full_batch_overtakes_one_of_another_shape_that_lingers(
    world: World,
) -> None:
    """A worker does not sit beside a full batch, waiting for an open one to grow."""
    with UBatch(2, 3600.0, handler=_pairs, backend=world.backend, linger="full") as ub:
        lingering = world.spawn(ub.ubatch, "a")
        world.until(lambda: ub.stats().pending == 1)
        callers = [world.spawn(ub.ubatch, n, n) for n in range(2)]
        assert [(0, 0), (1, 1)] == [c.result() for c in callers]
        second = world.spawn(ub.ubatch, "b")
        assert [("a", None), ("b", None)] == [
            lingering.result(),
            second.result(),
        ]


def _pairs(first: list[Any], second: list[Any] | None = None) -> list[Any]:
    return list(zip(first, second or [None] * len(first)))


def test_calls_of_different_shapes_share_no_batch(world: World) -> None:
    """Arguments reach the handler as lists, and shapes are kept apart."""
    seen: list[Any] = []

    def handler(first: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        seen.append((first, args, kwargs))
        return [None] * len(first)

    ub = UBatch(9, 60.0, handler=handler, backend=world.backend, linger="full").start()
    calls: list[Callable[[], Any]] = [
        lambda: ub.ubatch(1),
        lambda: ub.ubatch(2, mode="a", size=5),
        lambda: ub.ubatch(3, size=6, mode="b"),
        lambda: ub.ubatch(4, "x"),
        lambda: ub.ubatch(5),
    ]
    futures = []
    for call in calls:
        futures.append(world.spawn(call))
        world.until(lambda: ub.stats().calls_total == len(futures))
    ub.stop()  # which runs them
    for future in futures:
        future.result()
    assert [
        ([1, 5], (), {}),
        ([2, 3], (), {"mode": ["a", "b"], "size": [5, 6]}),
        ([4], (["x"],), {}),
    ] == seen


def test_a_call_by_name_alone_works(world: World) -> None:
    """ubatch(x=1) reaches the handler as handler(x=[1])."""
    with UBatch(
        9, 0.0, handler=lambda *, x: [n + 1 for n in x], backend=world.backend
    ) as ub:
        assert 2 == ub.ubatch(x=1)


def test_a_call_needs_an_argument(world: World) -> None:
    """A call without arguments is refused; the batcher goes on."""
    with UBatch(9, 0.0, handler=Recorder(), backend=world.backend) as ub:
        with pytest.raises(TypeError, match="at least one argument"):
            ub.ubatch()
        assert "1" == ub.ubatch(1)


def test_map_keeps_the_order_of_its_items(world: World) -> None:
    """map() answers item by item, over several batches."""
    handler = Recorder()
    with UBatch(8, 0.0, handler=handler, backend=world.backend) as ub:
        assert [str(n) for n in range(50)] == ub.map(iter(range(50)))
        assert [] == ub.map([])
    assert max(map(len, handler.batches)) <= 8


def test_map_raises_the_first_error_or_returns_them_all(world: World) -> None:
    """An item's own error is raised, or takes its place in the list."""

    def handler(items: list[int]) -> list[Any]:
        return [ValueError(n) if n % 2 else n for n in items]

    with UBatch(2, 0.0, handler=handler, backend=world.backend) as ub:
        with pytest.raises(ValueError, match="1"):
            ub.map(range(4))
        ends = ub.map(range(4), return_exceptions=True)
    assert [0, 2] == [ends[0], ends[2]]
    assert [(1,), (3,)] == [e.args for e in ends if isinstance(e, ValueError)]


@pytest.mark.parametrize(
    "outputs",
    [
        lambda items: tuple(items),
        lambda items: numpy.array(items),
        lambda items: numpy.array([[n, n] for n in items])[:, 0],
        lambda items: range(items[0], items[0] + len(items)),
    ],
    ids=["tuple", "ndarray", "column", "range"],
)
def test_what_has_a_length_and_an_order_answers(world: World, outputs: Any) -> None:
    """The i-th element answers the i-th call, whatever holds it."""
    with UBatch(9, 0.0, handler=outputs, backend=world.backend) as ub:
        assert [5, 6, 7] == ub.map([5, 6, 7])


@pytest.mark.concurrency
def test_max_pending_refuses_at_once_and_says_the_numbers(world: World) -> None:
    """Over max_pending a call is refused, and those that wait are answered."""
    handler = Gated(world.gate())
    with UBatch(1, 0.0, handler=handler, backend=world.backend, max_pending=2) as ub:
        running = ub.submit(0)
        world.until(lambda: handler.batches)
        waiting = [ub.submit(n) for n in (1, 2)]
        with pytest.raises(QueueFull, match="2 calls waiting, max_pending=2") as full:
            ub.ubatch(3)
        assert (2, 2) == (full.value.pending, full.value.max_pending)
        assert full.value.retry_after > 0
        handler.gate.open()
        assert list("012") == [f.result(30) for f in (running, *waiting)]
        assert "4" == ub.ubatch(4)
        assert 1 == ub.stats().rejected_total


def test_the_default_executor_runs_the_handler_on_a_native_thread(
    hub: World,
) -> None:
    """On gevent the handler has a thread of its own, and greenlets run meanwhile."""
    handler = Gated(hub.gate())
    with UBatch(1, 0.0, handler=handler, backend="gevent") as ub:
        caller = hub.spawn(ub.ubatch, 1)
        hub.until(lambda: handler.batches)  # this greenlet runs while it is held
        handler.gate.open()
        assert "1" == caller.result()


def test_hub_threadpool_is_the_hubs_own(hub: World) -> None:
    """executor="hub_threadpool" runs on gevent.get_hub().threadpool."""
    try:
        with UBatch(
            1, 0.0, handler=Recorder(), backend="gevent", executor="hub_threadpool"
        ) as ub:
            assert "1" == ub.ubatch(1)
            assert gevent.get_hub().threadpool.size >= 1
            assert "hub_threadpool" == ub.stats().executor
        assert gevent.get_hub().threadpool.size >= 1  # stop() left it alone
    finally:
        gevent.get_hub().threadpool.kill()


def test_a_gevent_pool_of_the_users_is_used_and_left_open(hub: World) -> None:
    """executor=ThreadPool(...) runs there, and stop() does not close it."""
    pool = ThreadPool(1)
    try:
        with UBatch(1, 0.0, handler=Recorder(), backend="gevent", executor=pool) as ub:
            assert "1" == ub.ubatch(1)
        assert 1 == pool.size
    finally:
        pool.kill()


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_a_concurrent_futures_executor_is_used_and_left_open(
    world: World, kind: type[Executor]
) -> None:
    """Any concurrent.futures.Executor runs handlers; main may be the only caller."""
    with kind(1) as executor:  # type: ignore[call-arg]
        with UBatch(
            9, 0.0, handler=_doubled, backend=world.backend, executor=executor
        ) as ub:
            assert 4 == ub.ubatch(2)
            with pytest.raises(ZeroDivisionError):
                ub.ubatch(0)
            assert kind.__name__ == ub.stats().executor
        assert 3 == executor.submit(abs, -3).result()


def _doubled(items: list[int]) -> list[int]:
    return [item * 2 // item * item for item in items]


@pytest.mark.parametrize("executor", ["hub_threadpool", "pool"])
def test_threads_refuse_an_executor_that_needs_a_hub(
    threads: World, executor: Any
) -> None:
    """On threads a gevent executor is refused by name, at the first call."""
    pool = ThreadPool(1)
    option = pool if executor == "pool" else executor
    ub = UBatch(1, 0.0, handler=Recorder(), backend="thread", executor=option)
    try:
        with pytest.raises(BackendError, match="needs the gevent backend"):
            ub.start().ubatch(1)
    finally:
        pool.kill()  # on libuv, one that is just dropped corrupts memory


def test_threads_run_the_handler_on_a_worker_thread(threads: World) -> None:
    """On threads the handler runs on the batcher's own daemon thread."""
    seen = []

    def handler(items: list[int]) -> list[int]:
        seen.append(threading.current_thread())
        return items

    with UBatch(1, 0.0, handler=handler, backend="thread") as ub:
        ub.ubatch(1)
    assert seen[0].daemon
    assert seen[0] is not threading.current_thread()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_context_variables_do_not_leak_between_batches(
    world: World, executor: Any
) -> None:
    """What one batch sets in a context variable, the next does not see."""
    from contextvars import ContextVar

    variable: ContextVar[int] = ContextVar("variable", default=0)

    def handler(items: list[int]) -> list[int]:
        before = variable.get()
        variable.set(before + 1)
        return [before for _ in items]

    with UBatch(
        1, 0.0, handler=handler, backend=world.backend, executor=executor
    ) as ub:
        assert [0, 0, 0] == [ub.ubatch(n) for n in range(3)]
