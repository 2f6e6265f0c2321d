"""Does a Future keep the promises of concurrent.futures, and of gevent?"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import gevent
import pytest

from tests.fakes import Gated, Recorder, World
from ubatch import Future, UBatch


@pytest.mark.concurrency
def test_result_waits_and_can_be_asked_again(world: World) -> None:
    """result() blocks until the answer is there, and keeps it."""
    handler = Gated(world.gate())
    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        future = ub.submit(1)
        waiters = [world.spawn(future.result) for _ in range(3)]
        world.until(lambda: len(future._links) == 3)
        assert not future.done()
        handler.gate.open()
        assert ["1", "1", "1"] == [w.result() for w in waiters]
        assert future.done() and not future.running()
        assert "1" == future.result() and future.exception() is None


@pytest.mark.concurrency
def test_a_wait_that_times_out_leaves_the_call_alone(world: World) -> None:
    """TimeoutError ends the wait, not the call; no waiter is left registered."""
    handler = Gated(world.gate())
    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        future = ub.submit(1)
        for wait in (future.result, future.exception):
            with pytest.raises(TimeoutError, match="0.01 seconds"):
                wait(0.01)
        assert [] == future._links
        handler.gate.open()
        assert "1" == future.result(30)


def test_exception_returns_what_result_raises(world: World) -> None:
    """exception() hands the error out; result() raises one like it."""

    def handler(items: list[int]) -> list[int]:
        raise LookupError("none")

    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        future = ub.submit(1)
        assert "none" == str(future.exception(30))
        with pytest.raises(LookupError):
            future.result()


@pytest.mark.concurrency
def test_callbacks_run_once_before_and_after_the_end(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Every callback is called with the future; one that raises harms nobody."""
    handler = Gated(world.gate())
    told: list[Any] = []
    with UBatch(2, 9.0, handler=handler, backend=world.backend) as ub:
        future, other = ub.submit(1), ub.submit(2)
        future.add_done_callback(lambda f: 1 // 0)
        future.add_done_callback(told.append)
        handler.gate.open()
        world.until(lambda: told)
        future.add_done_callback(told.append)
        assert [future, future] == told
        assert "2" == other.result(30)
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert ["Gated: a done callback raised"] == [r.getMessage() for r in errors]


def test_a_callback_that_blocks_does_not_hold_up_the_batcher(hub: World) -> None:
    """On gevent a callback has a greenlet of its own."""
    gate = hub.gate("inline")
    with UBatch(1, 0.0, handler=Recorder(), backend="gevent") as ub:
        future = ub.submit(1)
        future.add_done_callback(lambda _: gate.wait())
        assert "1" == future.result(30)
        assert "2" == ub.ubatch(2)
        gate.open()


@pytest.mark.concurrency
def test_gevent_wait_and_iwait_take_our_futures(hub: World) -> None:
    """gevent.wait() returns the futures themselves, before and after the end."""
    with UBatch(4, 0.0, handler=Recorder(), backend="gevent") as ub:
        futures: list[Future[str]] = [ub.submit(n) for n in range(10)]
        assert set(futures) == set(gevent.wait(futures, timeout=30))
        assert set(futures) == set(gevent.iwait(futures, timeout=30))


def test_unlink_takes_a_link_back(hub: World) -> None:
    """A callback that was unlinked is not called."""
    handler = Gated(hub.gate())
    told: list[Any] = []
    with UBatch(1, 0.0, handler=handler, backend="gevent") as ub:
        future: Any = ub.submit(1)
        future.rawlink(told.append)
        kept: list[Any] = []
        future.rawlink(kept.append)
        future.unlink(told.append)
        handler.gate.open()
        hub.until(lambda: kept)
    assert [] == told and [future] == kept


def test_a_future_nobody_keeps_still_runs(world: World) -> None:
    """submit() and forget: the handler gets the item."""
    handler = Recorder()
    with UBatch(9, 0.0, handler=handler, backend=world.backend) as ub:
        ub.submit(1)
        world.until(lambda: handler.batches)
    assert [[1]] == handler.batches


def test_a_future_is_let_go_once_its_callback_has_run(world: World) -> None:
    """What runs callbacks keeps neither the last of them nor its future's result."""

    class Item:
        pass

    called: list[bool] = []
    item = Item()
    gone = weakref.ref(item)
    with UBatch(1, 0.0, handler=list, backend=world.backend) as ub:
        future = ub.submit(item)
        future.add_done_callback(lambda _: called.append(True))
        assert item is future.result(30)
        world.until(lambda: called == [True])
        del future, item

        world.until(lambda: gone() is None)
