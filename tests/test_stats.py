"""Do the numbers tell what happened?"""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from tests.fakes import Gated, Recorder, World
from tests.forcing import before
from ubatch import Stats, UBatch
from ubatch.stats import Counters


def test_a_snapshot_is_complete_before_the_first_call() -> None:
    """stats() works on a batcher that has not run, and creates nothing."""
    ub = UBatch(1, 0.0, handler=Recorder(), name="model")
    seen = ub.stats()
    assert ("model", None, "threadpool") == (seen.name, seen.backend, seen.executor)
    assert (0, 0, 0.0) == (seen.calls_total, seen.batches_total, seen.mean_batch_size)


@pytest.mark.concurrency
def test_the_numbers_add_up_at_every_moment(world: World) -> None:
    """calls = results + failures + cancelled + expired + pending + running."""

    def answer(n: int) -> object:
        return ValueError(n) if n == 2 else n

    handler = Gated(world.gate(), answer)

    def total(seen: Stats) -> int:
        ended = seen.results_total + seen.failures_total
        ended += seen.cancelled_total + seen.expired_total
        return ended + seen.pending + seen.running

    with UBatch(3, 9.0, handler=handler, backend=world.backend, linger="full") as ub:
        futures = [ub.submit(n) for n in range(3)]
        world.until(lambda: handler.batches)
        futures += [ub.submit(n) for n in range(3, 5)]
        seen = ub.stats()
        assert (5, 3, 2) == (seen.calls_total, seen.running, seen.pending)
        futures[4].cancel()
        assert 5 == total(ub.stats())
        futures.append(ub.submit(5))
        handler.gate.open()
        world.until(lambda: futures[2].done())
        seen = ub.stats()
        assert 6 == total(seen)
        assert (2, 1, 1) == (
            seen.results_total,
            seen.failures_total,
            seen.cancelled_total,
        )
    last = ub.stats()
    assert 6 == total(last)
    assert (4, 0, 0) == (last.results_total, last.pending, last.running)
    assert {3: 1, 2: 1} == last.batch_sizes
    assert 2.5 == last.mean_batch_size
    assert {"full": 1, "stop": 1} == last.dispatch_reasons
    assert last.handler_seconds > 0 and last.queued_seconds > 0


def test_a_snapshot_is_frozen(world: World) -> None:
    """What was read does not change, and cannot be changed."""
    with UBatch(1, 0.0, handler=Recorder(), backend=world.backend) as ub:
        ub.ubatch(1)
        seen = ub.stats()
        ub.ubatch(2)
    assert (1, {1: 1}) == (seen.calls_total, seen.batch_sizes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.calls_total = 5  # type: ignore[misc]
    seen.batch_sizes[1] = 5  # a copy, which plain JSON takes
    assert {1: 2} == ub.stats().batch_sizes
    assert json.loads(json.dumps(dataclasses.asdict(seen)))["calls_total"] == 1
    assert seen == copy.deepcopy(seen)


def test_stats_add_up_while_a_call_ends(hub: World) -> None:
    """From a native thread too, which no lock of a hub's keeps from looking."""
    ub = UBatch(9, 60.0, handler=Recorder(), backend="gevent", linger="full").start()
    future = ub.submit(1)
    with before(Counters.snapshot, "pending, running =", future.cancel):
        seen = ub.stats()
    ended = seen.results_total + seen.failures_total
    ended += seen.cancelled_total + seen.expired_total
    assert seen.calls_total == ended + seen.pending + seen.running
    ub.stop()
