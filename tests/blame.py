"""Which calls of a batch should get which end, run by run?

A handler that failed may be run again on parts of its batch, so that only the bad
calls fail. What is promised of these runs is written down here; how the parts are
chosen is not.
"""

from __future__ import annotations

from math import ceil, log2

from tests.ends import FAILED, GOOD, Call, End, Way, end_of


class Runs:
    """The runs of a handler on one batch: on all of it, and then on parts perhaps."""

    def __init__(self, calls: list[Call], isolate: bool) -> None:
        self.calls = calls
        self.part = calls  # what the handler was given last
        self.count = 1
        self.running = True
        self.over = False  # there is no further run
        self.ends: dict[Call, End] = {}  # as far as is known
        self._isolate = isolate
        self._bad: set[Call] = set()
        self._suspects = set(calls)  # those that nothing is known of yet
        self._all_failed = True

    def again(self, part: list[Call]) -> None:
        """Check what the handler is given in one more run."""
        assert not self.running, f"{part} run beside {self.part}"
        assert not self.over, f"{part} run again, for nothing"
        first = self.calls.index(part[0])
        assert part == self.calls[first : first + len(part)], f"{part}: no part"
        assert self._suspects.issuperset(part), f"{part} run again, known already"
        assert self.count or part == self.calls, f"{part} instead of all"
        self.part = part
        self.running = True
        self.count += 1
        bad = len(self._bad) or 1  # if nobody is to blame one looks for one
        most = 2 * bad * log2(len(self.calls)) + 1
        assert self.count <= most, f"{self.count} runs for {bad} bad {self.calls}"

    def consistent(self, way: Way, places: set[int]) -> Way:
        """Return how a run ends if the same calls are bad in all; at first *places*."""
        if self.count == 1:
            self._bad = {self.calls[one] for one in places if one < len(self.calls)}
            return way
        if way == "exit":
            return way
        if self._bad.intersection(self.part):
            return way if way in FAILED else "raise"
        return way if way in GOOD else "results"

    def end(self, way: Way, places: set[int], wanted: bool) -> None:
        """Take note of how a run ended.

        Args:
            wanted: Somebody still waits for an answer.
        """
        self.running = False
        failed = way in FAILED
        for place, call in enumerate(self.part):
            if self.count == 1 or not failed or len(self.part) == 1:
                self.ends[call] = end_of(call, self.part, way, place in places)
        if way == "exit":
            self.ends = dict.fromkeys(self.calls, end_of(call, self.part, way, False))
        if not failed or len(self.part) == 1:
            self._suspects.difference_update(self.part)
        self._all_failed = self._all_failed and failed
        in_vain = self._all_failed and self.count > 2 * ceil(log2(len(self.calls)))
        done = not self._suspects or not wanted or in_vain
        self.over = done or not self._isolate or way == "exit"
