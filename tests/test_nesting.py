"""May a handler call batchers, and is it told when it would wait for itself?"""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import World
from ubatch import DeadlineExceeded, UBatch, UBatchError

EXECUTORS = ["threadpool", "inline"]


def options(world: World, executor: str, **more: Any) -> dict[str, Any]:
    return {"backend": world.backend, "executor": executor, **more}


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_handler_may_call_another_batcher(world: World, executor: str) -> None:
    """A handler's call to another batcher is batched there, and answered."""
    inner: UBatch[int, int] = UBatch(
        9,
        0.0,
        handler=lambda xs: [x + 1 for x in xs],
        **options(world, executor),
    )
    outer: UBatch[int, int] = UBatch(
        9, 0.0, handler=lambda xs: inner.map(xs), **options(world, executor)
    )
    with inner, outer:
        callers = [world.spawn(outer.ubatch, n) for n in range(20)]
        assert [n + 1 for n in range(20)] == [c.result() for c in callers]


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("way", ["ubatch", "submit", "map"])
def test_a_handler_that_waits_for_itself_is_refused(
    world: World, executor: str, way: str
) -> None:
    """workers=1 and its own batcher: a clear error at once, and no hang."""

    def handler(items: list[int]) -> list[int]:
        if way == "submit":
            future = ub.submit(items[0])
            try:
                return [future.result()]
            finally:
                future.cancel()
        if way == "map":
            return ub.map(items)
        return [ub.ubatch(item) for item in items]

    ub: UBatch[int, int] = UBatch(9, 0.0, handler=handler, **options(world, executor))
    with ub:
        with pytest.raises(UBatchError, match="cannot come before it returns.*workers"):
            ub.ubatch(1)
        world.until(lambda: ub.stats().pending + ub.stats().running == 0)


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", EXECUTORS)
def test_with_more_workers_a_handler_may_call_its_own_batcher(
    world: World, executor: str
) -> None:
    """It is answered where a worker is free, and refused where none can be."""

    def handler(items: list[int]) -> list[int]:
        return [0 if n == 0 else 1 + ub.ubatch(n - 1) for n in items]

    ub: UBatch[int, int] = UBatch(
        1, 0.0, handler=handler, **options(world, executor, workers=4)
    )
    with ub:
        assert 3 == ub.ubatch(3)
        with pytest.raises(UBatchError, match="every worker"):
            ub.ubatch(4)


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", EXECUTORS)
def test_two_handlers_that_wait_for_each_other_are_refused(
    world: World, executor: str
) -> None:
    """A ring of batchers ends in an error for one of them, never in a hang."""
    entered: list[str] = []

    def ask(mine: str, other: UBatch[str, str]) -> Any:
        def handler(items: list[str]) -> list[str]:
            if items == ["leaf"]:
                return items
            entered.append(mine)
            world.until(lambda: len(entered) >= 2)
            return [other.ubatch("leaf")]

        return handler

    left: UBatch[str, str] = UBatch(1, 0.0, **options(world, executor))
    right: UBatch[str, str] = UBatch(1, 0.0, **options(world, executor))
    left.set_handler(ask("left", right))
    right.set_handler(ask("right", left))
    with left, right:
        callers = [world.spawn(b.ubatch, "root") for b in (left, right)]
        ends = []
        for caller in callers:
            caller.join()
            assert caller.ended
            ends.append(type(caller.error))
    assert UBatchError in ends


def test_a_handler_may_submit_to_its_own_batcher_without_waiting(
    world: World,
) -> None:
    """Only waiting is refused: follow-up work may be left for the next batch."""
    seen: list[int] = []

    def handler(items: list[int]) -> list[int]:
        seen.extend(items)
        for item in items:
            if item:
                ub.submit(item - 1)
        return items

    ub: UBatch[int, int]
    ub = UBatch(9, 0.0, handler=handler, **options(world, "threadpool"))
    with ub:
        assert 3 == ub.ubatch(3)
        world.until(lambda: seen == [3, 2, 1, 0])


def test_a_handler_that_stops_its_own_batcher_is_refused(world: World) -> None:
    """stop() from inside would wait for itself; it says so."""
    ub: UBatch[int, int] = UBatch(9, 0.0, backend=world.backend)  # type: ignore

    def handler(items: list[int]) -> list[int]:
        ub.stop()
        return items

    ub.set_handler(handler)
    with ub:
        with pytest.raises(UBatchError, match="waits for the handler"):
            ub.ubatch(1)


@pytest.mark.concurrency
def test_a_callback_that_calls_its_own_batcher_never_hangs(world: World) -> None:
    """It is answered on gevent; on threads, where it holds the worker, refused."""
    ends: list[Any] = []

    def callback(_: Any) -> None:
        try:
            ends.append(ub.ubatch(2))
        except UBatchError as error:
            ends.append(error)

    ub: UBatch[int, int]
    ub = UBatch(1, 0.0, handler=lambda xs: xs, **options(world, "threadpool"))
    with ub:
        ub.submit(1).add_done_callback(callback)
        world.until(lambda: ends)
    assert ends == [2] or isinstance(ends[0], UBatchError)


@pytest.mark.concurrency
def test_a_stuck_handler_is_no_worker_to_wait_for(world: World) -> None:
    """Beside one, a handler that waits for itself is refused at once, as ever."""
    gate = world.gate()

    def handler(items: list[str]) -> list[str]:
        if items == ["stuck"]:
            gate.wait()
        if items == ["outer"]:
            return [ub.ubatch("inner")]
        return items

    ub: UBatch[str, str] = UBatch(
        1, 0.0, handler=handler, backend=world.backend, handler_timeout=0.5
    )
    with ub:
        with pytest.raises(DeadlineExceeded):
            ub.ubatch("stuck")
        with pytest.raises(UBatchError, match="cannot come before it returns"):
            ub.ubatch("outer")
        gate.open()
        world.until(lambda: not ub.stats().stuck)
