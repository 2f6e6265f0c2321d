"""What happens when a caller goes away?"""

from __future__ import annotations

import gc
import time
import tracemalloc
from concurrent.futures import CancelledError

import gevent
import pytest

from tests.fakes import Gated, World
from ubatch import DeadlineExceeded, UBatch
from ubatch.batch import Batch
from ubatch.future import Future


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", ["threadpool", "inline"])
def test_a_caller_killed_while_queued_never_reaches_the_handler(
    hub: World, executor: str
) -> None:
    """kill() of a waiting caller takes its item out, and harms nobody else."""
    handler = Gated(hub.gate(executor))
    with UBatch(
        9, 0.0, handler=handler, backend="gevent", executor=executor  # type: ignore
    ) as ub:
        first = hub.spawn(ub.ubatch, 0)
        hub.until(lambda: handler.batches)
        callers = [hub.spawn(ub.ubatch, n) for n in range(1, 5)]
        hub.until(lambda: ub.stats().pending == 4)
        callers[1].greenlet.kill()  # type: ignore[attr-defined]
        assert 3 == ub.stats().pending
        handler.gate.open()
        assert list("0134") == [
            c.result() for c in (first, callers[0], callers[2], callers[3])
        ]
        assert 1 == ub.stats().cancelled_total
    assert [[0], [1, 3, 4]] == handler.batches
    assert isinstance(callers[1].error, gevent.GreenletExit)


@pytest.mark.concurrency
def test_a_batch_whose_callers_have_all_left_is_never_run(hub: World) -> None:
    """The handler is not called for nobody."""
    handler = Gated(hub.gate())
    with UBatch(9, 0.0, handler=handler, backend="gevent") as ub:
        first = hub.spawn(ub.ubatch, "first")
        hub.until(lambda: handler.batches)
        callers = [hub.spawn(ub.ubatch, n) for n in range(3)]
        hub.until(lambda: ub.stats().pending == 3)
        gevent.killall([c.greenlet for c in callers])  # type: ignore[attr-defined]
        handler.gate.open()
        assert "first" == first.result()
        assert "last" == ub.ubatch("last")
    assert [["first"], ["last"]] == handler.batches


@pytest.mark.concurrency
def test_a_caller_killed_while_running_harms_nobody_in_its_batch(
    hub: World,
) -> None:
    """A running batch is not interrupted; the others get their answers."""
    handler = Gated(hub.gate())
    with UBatch(3, 9.0, handler=handler, backend="gevent", linger="full") as ub:
        callers = [hub.spawn(ub.ubatch, n) for n in range(3)]
        hub.until(lambda: handler.batches)
        callers[0].greenlet.kill()  # type: ignore[attr-defined]
        handler.gate.open()
        assert ["1", "2"] == [c.result() for c in callers[1:]]
        seen = ub.stats()
    assert (2, 1, 0, 0) == (
        seen.results_total,
        seen.cancelled_total,
        seen.pending,
        seen.running,
    )


@pytest.mark.concurrency
def test_a_caller_killed_in_the_tick_of_its_answer_ends_once(hub: World) -> None:
    """Answer and kill in one turn of the loop: one end, and the counts add up."""
    with UBatch(
        2,
        9.0,
        handler=lambda xs: xs,
        backend="gevent",
        executor="inline",
        linger="full",
    ) as ub:
        for _ in range(50):
            caller = hub.spawn(ub.ubatch, 1)
            hub.until(lambda: ub.stats().pending == 1)
            other = ub.submit(2)
            # The callback runs in the hub, right after the batch was settled and
            # before the caller has been switched to.
            killed = caller.greenlet  # type: ignore[attr-defined]
            other.add_done_callback(lambda _: None)
            other.rawlink(lambda _: killed.kill(block=False))  # type: ignore
            assert 2 == other.result(30)
            caller.join()
            assert caller.value == 1 or isinstance(caller.error, gevent.GreenletExit)
        seen = ub.stats()
    assert seen.calls_total == seen.results_total + seen.cancelled_total == 100
    assert (0, 0) == (seen.pending, seen.running)


@pytest.mark.concurrency
def test_a_callers_timeout_reaches_it_as_itself(hub: World) -> None:
    """gevent.Timeout around a call raises that very Timeout, and frees the place."""
    handler = Gated(hub.gate())
    with UBatch(1, 0.0, handler=handler, backend="gevent") as ub:
        first = hub.spawn(ub.ubatch, 0)
        hub.until(lambda: handler.batches)
        mine = gevent.Timeout(0.01)
        with pytest.raises(gevent.Timeout) as caught, mine:
            ub.ubatch(1)
        assert caught.value is mine
        assert 0 == ub.stats().pending
        handler.gate.open()
        first.result()
    assert [[0]] == handler.batches


