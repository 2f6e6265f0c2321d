"""What did the handlers do with each batch, and was that as promised?

Every run of a handler is in the journal, by the names of its requests, each of which
is in one batch alone: so runs that have a name in common are of the same batch. Those
in another process are a further attempt, at what was lost with a model process.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from math import ceil, log2
from typing import Any

from tests.chaos.client import Request
from tests.chaos.journal import Run
from tests.chaos.plan import BATCHERS, FAULTS

LAG = 0.5
"""Seconds by which a busy worker may be late to begin a run, or to hear of its end."""


class Batch:
    """One batch, and the runs that it took."""

    def __init__(self, whole: Run) -> None:
        self.names = whole.names
        self.batcher = whole.batcher
        self.pid = whole.pid
        self.began = whole.began
        self.attempts = [[whole]]

    @property
    def runs(self) -> list[Run]:
        """Those of the last attempt."""
        return self.attempts[-1]

    @property
    def ended(self) -> float:
        """When the last of its runs did."""
        return self.runs[-1].ended

    def add(self, run: Run) -> None:
        """Take one more in."""
        if run.pid == self.runs[-1].pid:
            self.runs.append(run)
        else:
            self.attempts.append([run])

    @property
    def limit(self) -> float:
        """When its handler has run too long."""
        return self.began + BATCHERS[self.batcher].limit


class Batches:
    """All batches of a trial."""

    def __init__(self, runs: Iterable[Run], requests: Mapping[str, Request]) -> None:
        self._requests = requests
        self.of: dict[str, Batch] = {}
        """The batch of each request that came as far as a handler."""
        self.all: list[Batch] = []
        for run in runs:
            if run.names[0] in self.of:
                self.of[run.names[0]].add(run)
                continue
            self.all.append(Batch(run))
            self.of.update(dict.fromkeys(run.names, self.all[-1]))

    def culprits(self, name: str, error: str) -> set[str]:
        """Return who may have made the batch of a request fail with an error."""
        batch = self.of.get(name)
        if batch is None:
            return set()
        return {one for one in batch.names if self._error_of(one) == error}

    def ended_before(self, name: str, at: float) -> bool:
        """Tell whether the answer of a request was there at some time."""
        batch = self.of.get(name)
        return batch is not None and batch.ended < at

    def in_vain(self, name: str) -> bool:
        """Tell whether as many runs as one bad call may cost have all failed."""
        batch = self.of[name]
        most = 2 * ceil(log2(len(batch.names))) + 1
        first = batch.runs[:most]
        return len(first) == most and all(any(self._bad(run.names)) for run in first)

    def run_too_often(self, lost: Container[int] = ()) -> int:
        """Return how many batches were run more often than is promised.

        Args:
            lost: Model processes that were killed: what they had may be run again.
        """
        return sum(self._too_often(batch, lost) for batch in self.all)

    def hangs(self, batch: Batch) -> bool:
        """Tell whether its handler was to hang."""
        return any(self._requests[name].fault == "hang" for name in batch.names)

    def all_stuck(self, pid: int, batcher: str, began: float, ended: float) -> bool:
        """Tell whether no worker can have been free at some moment between the two."""
        if BATCHERS[batcher].models:
            return False  # those are killed
        stuck = sum(
            (batch.pid, batch.batcher) == (pid, batcher)
            and batch.limit - LAG < ended
            and batch.ended + LAG > began
            for batch in self.all
        )
        return stuck >= 2 * BATCHERS[batcher].workers

    def hung(self, pulses: Mapping[int, list[dict[str, Any]]]) -> tuple[int, int]:
        """Return how many ran past the limit, and how many of them were not noticed."""
        hung: Counter[tuple[int, str]] = Counter()
        for batch in self.all:  # but for those in model processes, which tell nothing
            told = pulses[batch.pid][-1]["at"] if batch.pid in pulses else 0.0
            if batch.limit + LAG < min(batch.ended, told):
                hung[batch.pid, batch.batcher] += 1
        missed = sum(
            max(0, many - pulses[pid][-1]["found_stuck"][batcher])
            for (pid, batcher), many in hung.items()
        )
        return sum(hung.values()), missed

    def replaced(self) -> int:
        """Return how many batches ran while another kept the only worker."""
        kept: dict[tuple[int, str], list[Batch]] = defaultdict(list)
        for batch in self.all:
            kind = BATCHERS[batch.batcher]
            if batch.ended > batch.limit and kind.workers == 1 and not kind.models:
                kept[batch.pid, batch.batcher].append(batch)
        return sum(
            any(
                other.began < batch.began < other.ended
                for other in kept[batch.pid, batch.batcher]
            )
            for batch in self.all
        )

    def _too_often(self, batch: Batch, lost: Container[int]) -> bool:
        if len(batch.attempts) > 1:
            first, *more = batch.attempts
            if not BATCHERS[batch.batcher].retry or more[1:]:
                return True
            if first[0].pid not in lost:
                return True
        most = self._most_runs(batch)
        return any(len(attempt) > most for attempt in batch.attempts)

    def _most_runs(self, batch: Batch) -> float:
        if BATCHERS[batch.batcher].on_error == "fail":
            return 1
        return 2 * sum(self._bad(batch.names)) * log2(len(batch.names)) + 1

    def _bad(self, names: list[str]) -> list[bool]:
        return [self._error_of(name) != "" for name in names]

    def _error_of(self, name: str) -> str:
        fault = FAULTS.get(self._requests[name].fault)
        return fault.error if fault else ""
