"""What became of each request, and is that what should have?

Every request ends in one column. Four of them are faults of the server: a ``wrong``
answer, an error for which one that was isolated is ``blamed``, an answer that ``hung``
and one that was ``lost``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import inf

from tests.chaos.batches import LAG, Batches
from tests.chaos.client import Request
from tests.chaos.journal import Begun, Run
from tests.chaos.losses import NAMES, PROMPT, Losses
from tests.chaos.plan import BATCHERS, DEADLINE, FATAL, GRACE, OWN_ERROR

COLUMNS = {
    "right": "right: its own answer",
    "own": "right: an error, for its own fault",
    "other": "failed with a reason: another's fault, not isolated or a SystemExit",
    "vain": "failed with a reason: isolated in vain, all of the first runs failed",
    "503": "refused with a reason: 503, too many wait or the worker ends",
    "stuck": "refused with a reason: 503, every worker is stuck",
    "gone": "refused with a reason: 503, lost with a model process or server",
    "alone": "refused with a reason: 503, no model process or server",
    "504": "refused with a reason: 504, its deadline has passed",
    "shed": "refused with a reason: 504, it can make its deadline no more",
    "overrun": "refused with a reason: 504, the handler ran past handler_timeout",
    "left": "left by its client",
    "killed": "lost to a kill -9 of its worker",
    "wrong": "wrong",
    "blamed": "failed for another's fault, though isolated",
    "hung": "hung past its deadline",
    "lost": "lost without a kill -9",
}
MUST_BE_0 = ("wrong", "blamed", "hung", "lost")

# What the refusals say, by their class and the start of what they say.
STUCK = "every worker "
PASSED = re.compile(r"no result within the call's deadline of (\S+) seconds")
OVERRUN = "the handler has run for handler_timeout="
AHEAD = re.compile(
    r"given up (\S+) s before the call's deadline of (\S+) seconds: none"
)
ROUNDED = 1.05
"""How much more than it says the time left of one that is given up ahead may be."""

SOON = 0.5
"""Seconds after a ``kill -9`` in which a client hears of it, however slow it is."""


class Ledger:
    """All requests of a trial."""

    def __init__(
        self,
        requests: Iterable[Request],
        begun: Mapping[str, Begun],
        kills: Mapping[int, float],
        runs: Iterable[Run] = (),
        losses: Losses = Losses({}, {}),
    ) -> None:
        self.requests = list(requests)
        self._by_name = {request.name: request for request in self.requests}
        self._begun = begun
        self._kills = kills
        self._losses = losses
        self.batches = Batches(runs, self._by_name)
        self.columns = {each.name: self._column(each) for each in self.requests}

    def counts(self) -> Counter[str]:
        """Return how many requests are in each column."""
        return Counter(self.columns.values())

    def share_right(self, batcher: str) -> float:
        """Return which share of a batcher's requests was answered right."""
        mine = [each.name for each in self.requests if each.batcher == batcher]
        right = sum(self.columns[name] in ("right", "own") for name in mine)
        return right / len(mine) if mine else 0.0

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

    def _waited(self, request: Request) -> float:
        """Return the seconds from before its call to the request's end, at most."""
        begun = self._begun.get(request.name)
        return request.ended - max(request.began, begun.at if begun else 0.0)

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
        if status in (503, 504):
            return self._judge_refusal(request)
        if status != 500:
            return "wrong"
        if error == OWN_ERROR:
            mine = request.fault == "own" and request.of == request.name
            return "own" if mine else "wrong"
        culprits = self.batches.culprits(request.name, error)
        if request.of:
            culprits &= {request.of}
        if not culprits:
            return "wrong"
        if request.name in culprits:
            return "own"
        if BATCHERS[request.batcher].on_error == "fail" or error == FATAL:
            return "other"
        return "vain" if self.batches.in_vain(request.name) else "blamed"

    def _judge_refusal(self, request: Request) -> str:
        """Return the column of a request that was refused: is what it says true?"""
        kind, says = (request.status, request.error), request.message
        name = NAMES.get(request.batcher, request.batcher)
        says = says.removeprefix(f"{request.batcher}: ").removeprefix(f"{name}: ")
        waited, limit = self._waited(request), BATCHERS[request.batcher].limit
        if kind == (503, "QueueFull"):
            return "503"
        if kind == (503, "Stopped"):  # a worker; the model server does not end
            return "503" if request.message.startswith(request.batcher) else "wrong"
        began, ended = request.ended - waited, request.ended
        if kind == (503, "WorkerLost"):
            if self._losses.left_alone(request, self.batches):
                return "alone"
            known = self._losses.explain(request, began, self.batches)
            return "gone" if known else "wrong"
        if kind == (503, "BackendError") and says.startswith(STUCK):
            where = request.pid, request.batcher
            return "stuck" if self.batches.all_stuck(*where, began, ended) else "wrong"
        if kind != (504, "DeadlineExceeded"):
            return "wrong"
        passed = PASSED.fullmatch(says)
        if passed is not None and self._is_deadline(request, passed[1]):
            untold = self.batches.ended_before(request.name, began + DEADLINE - LAG)
            return "504" if waited >= DEADLINE and not untold else "wrong"
        if says.startswith(f"{OVERRUN}{limit:g} seconds"):
            return "overrun" if waited >= limit else "wrong"
        ahead = AHEAD.match(says)
        if ahead is None or request.name in self.batches.of:
            return "wrong"
        if not self._is_deadline(request, ahead[2]):
            return "wrong"
        left = ROUNDED * float(ahead[1])
        return "shed" if left > 0.0 and waited >= DEADLINE - left else "wrong"

    def _is_deadline(self, request: Request, says: str) -> bool:
        """Tell whether a deadline is that of the call, or what a server had of it."""
        if BATCHERS[request.batcher].models == "server":
            return 0.0 < float(says) <= DEADLINE
        return says == f"{DEADLINE:g}"

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
