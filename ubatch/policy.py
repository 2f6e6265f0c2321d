"""When does a batch close?

Pure: no clock, no lock, no I/O. It is given counts, ages and what was observed, and
answers with a reason to close or with when to look again, so it can be tested with
made-up times and simulated.
"""

from __future__ import annotations

from math import inf
from typing import Literal, NamedTuple

Linger = Literal["adaptive", "settle", "full", "now"]
LINGERS: tuple[Linger, ...] = ("adaptive", "settle", "full", "now")

Reason = Literal["full", "timeout", "deadline", "settled", "now", "stop"]
"""Why a batch was closed: the keys of ``Stats.dispatch_reasons``."""

TURN = 0.0
"""Look again after one turn of the backend: when all that was ready has run."""

SHORT = 0.001
"""Seconds; for less than that one takes turns, as timers are no finer."""

ALONE = 1.5
"""Calls between two outcomes, on average, below which a call expects no company."""

PATIENCE = 2.0
"""How many times as long as expected one waits for callers to come back."""


GAPS = 4.0
"""Gaps without a call after which arrivals from other processes have settled: of calls
that come at random, one in fifty is later."""

SILENCE = 0.0015
"""Seconds in place of that, where no wave has been seen yet."""

WAVES = 0.75
"""The share of the time in which calls come, below which they come in waves."""


class Rules(NamedTuple):
    """What the user chose, and what settled means for those who call."""

    max_size: int
    timeout: float
    linger: Linger
    settled_turns: int
    """Quiet turns of the backend."""
    far: bool = False
    """They are other processes, of whom a turn of this one tells little."""


class Pace(NamedTuple):
    """How calls come, and what a batch costs; seconds, averaged over the last ones."""

    gap: float
    """From one call to the next, in a wave of them."""
    lag: float
    """From an outcome until the first call after it."""
    drag: float
    """By how much each call that comes beside a batch slows the batch."""
    fixed: float
    """What the handler takes for a batch of any size."""
    told: int
    """Calls that the last outcome answered."""
    missing: int
    """As many of their callers as have not called again."""
    usual: float
    """Calls that come between one outcome and the next."""
    since: float
    """The time since that outcome."""
    overlaps: bool
    """The handler runs beside the callers, not instead of them."""
    spread: float = 1.0
    """The share of the time from one outcome to the next in which calls come."""


class Look(NamedTuple):
    """What can be seen of an open batch when a worker is free to run it."""

    size: int
    """Calls in it, at least one."""
    age: float
    """Seconds since its first call arrived."""
    quiet_turns: int
    """Turns in a row that brought nothing new."""
    growing: bool
    """It still takes calls; once full it does not, even if one of them leaves."""
    stopping: bool
    """stop() has begun."""
    pace: Pace | None = None
    """None where nothing is known yet, or nobody asks."""
    spare: float = inf
    """Seconds for which its earliest deadline allows waiting; see Recent.spare()."""
    quiet: float = inf
    """Seconds since the last call, of any batch."""


class Decision(NamedTuple):
    """Close now, for *reason*; or look again within *look_again* seconds."""

    reason: Reason | None
    look_again: float = TURN


CLOSE: dict[Reason, Decision] = {
    "full": Decision("full"),
    "timeout": Decision("timeout"),
    "deadline": Decision("deadline"),
    "settled": Decision("settled"),
    "now": Decision("now"),
    "stop": Decision("stop"),
}
AFTER_A_TURN = Decision(None, TURN)


def decide(rules: Rules, look: Look) -> Decision:
    """Decide whether a batch closes, now that a worker is free.

    ``timeout`` bounds every linger from above, counted from the first call's
    arrival, and so does the earliest deadline, less what the handler takes. Measured
    for ``settle`` on gevent: two quiet turns gather a burst of 20 new connections
    whole and cost a lone caller 0.02 ms; one turn gathers 6.
    """
    if look.size >= rules.max_size or not look.growing:
        return CLOSE["full"]
    if look.stopping:
        return CLOSE["stop"]
    if rules.linger == "now":
        return CLOSE["now"]
    if look.age >= rules.timeout:
        return CLOSE["timeout"]
    if look.spare <= 0.0:
        return CLOSE["deadline"]
    decision = _linger(rules, look)
    if decision.reason is None and decision.look_again > look.spare:
        return Decision(None, look.spare)
    return decision


