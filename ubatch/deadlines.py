"""Which calls are out of time, and when must one look again?

Plain data, without a lock or a clock: the collector holds its own around every use.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Protocol

from ubatch.batch import Batch, Caller


class Alarm(Protocol):
    """Rings once, at the last moment it was set for."""

    def set(self, at: float) -> object:
        """Ring at *at*, by ``monotonic()``, and not before; forget what was set.

        Raises:
            RuntimeError: It cannot be started.
        """

    def clear(self) -> object:
        """Do not ring."""

    def close(self) -> object:
        """Do not ring any more."""


class Deadlines:
    """The deadlines of the batches that wait or run, and one alarm for them all.

    An alarm for each call would cost it a microsecond of the two that it takes.

    Owner: as the collector's, whose lock guards this too.
    Invariant: the alarm is set no later than ``soonest`` says of any batch in here.
    A batch's own ``soonest`` may be earlier than what is left in it: then one looks
    for nothing, once.
    """

    def __init__(self, alarm: Alarm, lead: Callable[[float], float]) -> None:
        self.next = inf  # when the alarm rings
        self._alarm = alarm
        # How many seconds before its deadline a call that waits can make it no more.
        self._lead = lead
        self._batches: dict[Batch, None] = {}  # those with a deadline; an ordered set

    def note(self, batch: Batch, at: float, now: float) -> None:
        """Take note that something in *batch* is out of time at *at*.

        Raises:
            RuntimeError: The alarm cannot be started.
        """
        if at >= batch.soonest:
            return
        look_at = at if batch.running else at - self._lead(now)
        if look_at < self.next:
            self._alarm.set(look_at)
            self.next = look_at
        batch.soonest = at
        self._batches[batch] = None

    def forget(self, batch: Batch) -> None:
        """Let a batch go that is settled, or that nobody waits for."""
        if not self._batches:
            return
        self._batches.pop(batch, None)
        if not self._batches:
            self._alarm.clear()
            self.next = inf

    def rang(self) -> None:
        """Take note that the alarm has rung, whenever it did: a timer may hurry."""
        self.next = -inf

    def close(self) -> None:
        """Let go of the alarm."""
        self._alarm.close()

    def due(self, now: float) -> tuple[list[tuple[Batch, list[Caller]]], list[Batch]]:
        """Return the calls that are out of time, by batch, and the batches that are.

        Sets the alarm for the next look.
        """
        lead = self._lead(now)
        calls: list[tuple[Batch, list[Caller]]] = []
        whole: list[Batch] = []
        look_at = inf
        for batch in self._batches:
            ahead = 0.0 if batch.running else lead
            if batch.soonest - ahead <= now:
                if batch.limit <= now:
                    whole.append(batch)
                    continue
                callers: list[Caller] = []
                batch.soonest = batch.limit
                for caller, (at, _) in batch.deadlines.items():
                    if at - ahead <= now:
                        callers.append(caller)
                    elif at < batch.soonest:
                        batch.soonest = at
                if callers:
                    calls.append((batch, callers))
            look_at = min(look_at, batch.soonest - ahead)
        self.next = look_at
        if look_at < inf:
            self._alarm.set(look_at)
        return calls, whole
