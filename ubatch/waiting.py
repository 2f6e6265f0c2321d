"""Which batches wait, and which of them should close?

Plain data, without a lock: the collector holds its own around every use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf

from ubatch.batch import Batch, Shape
from ubatch.policy import Decision, Look, Pace, Rules, decide


class Waiting:
    """The batches that no worker has, in order of opening.

    Invariant: ``open[shape]`` is the one of them that still takes calls of that
    shape; it is not full.
    """

    __slots__ = ("open", "_batches")

    def __init__(self) -> None:
        self.open: dict[Shape, Batch] = {}
        self._batches: dict[Batch, None] = {}  # an ordered set

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch) -> None:
        """Take a new batch in, open for calls of its shape."""
        self._batches[batch] = None
        self.open[batch.shape] = batch

    def remove(self, batch: Batch) -> None:
        """Let a batch go, to a worker or because nobody waits for it."""
        self._batches.pop(batch, None)
        if self.open.get(batch.shape) is batch:
            del self.open[batch.shape]

    def observe_turn(self) -> None:
        """Note which batches grew while the backend took a turn."""
        for batch in self._batches:
            batch.observe_turn()

    def choose(
        self,
        rules: Rules,
        now: float,
        newest: float,
        stopping: bool,
        pace: Callable[[float], Pace | None],
        spare: Callable[[float, float, float], float],
    ) -> tuple[Batch | None, Decision]:
        """Find the first batch that should close, and why; else when to look again.

        *newest* is when the last call came.
        *pace* is asked only about a batch that could grow, *spare* only about one
        with a deadline.
        """
        look_again = inf
        for batch in self._batches:
            growing = self.open.get(batch.shape) is batch
            soonest = batch.soonest
            decision = decide(
                rules,
                Look(
                    len(batch.calls),
                    now - batch.opened,
                    batch.quiet_turns,
                    growing,
                    stopping,
                    pace(now) if growing else None,
                    inf if soonest == inf else spare(soonest, batch.opened, now),
                    now - newest,
                ),
            )
            if decision.reason is not None:
                return batch, decision
            look_again = min(look_again, decision.look_again)
        return None, Decision(None, look_again)
