"""What passed where? ``make test-all`` asks.

Reads the reports of ``pytest --junitxml`` in a folder; the suite writes into them what
it ran on. Prints a table for the README: one row for each Python, gevent and loop.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

Place = tuple[str, ...]
"""Where the suite ran: the columns PLACE."""

PLACE = "Python", "gevent", "greenlet", "loop"
LEGS = "plain", "patched"
COUNTS = "passed", "failed", "skipped"


class Run(NamedTuple):
    """How one run of the suite ended."""

    place: Place
    leg: str
    counts: tuple[int, int, int]
    seconds: float

    def with_(self, other: Run | None) -> Run:
        """Return both as one: the suite may run in parts."""
        if other is None:
            return self
        passed, failed, skipped = map(sum, zip(self.counts, other.counts))
        seconds = self.seconds + other.seconds
        return self._replace(counts=(passed, failed, skipped), seconds=seconds)


def main(folder: Path) -> None:
    """Print the table; exit with an error if anything failed, or nothing ran."""
    runs = [read(path) for path in sorted(folder.glob("*.xml"))]
    places: defaultdict[Place, dict[str, Run]] = defaultdict(dict)
    for run in runs:
        places[run.place][run.leg] = run.with_(places[run.place].get(run.leg))
    rows = [
        (*place, *(cell(legs.get(leg)) for leg in LEGS), seconds(legs.values()))
        for place, legs in sorted(places.items(), key=lambda item: order(item[0]))
    ]
    print(f"Tests {', '.join(COUNTS)}:\n")
    print(table([(*PLACE, *LEGS, "seconds"), *rows]))
    total = [sum(column) for column in zip((0, 0, 0), *(run.counts for run in runs))]
    print(f"\n{total[0]} passed, {total[1]} failed, {total[2]} skipped")
    sys.exit(total[1] > 0 or not runs)


def read(path: Path) -> Run:
    """Read one report."""
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    told = {one.get("name"): str(one.get("value")) for one in suite.iter("property")}
    tests, failures, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return Run(
        tuple(told.get(name, "?") for name in PLACE),
        told.get("leg", path.stem),
        (tests - failed - skipped, failed, skipped),
        float(suite.get("time", 0)),
    )


def order(place: Place) -> tuple[str, list[list[int]]]:
    """Sort by loop, then by versions."""
    *versions, loop = place
    return loop, [[int(n) for n in one.split(".") if n.isdigit()] for one in versions]


def cell(run: Run | None) -> str:
    """Say how one run ended; one that broke off has left no report, or less of it."""
    return "did not end" if run is None else ", ".join(map(str, run.counts))


def seconds(runs: Iterable[Run]) -> str:
    """Say how long they took together."""
    return f"{sum(run.seconds for run in runs):.0f}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Lay out rows, of which the first is the head, as reStructuredText."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()
        for row in rows
    ]
    rule = "  ".join("=" * width for width in widths)
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
