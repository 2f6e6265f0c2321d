"""How much later does a batch come back from another process than from its handler?

One caller, one batch after the other, with ``map()``: in turn in another process and
with the same handler inline, in this process. The difference of the medians is what the
way costs. A batch of pictures is also copied once, in this process, each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from registry import Cell, Metrics
from systems import System, ours

OPENED = {"ours-process": ours.in_process, "ours-server": ours.connected}


class Payload(NamedTuple):
    """What is asked for, and how often."""

    make: str
    """The function of process_handlers.py that makes the handler."""
    items: Callable[[Any], list[Any]]
    """(that module): the items."""
    pictures: bool


ROWS, THERE, BACK = "16 rows", "64 pictures there", "64 pictures back"
PAYLOADS = {
    ROWS: Payload("echo", lambda module: module.rows(), False),
    THERE: Payload("look", lambda module: module.pictures(), True),
    BACK: Payload("show", lambda module: list(range(module.PICTURES)), True),
}


def measure(system: System, cell: Cell, parameters: Cell) -> Metrics:
    """Return medians in seconds: of both ways, what is added, and of one copy."""
    import process_handlers

    payload = PAYLOADS[cell["payload"]]
    items = payload.items(process_handlers)
    pictures = process_handlers.pictures() if payload.pictures else []
    settings = {"max_size": len(items), "timeout": 0.01, "backend": system.world}
    here = getattr(process_handlers, payload.make)()
    make = f"process_handlers:{payload.make}"
    inline, away, copied = [], [], []
    kind = system.name.partition(":")[0]
    with ours.here(here, executor="inline", **settings) as near:
        with OPENED[kind](make, **settings) as far:
            _check(near.map(items), far.map(items))
            for _ in range(parameters["warm_up"]):
                far.map(items)
            for _ in range(parameters["rounds" if not pictures else "picture_rounds"]):
                inline.append(_time(lambda: near.map(items)))
                away.append(_time(lambda: far.map(items)))
                if pictures:
                    copied.append(_time(lambda: [each.copy() for each in pictures]))
    found = {"inline_seconds": median(inline), "away_seconds": median(away)}
    added = found["added_seconds"] = found["away_seconds"] - found["inline_seconds"]
    if copied:
        found["copy_seconds"] = median(copied)
        found["copies"] = added / found["copy_seconds"]
    return found


def _check(near: list[Any], far: list[Any]) -> None:
    import numpy

    if not all(map(numpy.array_equal, near, far)):
        raise RuntimeError("what came from the other process is something else")


def _time(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    kept = work()  # so that what it made is not freed within this time
    taken = time.perf_counter() - began
    del kept
    return taken
