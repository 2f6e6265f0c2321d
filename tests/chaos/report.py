"""What is said of a trial, and was it good?"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from tests.chaos.faults import KINDS, Done
from tests.chaos.ledger import COLUMNS, MUST_BE_0, Ledger
from tests.tables import table

Pulse = dict[str, Any]

MB = 1e6
GROWTH = {
    "gevent": {"rss": 10.0, "fds": 12.0, "threads": 6.0},
    "gthread": {"rss": 20.0, "fds": 6.0, "threads": 72.0},
}
"""How much a worker may grow between two rests: MB; numbers.

A young worker's memory still grows by 2 to 5 MB. Of their own the batchers of the app
have three threads, which may not have been needed before the first rest; under gevent
each has two files once it has slept: a hub. gthread has 64 more threads.
"""

LEAST_RIGHT = 0.3
"""The share of requests that has to be right, or the trial has shown nothing."""

ENOUGH_PAST = 5
"""Batches past the limit, of which one at least has to be seen to be replaced."""


class Row(NamedTuple):
    """One line of the table."""

    what: str
    measured: str
    bound: str = ""
    good: bool = True


def rows(
    kind: str,
    ledger: Ledger,
    done: list[Done],
    hung: tuple[int, int],
    before: list[Pulse],
    after: list[Pulse],
) -> list[Row]:
    """Return the table of a trial.

    Args:
        kind: Of gunicorn's workers.
        ledger: Its requests.
        done: Its faults.
        hung: How many batches ran past the limit; how many of them went unnoticed.
        before: The last pulse of each worker when nobody had called for a while.
        after: The same once more, after further load.
    """
    sent, counts = len(ledger.requests), ledger.counts()
    share = (counts["right"] + counts["own"]) / sent if sent else 0.0
    made = Counter(one.kind for one in done)
    enough = share > LEAST_RIGHT
    left, stuck = (
        sum(pulse[what] for pulse in (*before, *after)) for what in ("left", "stuck")
    )
    batches, (past, missed) = ledger.batches, hung
    often, replaced = batches.run_too_often(), batches.replaced()
    return [
        Row("sent", _number(sent)),
        *(_row(column, text, counts) for column, text in COLUMNS.items()),
        Row("calls left in a batcher at rest", _number(left), "0", left == 0),
        Row("workers stuck at rest", _number(stuck), "0", stuck == 0),
        Row("batches", _number(len(batches.all))),
        Row("batches run more often than promised", _number(often), "0", often == 0),
        Row("batches that ran past handler_timeout", _number(past)),
        Row("of these, not noticed", _number(missed), "0", missed == 0),
        Row(
            "batches run in place of these",
            _number(replaced),
            "> 0" if past >= ENOUGH_PAST else "",
            replaced > 0 or past < ENOUGH_PAST,
        ),
        Row("right, share", f"{share:.0%}", f"> {LEAST_RIGHT:.0%}", enough),
        Row("latest answer, after its deadline", f"{ledger.latest():.2f} s"),
        Row("longest wait for a worker", f"{ledger.longest_at_the_door():.2f} s"),
        *_growth(GROWTH[kind], before, after),
        Row(", ".join(KINDS), ", ".join(str(made[kind]) for kind in KINDS)),
    ]


def text(rows: list[Row]) -> str:
    """Return the table as text."""
    body = [(row.what, row.measured, row.bound) for row in rows]
    return table(("what", "measured", "must be"), body)


def _row(column: str, what: str, counts: Counter[str]) -> Row:
    count = counts[column]
    if column not in MUST_BE_0:
        return Row(what, _number(count))
    return Row(what, _number(count), "0", count == 0)


def _growth(
    bounds: dict[str, float], before: list[Pulse], after: list[Pulse]
) -> list[Row]:
    """Return the growth of the worker that grew most, of those that lived on."""
    first = {pulse["pid"]: pulse for pulse in before}
    pairs = [(first[each["pid"]], each) for each in after if each["pid"] in first]
    if len(pairs) < 2:
        return [Row("workers that lived on", str(len(pairs)), "2", False)]
    calls = min(b["calls"] - a["calls"] for a, b in pairs)
    units = {"rss": MB, "fds": 1.0, "threads": 1.0}
    grown = {
        key: max((b[key] - a[key]) / unit for a, b in pairs)
        for key, unit in units.items()
    }
    names = {
        "rss": f"RSS growth of a worker over {_number(calls)} calls, MB",
        "fds": "open files, growth of a worker at rest",
        "threads": "threads, growth of a worker at rest",
    }
    return [
        Row(name, f"{grown[key]:.3g}", f"<= {bounds[key]:g}", grown[key] <= bounds[key])
        for key, name in names.items()
    ]


def _number(value: int) -> str:
    return f"{value:,}"
