"""When does a batch close?

Pure: no clock, no lock, no I/O. It is given counts and ages, and answers with a
reason to close or with when to look again, so it can be tested with made-up
times and simulated.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple

Linger = Literal["settle", "full", "now"]
LINGERS: tuple[Linger, ...] = ("settle", "full", "now")

TURN = 0.0
"""Look again after one turn of the backend: when all that was ready has run."""


class Reason(str, Enum):
    """Why a batch was closed; the values are the keys of ``Stats.dispatch_reasons``."""

    FULL = "full"
    TIMEOUT = "timeout"
    SETTLED = "settled"
    NOW = "now"
    STOP = "stop"


class Rules(NamedTuple):
    """What the user chose, and how many quiet turns the backend calls settled."""

    max_size: int
    timeout: float
    linger: Linger
    settled_turns: int


class Look(NamedTuple):
    """What can be seen of an open batch when a worker is free to run it."""

    size: int
    """Calls in it, at least one."""
    age: float
    """Seconds since its oldest call arrived."""
    quiet_turns: int
    """Turns in a row that brought nothing new."""
    growing: bool
    """It still takes calls; once full it does not, even if one of them leaves."""
    stopping: bool
    """stop() has begun."""


class Decision(NamedTuple):
    """Close now, for *reason*; or look again within *look_again* seconds."""

    reason: Reason | None
    look_again: float = TURN


def decide(rules: Rules, look: Look) -> Decision:
    """Decide whether a batch closes, now that a worker is free.

    ``timeout`` bounds every linger from above, counted from the oldest call's
    arrival. Measured for ``settle`` on gevent: two quiet turns gather a burst of
    20 new connections whole and cost a lone caller 0.02 ms; one turn gathers 6.
    """
    if look.size >= rules.max_size or not look.growing:
        return Decision(Reason.FULL)
    if look.stopping:
        return Decision(Reason.STOP)
    if rules.linger == "now":
        return Decision(Reason.NOW)
    if look.age >= rules.timeout:
        return Decision(Reason.TIMEOUT)
    if rules.linger == "full":
        return Decision(None, rules.timeout - look.age)
    if look.quiet_turns >= rules.settled_turns:
        return Decision(Reason.SETTLED)
    return Decision(None, TURN)
