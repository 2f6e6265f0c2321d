"""What became of each request, and is that what should have?

Every request ends in one column. Three of them are faults of the server: a ``wrong``
answer, one that ``hung`` and one that was ``lost``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from math import inf

from tests.chaos.client import Request
from tests.chaos.journal import Begun
from tests.chaos.plan import DEADLINE, FAULTS, GRACE, HANG, OWN_ERROR

COLUMNS = {
    "right": "right: its own answer",
    "own": "right: an error, for its own fault",
    "other": "failed with a reason: another's fault in its batch",
    "503": "refused with a reason: 503",
    "504": "refused with a reason: 504",
    "left": "left by its client",
    "killed": "lost to a kill -9 of its worker",
    "wrong": "wrong",
    "hung": "hung past its deadline",
    "lost": "lost without a kill -9",
}
MUST_BE_0 = ("wrong", "hung", "lost")

REFUSALS = {503: ("QueueFull", "Stopped"), 504: ("DeadlineExceeded",)}

SOON = 0.5
"""Seconds after a ``kill -9`` in which a client hears of it, however slow it is."""


PROMPT = 0.05
"""Seconds in which one comes, once it is noted."""


class Ledger:
    """All requests of a trial."""

    def __init__(
        self,
        requests: Iterable[Request],
        begun: Mapping[str, Begun],
        kills: Mapping[int, float],
    ) -> None:
        self.requests = list(requests)
        self._by_name = {request.name: request for request in self.requests}
        self._begun = begun
        self._kills = kills
        # Who may have made the others of a batch fail, by batcher and by error.
        self._culprits: dict[tuple[str, str], list[Request]] = defaultdict(list)
        for request in self.requests:
            if request.fault and FAULTS[request.fault].error:
                error = FAULTS[request.fault].error
                self._culprits[request.batcher, error].append(request)
        self.columns = {each.name: self._column(each) for each in self.requests}

    def counts(self) -> Counter[str]:
        """Return how many requests are in each column."""
        return Counter(self.columns.values())

    def guilty(self) -> list[str]:
        """Return the requests that must not be, with the evidence."""
        return [
            f"{column}: {self._by_name[name].line()} "
            f"taken up by {self._begun.get(name)}"
            for name, column in self.columns.items()
            if column in MUST_BE_0
        ]

    def latest(self) -> float:
        """Return how long after its deadline the latest answer came, in seconds."""
        answered = [each for each in self.requests if each.end == "answered"]
        return max(map(self._took, answered), default=0.0) - DEADLINE

    def longest_at_the_door(self) -> float:
        """Return the longest time that a request waited to be taken up, in seconds."""
        waits = [
            self._begun[each.name].at - each.began
            for each in self.requests
            if each.name in self._begun
        ]
        return max(waits, default=0.0)

    def _took(self, request: Request) -> float:
        """Return the seconds from when a worker could go on to the request's end."""
        begun = self._begun.get(request.name)
        return request.ended - max(request.sent, begun.at if begun else 0.0)

    def _column(self, request: Request) -> str:
        if request.end == "answered":
            late = self._took(request) > DEADLINE + GRACE
            return "hung" if late else self._judge(request)
        if request.end == "left":
            return "left"
        if request.end in ("timeout", "TimeoutError"):
            return "hung"  # a worker that is killed would have closed the connection
        return "killed" if self._was_killed(request) else "lost"

    def _judge(self, request: Request) -> str:
        """Return the column of a request that was answered."""
        status, error = request.status, request.error
        if status == 200:
            fine = request.answer == request.wanted
            return "right" if fine and request.fault in ("", "busy") else "wrong"
        if status in REFUSALS:
            early = request.ended - request.began < DEADLINE
            known = error in REFUSALS[status]
            return str(status) if known and not (status == 504 and early) else "wrong"
        if status != 500:
            return "wrong"
        if error == OWN_ERROR:
            mine = request.fault == "own" and request.of == request.name
            return "own" if mine else "wrong"
        if request.fault and FAULTS[request.fault].error == error:
            # In a batch of several, one of the others may have failed it first.
            if request.of in ("", request.name):
                return "own"
        return "other" if self._explained(request) else "wrong"

    def _explained(self, request: Request) -> bool:
        """Tell whether somebody can have been in its batch who failed it."""
        culprits = self._culprits[request.batcher, request.error]
        if request.of:
            culprits = [one for one in culprits if one.name == request.of]
        return any(
            one.began < request.ended and request.began < one.ended + DEADLINE + HANG
            for one in culprits
        )

    def _was_killed(self, request: Request) -> bool:
        """Tell whether a kill -9 explains that a request got no answer.

        Known is which worker took it up, unless it was killed before that: then the
        time must tell.
        """
        begun, ended = self._begun.get(request.name), request.ended
        if begun is not None:
            return self._kills.get(begun.pid, inf) < ended
        # A kill is noted just before it happens.
        return any(
            request.began < at + PROMPT and at < ended < at + SOON
            for at in self._kills.values()
        )
