"""How do calls come, and what does a batch cost?

Plain data, without a lock or a clock: the collector holds its own around every use.
"""

from __future__ import annotations

from collections import deque
from math import inf

from ubatch.policy import Pace

KEEP = 0.8
"""What an average keeps of itself at each outcome: it follows within about five."""

KEEP_FIT = 0.95
"""The same for the handler's time, which takes batches of several sizes to learn."""

SAME_SIZE = 0.1
"""Batches whose sizes spread less than this, over their mean, show no slope."""


RECENT = 8
"""Batches by which a handler's next time is judged."""

PROBE_AFTER = 1.0
"""Seconds after which a handler's last times say nothing about its next."""

MARGIN = 1.1
"""What to multiply the slowest of them by, where a batch should be on time."""

RESERVE = 0.05
"""The share of the time until a deadline that is never lingered away: a busy machine
was seen to take more than ``NOTICE`` in 1 of 16 batches."""

NOTICE = 0.005
"""Seconds that may pass from the moment to close a batch until the handler has it: the
interpreter switches threads that often."""

FEW = 0.25
"""Calls that come beside a batch, over its size, that do not slow it to speak of."""


class Observer:
    """Averages of what was seen at the outcomes of batches.

    An *outcome* is the moment when a batch's answers go out: from then on its
    callers can call again, and what came since is the wave that it set off.
    """

    __slots__ = (
        "_alone",
        "_all",
        "_drag",
        "_gap",
        "_lag",
        "_usual",
        "_spread",
        "_told",
        "_outcome",
        "_joined",
        "_first",
    )

    def __init__(self) -> None:
        self._alone = Cost()  # of batches beside which few calls came
        self._all = Cost()
        self._drag = 0.0
        self._gap: float | None = None
        self._lag: float | None = None
        self._usual: float | None = None
        self._spread: float | None = None
        self._told = 0
        self._outcome: float | None = None
        self._joined = 0  # calls until then, in all
        self._first: float | None = None  # when the first one after that came

    def opened(self, now: float) -> None:
        """Note that a call came that opened a batch."""
        if self._first is None:
            self._first = now

    def _look(self, joined: int, newest: float) -> None:
        """Note whether a call came that did not; a free worker looks once a turn.

        Args:
            joined: Calls so far, in all.
            newest: When the last of them came.
        """
        if self._first is None and joined > self._joined:
            self._first = newest

    def outcome(
        self,
        told: int,
        seconds: float,
        beside: int,
        joined: int,
        newest: float,
        now: float,
    ) -> None:
        """Note that *told* callers get their answers now, after *seconds* of work.

        Args:
            beside: Calls that came meanwhile.
        """
        self._look(joined, newest)
        self._all.add(told, seconds)
        if beside <= FEW * told:
            self._alone.add(told, seconds)
        elif self._alone.known:
            slower = max(0.0, seconds - self._alone.of(told))
            self._drag = _follow(self._drag, slower / beside)
        came = joined - self._joined
        if self._outcome is not None and self._first is not None and came:
            self._usual = _follow(self._usual, came)
            self._lag = _follow(self._lag, max(0.0, self._first - self._outcome))
            if came > 1:
                wave = newest - self._first
                self._gap = _follow(self._gap, wave / (came - 1))
                share = wave / (now - self._outcome) if wave else 0.0
                self._spread = _follow(self._spread, share)
        self._told = told
        self._outcome = now
        self._joined = joined
        self._first = None

    @property
    def contended(self) -> bool:
        """A call that comes beside a batch slows it about as long as the call takes.

        Both need the GIL, so running them side by side gains nothing.
        """
        return self._gap is not None and 2 * self._drag > self._gap

    def pace(
        self, joined: int, newest: float, now: float, overlaps: bool
    ) -> Pace | None:
        """Return what is known; None before there is enough of it."""
        self._look(joined, newest)
        if self._lag is None or self._usual is None or self._outcome is None:
            return None
        return Pace(
            self._gap or 0.0,  # before the first wave, no call has to wait for one
            self._lag,
            self._drag,
            (self._alone if self._alone.known else self._all).fixed,
            self._told,
            max(0, self._told - (joined - self._joined)),
            self._usual,
            now - self._outcome,
            overlaps,
            1.0 if self._spread is None else self._spread,
        )


