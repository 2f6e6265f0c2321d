"""Which batches wait, and which of them should close?

Plain data, without a lock: the collector holds its own around every use.
"""

from __future__ import annotations

from collections.abc import Iterator

from ubatch.batch import Batch, Caller, Shape
from ubatch.options import SHORTEST_WAIT
from ubatch.policy import TURN, Look, Reason, Rules, decide


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

    def expired(self, now: float) -> Iterator[tuple[Batch, Caller]]:
        """Go through the calls whose deadline has passed."""
        for batch in [batch for batch in self._batches if batch.deadlines]:
            for caller, (deadline, _) in list(batch.deadlines.items()):
                if deadline <= now:
                    yield batch, caller

    def choose(
        self, rules: Rules, now: float, stopping: bool
    ) -> tuple[tuple[Batch, Reason] | None, float | None]:
        """Find the first batch that should close, and why; else when to look again.

        None for a time means that nothing waits.
        """
        look_again: float | None = None
        for batch in self._batches:
            look = Look(
                size=len(batch.calls),
                age=now - batch.opened,
                quiet_turns=batch.quiet_turns,
                growing=self.open.get(batch.shape) is batch,
                stopping=stopping,
            )
            reason, wait = decide(rules, look)
            if reason is not None:
                return (batch, reason), None
            if batch.deadlines and wait != TURN:
                left = min(batch.deadlines.values())[0] - now
                wait = min(wait, max(left, SHORTEST_WAIT))
            if look_again is None or wait < look_again:
                look_again = wait
        return None, look_again
