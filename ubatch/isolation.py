"""Which calls of a failed batch are to blame?

Pure but for the handler: the batch is run again in halves, until the bad calls stand
alone. As in group testing by splitting (Dorfman, The detection of defective members
of large populations, 1943; Sobel and Groll, Group testing to eliminate efficiently
all defectives in a binomial sample, 1959), with each bad call run once by itself,
since its own error is what its caller is to get.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ubatch.batch import Job, answer
from ubatch.errors import HandlerExit

OnError = Literal["fail", "isolate"]
ON_ERROR: tuple[OnError, ...] = ("fail", "isolate")


class Answered(NamedTuple):
    """What a batch was answered with."""

    answers: list[Any]
    """One per call: a result, or the exception of that call."""
    reruns: int
    """How many times the handler was run again."""
    first: Exception | None
    """What the first run raised."""
    exit: HandlerExit | None = None
    """What ended a later run, and so the batch."""


Wanted = Callable[[], bool]
"""Asked before each further run; False once nobody waits any more."""

Answer = Callable[[Job, Wanted], Answered]
"""How the handler is called for a batch."""


def always() -> bool:
    """Be wanted, as far as can be told from another process."""
    return True


def answer_whole(job: Job, wanted: Wanted) -> Answered:
    """Call the handler once.

    Raises:
        Exception: As answer().
    """
    return Answered(answer(job), 0, None)


def answer_apart(job: Job, wanted: Wanted) -> Answered:
    """Call the handler; if that fails, call it on parts, so that only the bad fail.

    For k bad calls of n that is at most ``2 * k * log2(n) + 1`` runs: where one half of
    a bad part is good, the other is known to be bad, and is not run whole. If as many
    runs as a single bad call may cost, ``2 * ceil(log2(n)) + 1``, have all failed, the
    handler is taken to fail whatever it gets: the calls that did not stand alone by
    then get the error of the whole.

    Raises:
        HandlerExit: The first run ended with something that is not an Exception.
        Exception: What the handler raised for a batch of one.
    """
    # A handler may empty its lists: it gets copies, as it may be run again.
    search = _Search(job, wanted)
    ended: HandlerExit | None = None
    try:
        if not search.run(0, job.size):
            search.find(0, job.size)
    except HandlerExit as error:
        if search.runs == 1:
            raise
        ended = error
    finally:
        search.let_go()
    if job.size == 1 and search.first is not None:
        raise search.first
    return Answered(search.answers, search.runs - 1, search.first, ended)


class _Search:
    """One batch, its answers so far, and how many runs they took."""

    def __init__(self, job: Job, wanted: Wanted) -> None:
        self.answers: list[Any] = [None] * job.size
        self.runs = 0
        self.first: Exception | None = None  # what the first one raised
        self._failed = 0  # how many of them
        self._job = job
        self._wanted = wanted
        self._most_in_vain = 2 * (job.size - 1).bit_length() + 1

    def run(self, start: int, stop: int) -> bool:
        """Run the calls of one part; tell whether they are all good."""
        self.runs += 1
        try:
            self.answers[start:stop] = answer(self._job.part(start, stop))
        except HandlerExit:
            raise
        except Exception as error:
            self._failed += 1
            if self.first is None:
                self.first = error
                self.answers = [error] * len(self.answers)  # until they are run again
            elif stop - start == 1:
                self.answers[start] = error
            return False
        return True

    def find(self, start: int, stop: int) -> None:
        """Find the bad calls of a part that is known to hold some."""
        while stop - start > 1 and not self._in_vain():
            middle = (start + stop) // 2
            if self.run(start, middle):
                start = middle  # so the bad ones are in the other half
                if stop - start == 1 and not self._in_vain():
                    self.run(start, stop)
                continue
            self.find(start, middle)
            if self._in_vain() or self.run(middle, stop):
                return
            start = middle

    def let_go(self) -> None:
        """Keep nothing alive that errors refer to by way of their frames."""
        del self._job

    def _in_vain(self) -> bool:
        if self._failed == self.runs and self.runs >= self._most_in_vain:
            return True
        return not self._wanted()