@pytest.mark.concurrency
def test_cancel_while_queued_keeps_the_item_from_the_handler(world: World) -> None:
    """Future.cancel() of a waiting call is final, and wakes who waits for it."""
    handler = Gated(world.gate())
    with UBatch(9, 0.0, handler=handler, backend=world.backend) as ub:
        first = ub.submit(0)
        world.until(lambda: handler.batches)
        future, other = ub.submit(1), ub.submit(2)
        waiter = world.spawn(future.result, 30)
        world.until(lambda: future._links)
        assert future.cancel()
        assert future.cancel()
        assert future.cancelled() and future.done()
        with pytest.raises(CancelledError):
            waiter.result()
        with pytest.raises(CancelledError):
            future.exception()
        handler.gate.open()
        assert ["0", "2"] == [first.result(30), other.result(30)]
    assert [[0], [2]] == handler.batches


@pytest.mark.concurrency
def test_cancel_while_running_or_done_is_refused(world: World) -> None:
    """What the handler has cannot be cancelled, and its result arrives."""
    handler = Gated(world.gate())
    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        future = ub.submit(1)
        world.until(lambda: handler.batches)
        assert future.running()
        assert not future.cancel()
        handler.gate.open()
        assert "1" == future.result(30)
        assert not future.cancel() and not future.cancelled()


@pytest.mark.concurrency
def test_a_call_that_expires_while_queued_is_answered_and_not_run(
    world: World,
) -> None:
    """DeadlineExceeded comes while every worker is busy, also to a batch's first."""
    handler = Gated(world.gate())
    with UBatch(9, 0.0, handler=handler, backend=world.backend) as ub:
        first = ub.submit(0)
        world.until(lambda: handler.batches)
        soon = ub.with_options(deadline=0.02)
        with pytest.raises(DeadlineExceeded, match="0.02 seconds"):
            soon.ubatch(1)
        with pytest.raises(TimeoutError):
            soon.submit(2).result()
        with pytest.raises(DeadlineExceeded):
            soon.map([3, 4])
        assert 0 == ub.stats().pending
        handler.gate.open()
        first.result(30)
        assert "5" == ub.with_options(deadline=30).ubatch(5)
        seen = ub.stats()
    assert 4 == seen.expired_total + seen.cancelled_total
    assert [[0], [5]] == handler.batches


@pytest.mark.concurrency
def test_a_call_that_expires_while_running_is_answered_too(world: World) -> None:
    """A caller with a deadline does not wait for a handler that is late."""
    handler = Gated(world.gate())
    with UBatch(9, 0.0, handler=handler, backend=world.backend, deadline=0.02) as ub:
        with pytest.raises(DeadlineExceeded):
            ub.ubatch(1)
        handler.gate.open()
        world.until(lambda: ub.stats().running == 0)
        assert 1 == ub.stats().expired_total


@pytest.mark.concurrency
def test_an_expired_future_nobody_waited_for_never_runs(world: World) -> None:
    """A worker that frees drops what has expired, and tells its callbacks."""
    handler = Gated(world.gate())
    told: list[Future[str]] = []
    with UBatch(9, 0.0, handler=handler, backend=world.backend) as ub:
        first = ub.submit(0)
        world.until(lambda: handler.batches)
        future = ub.with_options(deadline=0.001).submit(1)
        future.add_done_callback(told.append)
        gevent.sleep(0.01) if world.is_gevent else time.sleep(0.01)
        handler.gate.open()
        first.result(30)
        world.until(lambda: told)
        assert isinstance(future.exception(), DeadlineExceeded)
    assert [[0]] == handler.batches


@pytest.mark.concurrency
def test_ten_thousand_killed_callers_leave_nothing_behind(hub: World) -> None:
    """Counts return to zero and memory is flat, also while a handler is stuck."""
    handler = Gated(hub.gate())
    with UBatch(64, 0.0, handler=handler, backend="gevent", name="killed") as ub:
        first = hub.spawn(ub.ubatch, 0)
        hub.until(lambda: handler.batches)

        def kill_some(count: int) -> None:
            for _ in range(count // 100):
                callers = [hub.spawn(ub.ubatch, object()) for _ in range(100)]
                hub.until(lambda: ub.stats().pending == 100)
                gevent.killall([c.greenlet for c in callers])  # type: ignore
                assert 0 == ub.stats().pending

        kill_some(1000)
        gc.collect()
        tracemalloc.start()
        try:
            kill_some(1000)
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            kill_some(8000)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 20_000  # bytes, for 8000 calls
        batches = [found for found in gc.get_objects() if isinstance(found, Batch)]
        assert 1 == sum(batch.collector.name == "killed" for batch in batches)
        handler.gate.open()
        first.result()
        seen = ub.stats()
    assert (10_000, 1, 0, 0) == (
        seen.cancelled_total,
        seen.results_total,
        seen.pending,
        seen.running,
    )
    assert [[0]] == handler.batches


def test_items_and_results_are_let_go_when_they_are_delivered(world: World) -> None:
    """Nothing keeps a finished call's item or result alive."""
    handler = lambda items: [[item] for item in items]  # noqa: E731
    with UBatch(9, 0.0, handler=handler, backend=world.backend) as ub:
        item = object()
        result = ub.ubatch(item)
        assert result == [item]
        del result
        world.until(lambda: len(gc.get_referrers(item)) <= 1)
