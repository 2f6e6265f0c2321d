"""What is said of a trial, and was it good?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.chaos.faults import KINDS, Trouble
from tests.chaos.ledger import COLUMNS, MUST_BE_0, Ledger
from tests.chaos.losses import Orphans
from tests.chaos.plan import BATCHERS
from tests.chaos.processes import Figures, Look
from tests.tables import table

Pulse = dict[str, Any]

MB = 1e6
GROWTH = {
    "gevent": {"rss": 10.0, "fds": 6.0, "threads": 6.0},
    "gthread": {"rss": 20.0, "fds": 6.0, "threads": 72.0},
}
"""How much a worker may grow between two rests: MB; numbers.

A young worker's memory still grows by 2 to 5 MB. Of their own the batchers of the app
have three threads, which may not have been needed before the first rest, and gthread
has 64 more. A model process and a model server take up to two sockets each, and the
process a pidfd.
"""

HUB_FILES = {"gevent": 2, "gthread": 0}
"""Of each thread, beside those: under gevent it has a hub once it has slept."""

WAITS = ("pending", "running")
"""What a model server tells of calls that it has not answered yet."""

LEAST_RIGHT = 0.3
"""The share of requests that has to be right, or the trial has shown nothing."""

ENOUGH_PAST = 5
"""Batches past the limit, of which one at least has to be seen to be replaced."""


MODEL_GROWTH = {"rss": 10.0, "fds": 4.0, "threads": 2.0}
"""The same for a model process, or a model server, that lived on. A server has two
files for each client, a socket and a pidfd, and the workers may not have come before
the first rest."""

WORKERS = 2
MODELS = sum(
    kind.workers * (WORKERS if kind.models == "worker" else 1)
    for kind in BATCHERS.values()
    if kind.models
)
"""Model processes that there are once all batchers have been called."""


class Rest(NamedTuple):
    """What there was when nobody had called for a while."""

    pulses: list[Pulse]
    """The last of each worker."""
    status: dict[str, Any]
    """What the model server told."""
    look: Look


class Row(NamedTuple):
    """One line of the table."""

    what: str
    measured: str
    bound: str = ""
    good: bool = True


def rows(
    kind: str,
    ledger: Ledger,
    trouble: Trouble,
    hung: tuple[int, int],
    orphans: Orphans,
    rests: tuple[Rest, Rest],
    left_over: int,
) -> list[Row]:
    """Return the table of a trial.

    Args:
        kind: Of gunicorn's workers.
        ledger: Its requests.
        trouble: Its faults.
        hung: How many batches ran past the limit; how many of them went unnoticed.
        orphans: Runs in model processes that must not be.
        rests: The first of them, and another one after further load.
        left_over: Processes that were left after the end.
    """
    sent, counts = len(ledger.requests), ledger.counts()
    share = (counts["right"] + counts["own"]) / sent if sent else 0.0
    made = Counter(one.kind for one in trouble.done)
    enough = share > LEAST_RIGHT
    before, after = rests
    pulses = *before.pulses, *after.pulses
    left, stuck = (sum(pulse[what] for pulse in pulses) for what in ("left", "stuck"))
    left += sum(rest.status.get(what, 0) for rest in rests for what in WAITS)
    batches, (past, missed) = ledger.batches, hung
    often, replaced = batches.run_too_often(trouble.losses.models), batches.replaced()
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
        *_growth(kind, before.pulses, after.pulses),
        *_beside(ledger, orphans, before, after, left_over),
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


def _beside(
    ledger: Ledger, orphans: Orphans, before: Rest, after: Rest, left_over: int
) -> list[Row]:
    """Return what is said of model processes and of the model server."""
    shares = [
        Row(f"right, share of {name}", f"{share:.0%}", f"> {LEAST_RIGHT:.0%}", good)
        for name in BATCHERS
        if BATCHERS[name].models
        for share in [ledger.share_right(name)]
        for good in [share > LEAST_RIGHT]
    ]
    clients = after.status.get("clients", 0)
    alive = len(after.look.models)
    strays = before.look.strays + after.look.strays
    beyond, cut, unwanted = orphans
    return [
        *shares,
        Row(
            "model processes alive at the end", f"{alive}", f"{MODELS}", alive == MODELS
        ),
        _grown("model process", before.look.models, after.look.models),
        _grown("model server", before.look.servers, after.look.servers),
        Row(
            "clients of the model server",
            f"{clients}",
            f"{WORKERS}",
            clients == WORKERS,
        ),
        _none("model processes not killed at handler_timeout", beyond),
        _none("model processes that ended in a batch for no reason", cut),
        _none("runs for a worker or a model server that was gone", unwanted),
        _none("processes at rest that nobody wants", strays),
        _none("processes left when gunicorn had ended", left_over),
    ]


def _none(what: str, count: int) -> Row:
    return Row(what, _number(count), "0", count == 0)


def _grown(
    what: str, before: Mapping[int, Figures], after: Mapping[int, Figures]
) -> Row:
    """Return the growth of the one that grew most; all have to have lived on."""
    pairs = [(before[pid], after[pid]) for pid in after if pid in before]
    if not pairs or len(pairs) < len(before):
        wanted = f"{max(len(before), 1)}"
        return Row(f"{what}, as many lived on", f"{len(pairs)}", wanted, False)
    units = (MB, 1.0, 1.0)
    most = [max((b[i] - a[i]) / units[i] for a, b in pairs) for i in range(len(units))]
    good = all(found <= bound for found, bound in zip(most, MODEL_GROWTH.values()))
    return Row(
        f"growth of a {what}: RSS in MB, open files, threads",
        ", ".join(f"{each:.3g}" for each in most),
        "<= " + ", ".join(f"{each:g}" for each in MODEL_GROWTH.values()),
        good,
    )


def _growth(kind: str, before: list[Pulse], after: list[Pulse]) -> list[Row]:
    """Return the growth of the worker that grew most, of those that lived on."""
    bounds, hub = GROWTH[kind], HUB_FILES[kind]
    before, after = [
        [{**pulse, "fds": pulse["fds"] - hub * pulse["threads"]} for pulse in pulses]
        for pulses in (before, after)
    ]
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
        "fds": "open files, growth of a worker at rest, but its hubs'",
        "threads": "threads, growth of a worker at rest",
    }
    return [
        Row(name, f"{grown[key]:.3g}", f"<= {bounds[key]:g}", grown[key] <= bounds[key])
        for key, name in names.items()
    ]


def _number(value: int) -> str:
    return f"{value:,}"
