"""How do the handlers of a batcher end?"""

from __future__ import annotations

from itertools import count

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.callers import Callers
from tests.ends import FAILED, WAYS, Way
from tests.stage import PICK

PLACES = st.sets(st.integers(0, 7), min_size=1)
"""Of calls in a batch: those that a handler dislikes, if they are there."""


class Handlers(Callers):
    """Lets the handlers end that are held, each as it is told to."""

    @rule(
        pick=PICK,
        way=st.sampled_from(WAYS),
        places=PLACES,
    )
    def answer(self, pick: int, way: Way, places: set[int]) -> None:
        """Let a handler end, well or badly."""
        if not self.held:
            return
        if way == "exit" and self.inline:
            way = "raise"  # it would end the main greenlet, as it should
        held = self.held.pop(pick % len(self.held))
        way = held.batch.runs.consistent(way, places)
        self.model.answer(held.batch, way, places)
        held.way, held.picked = way, places
        held.gate.open()
        del held
        self.rest()

    @precondition(lambda self: self.setup["on_error"] == "isolate")
    @rule(many=st.integers(2, 6), way=st.sampled_from(FAILED), places=PLACES)
    def search(self, many: int, way: Way, places: set[int]) -> None:
        """Have a batch of several fail, so that it is run again in parts."""
        self.map(many, keep=True, afar=False)
        if self.held:
            self.answer(len(self.held) - 1, way, places)

    def answer_all(self) -> None:
        """Let all handlers end, each in another way and for other calls."""
        for number in count(self.numbers):
            if not self.held:
                return
            places = {place for place in range(8) if number >> place & 1}
            self.answer(0, WAYS[number % len(WAYS)], places)
