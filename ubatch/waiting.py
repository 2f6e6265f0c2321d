"""Which batches wait, and which of them should close?

Plain data, without a lock: the collector holds its own around every use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf

from ubatch.batch import Batch, Caller, Shape
from ubatch.policy import Decision, Look, Pace, Rules, decide


class Waiting:
    """The batches that no worker has, in order of opening.

    Invariant: ``open[shape]`` is the one of them that still takes calls of that
    shape; it is not full.
    """

    __slots__ = ("open", "_batches", "soonest")

    def __init__(self) -> None:
        self.open: dict[Shape, Batch] = {}
        self._batches: dict[Batch, None] = {}  # an ordered set
        self.soonest = inf  # no deadline of theirs is earlier than this

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

    def take_all(self) -> list[Batch]:
        """Let all batches go."""
        batches = list(self._batches)
        self._batches.clear()
        self.open.clear()
        return batches

    def observe_turn(self) -> None:
        """Note which batches grew while the backend took a turn."""
        for batch in self._batches:
            batch.observe_turn()

    def expired(self, now: float) -> list[tuple[Batch, Caller]]:
        """Return the calls whose deadline has passed."""
        due: list[tuple[Batch, Caller]] = []
        self.soonest = inf
        for batch in self._batches:
            for caller, (deadline, _) in batch.deadlines.items():
                if deadline <= now:
                    due.append((batch, caller))
                elif deadline < self.soonest:
                    self.soonest = deadline
        return due

    def choose(
        self,
        rules: Rules,
        now: float,
        stopping: bool,
        pace: Callable[[float], Pace | None],
    ) -> tuple[Batch | None, Decision]:
        """Find the first batch that should close, and why; else when to look again.

        *pace* is asked only about a batch that could grow.
        """
        look_again = self.soonest - now if self._batches else inf
        for batch in self._batches:
            growing = self.open.get(batch.shape) is batch
            decision = decide(
                rules,
                Look(
                    len(batch.calls),
                    now - batch.opened,
                    batch.quiet_turns,
                    growing,
                    stopping,
                    pace(now) if growing else None,
                ),
            )
            if decision.reason is not None:
                return batch, decision
            look_again = min(look_again, decision.look_again)
        return None, Decision(None, look_again)