def _linger(rules: Rules, look: Look) -> Decision:
    if rules.linger == "full":
        return Decision(None, rules.timeout - look.age)
    if rules.linger == "adaptive" and look.pace is not None:
        return _weigh(rules, look, look.pace)
    return _settle(rules, look)


def _settle(rules: Rules, look: Look) -> Decision:
    """Close once arrivals have settled.

    Where those who call run on this loop, it has turned with nothing new. Other
    processes may be about to call whatever it does: there, silence has to last for some
    of the gaps in the last waves, but not for longer than an extra batch would take.
    Measured with two of gunicorn's workers: a burst of 20 connections gives 20 calls
    over 6 ms; by turns alone they became batches of 1 and 19.
    """
    if look.quiet_turns < rules.settled_turns:
        return AFTER_A_TURN
    if rules.far:
        silence = _silence(look.pace)
        if look.quiet < silence:
            left = rules.timeout - look.age
            return Decision(None, min(silence - look.quiet, left))
    return CLOSE["settled"]


def _silence(pace: Pace | None) -> float:
    if pace is None or not pace.gap:
        return SILENCE
    return min(GAPS * pace.gap, pace.fixed) if pace.spread < WAVES else 0.0


def _weigh(rules: Rules, look: Look, pace: Pace) -> Decision:
    """Decide by what waiting costs, and what it saves.

    Let N callers come in waves, one every ``gap``, to a handler that takes
    ``fixed + n * each`` for a batch of n. One batch for the whole wave takes
    ``N * gap + fixed + N * each``, since the worker stands idle while the wave comes
    in. Two batches of N/2 overlap with each other's waves, and take
    ``2 * fixed + N * each + N * drag``, where the drag is what they lose by that: to
    the GIL, and to a busy loop that hears late of their end. So one waits for the
    wave exactly if

        (gap - drag) * N < fixed

    N is who waits and who is missing: those whose answer went out last and who have
    not called again. In a stream that is no wave, such as Poisson's, as many as were
    answered come again in about the handler's own time, so ``gap * N`` exceeds
    ``fixed``, and nobody waits. Where the handler runs instead of the callers,
    nothing overlaps, and a batch goes when arrivals have settled. So it does where
    other processes call that need the handler's processor: all the work takes as long
    in any order, and a batch less is ``fixed`` less of it. But there two cohorts may
    call in turn; if calls come in waves at all, the one waits for the other.

    A call that is usually alone, and that nobody is missing from, waits for nobody.
    Once arrivals have settled, it waits on only for callers who are missing but not
    overdue, at the same price. That waiting for what it might save never costs more
    than twice the best is the rule for renting skis (Karlin, Manasse, Rudolph and
    Sleator, Competitive snoopy caching, 1988).
    """
    if look.size == 1 and not pace.missing and pace.usual < ALONE:
        return CLOSE["settled"]
    wave = max(0.0, pace.gap - pace.drag) * (look.size + pace.missing)
    if pace.overlaps and wave >= pace.fixed:
        return CLOSE["now"]
    decision = _settle(rules, look)
    if decision.reason is None or not pace.missing:
        return decision
    return _wait_for_missing(rules, look, pace, wave) or decision


def _wait_for_missing(
    rules: Rules, look: Look, pace: Pace, wave: float
) -> Decision | None:
    """Look again later, if that is worth it and nobody is overdue."""
    expected = pace.lag + pace.gap * pace.told
    overdue = PATIENCE * expected
    if pace.overlaps:
        worth = pace.lag + wave < pace.fixed
        overdue = min(overdue, pace.fixed)
    else:
        worth = rules.far and pace.spread < WAVES
    if not worth or pace.since >= overdue:
        return None
    until = expected if pace.since < expected else overdue
    # They may be back before that; when the first of other processes is, a look tells.
    back = SHORT if rules.far else max(SHORT, pace.gap * pace.missing)
    wait = min(back, until - pace.since, rules.timeout - look.age)
    return Decision(None, wait if wait >= SHORT else TURN)