class Recent:
    """How long the last batches took, and how many calls they answered."""

    __slots__ = ("_batches",)

    def __init__(self) -> None:
        # When each began and ended, and how many calls it answered.
        self._batches: deque[tuple[float, float, int]] = deque(maxlen=RECENT)

    def add(self, began: float, ended: float, told: int) -> None:
        """Take in one batch."""
        self._batches.append((began, ended, told))

    def spare(self, deadline: float, opened: float, now: float) -> float:
        """Return how long a batch can wait, and be answered by *deadline*.

        By the slowest of the last batches, so that closing early is early enough.
        While nothing is known, half of the time from *opened* on is for the handler.
        """
        if not self._batches:
            return (deadline + opened) / 2 - now
        slowest = max(ended - began for began, ended, _ in self._batches)
        needed = max(MARGIN * slowest + NOTICE, RESERVE * (deadline - opened))
        return deadline - now - needed

    def lead(self, now: float) -> float:
        """Return how long the handler takes for sure; 0.0 where that is not known.

        A call that has no more time than that is not worth running. So it is the
        fastest of the last batches, as BBR's estimate of a path is the least of its
        round trips (Cardwell et al., BBR: congestion-based congestion control, 2016),
        and not before there are some: the first ones load a model. Since nothing is
        learned from calls that are not run, it is believed for a second, or for as
        long as a batch takes, and then one batch is run to see.
        """
        if len(self._batches) < RECENT:
            return 0.0
        fastest = min(ended - began for began, ended, _ in self._batches)
        age = now - self._batches[-1][1]
        return fastest if age <= max(PROBE_AFTER, fastest) else 0.0

    def seconds_for(self, calls: int) -> float:
        """Return how long it takes to answer as many calls; inf where unknown.

        By the time in which a batch ran: nothing is to be learned from a quiet night.
        """
        busy, until, answered = 0.0, -inf, 0
        for began, ended, told in self._batches:
            busy += ended - max(began, until)
            until, answered = ended, answered + told
        return calls * busy / answered if answered else inf


class Cost:
    """A handler's time as ``fixed + size * each``: a line through the last batches.

    Least squares with weights that fade; BentoML's dispatcher fits the same line to
    its last 50 batches.
    """

    __slots__ = ("_count", "_sizes", "_seconds", "_squares", "_products")

    def __init__(self) -> None:
        self._count = self._sizes = self._seconds = 0.0
        self._squares = self._products = 0.0

    def add(self, size: int, seconds: float) -> None:
        """Take in one batch."""
        self._count = KEEP_FIT * self._count + 1
        self._sizes = KEEP_FIT * self._sizes + size
        self._seconds = KEEP_FIT * self._seconds + seconds
        self._squares = KEEP_FIT * self._squares + size * size
        self._products = KEEP_FIT * self._products + size * seconds

    @property
    def known(self) -> bool:
        """There has been a batch."""
        return self._count > 0.0

    @property
    def each(self) -> float:
        """Seconds that one more call takes."""
        size, seconds = self._sizes / self._count, self._seconds / self._count
        spread = self._squares / self._count - size * size
        if spread <= (SAME_SIZE * size) ** 2:
            return 0.0
        return max(0.0, (self._products / self._count - size * seconds) / spread)

    @property
    def fixed(self) -> float:
        """Seconds that a batch of any size takes.

        All that it takes, where all batches had about the same size: what an extra
        one would cost, at most.
        """
        return max(0.0, (self._seconds - self.each * self._sizes) / self._count)

    def of(self, size: int) -> float:
        """Return the seconds that a batch of that size takes."""
        return self.fixed + self.each * size


def _follow(average: float | None, seen: float) -> float:
    return seen if average is None else KEEP * average + (1 - KEEP) * seen
