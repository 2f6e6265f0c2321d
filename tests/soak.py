"""Does anything grow while a batcher runs on and on?

A child on gevent, then one on native threads, with the handler in the child, in model
processes of its own, and in a model server's, each for a sixth of the minutes: callers
call, and of their calls 5 % fail and 5 % are given up by the caller; some spoil their
batch, which is then run again in parts, and some hang for longer than a handler may.
Model processes are killed meanwhile. Now and then all pause, and what there is then is
counted. The tables tell what a line through these counts says of the growth; the exit
code, whether that is within noise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from math import sqrt
from typing import Any, NamedTuple

from tests.children import PATIENCE, ROOT, environment
from tests.progress import progress
from tests.soak_handler import LEAK
from tests.tables import conditions, table

KINDS = ("gevent", "thread")
PLACES = {
    "worker": "The handler in the child",
    "process": "In two model processes of the child's",
    "server": "In two of a model server's",
}

WARM_UP = 0.3
"""The share of the samples that is left out: pools and the allocator fill up."""

MB = 1e6
HERE = {
    "rss": 2 * MB,
    "fds": 2.0,
    "threads": 2.0,
    "greenlets": 2.0,
    "batches": 2.0,
    "futures": 2.0,
}
BESIDE = {"models": 0.5, "model_rss": 2 * MB, "model_fds": 2.0}
SERVER = {"server_rss": 2 * MB, "server_fds": 2.0, "server_threads": 2.0}
FLOORS = {
    "worker": HERE,
    "process": {**HERE, **BESIDE},
    "server": {**HERE, **BESIDE, **SERVER},
}
"""Growth over a run that is within noise, whatever the samples say, by place.

A line through a few samples of memory has a slope; one object more or less is one.
"""

FILLED = {("thread", "server"): {"rss": 8 * MB}}
"""Instead of these: 64 threads that ask, each of which keeps some memory that it had,
until after some hundred thousand calls that is 0.1 MB for each."""

HIRED = {("thread", "server"): {"threads": 64.0}}
"""Instead of these, in a short run: there is a thread for each ask that is under way,
hired when there first are as many, which in some seconds there may not have been."""

HAPPENS = {"reruns": "runs of parts of a batch", "stuck": "workers stuck, replaced"}
KILLED = {"kills": "model processes killed"}
EVENTS = {"worker": HAPPENS, "process": {**HAPPENS, **KILLED}, "server": KILLED}
"""What has to happen, or the run has shown nothing of it."""

SHORT = 20.0
"""Seconds under which a run need not show that much: it is a test of this program."""

CALLS_PER_MINUTE = 100_000
"""A million in ten minutes, or the run has shown too little."""


class Growth(NamedTuple):
    """What a line through the samples says, over the time of the samples."""

    first: float
    last: float
    growth: float
    error: float
    """Two standard errors of the growth."""

    def within(self, floor: float) -> bool:
        """Tell whether it is no more than noise."""
        return self.growth <= max(floor, self.error)


def line_through(times: list[float], counts: list[float]) -> Growth:
    """Fit a line by least squares."""
    n, span = len(times), times[-1] - times[0]
    mean_t, mean_c = sum(times) / n, sum(counts) / n
    spread = sum((t - mean_t) ** 2 for t in times)
    slope = sum((t - mean_t) * (c - mean_c) for t, c in zip(times, counts)) / spread
    left = [c - mean_c - slope * (t - mean_t) for t, c in zip(times, counts)]
    error = sqrt(sum(each**2 for each in left) / max(n - 2, 1) / spread)
    return Growth(counts[0], counts[-1], slope * span, 2 * error * span)


class Run(NamedTuple):
    """All that was counted in one run."""

    kind: str
    place: str
    seconds: float
    samples: list[dict[str, Any]]

    @property
    def floors(self) -> dict[str, float]:
        """Growth that is within noise."""
        where = self.kind, self.place
        floors = {**FLOORS[self.place], **FILLED.get(where, {})}
        return floors if self.seconds >= SHORT else {**floors, **HIRED.get(where, {})}

    def growth(self, what: str) -> Growth:
        """Return how something grew once the run was warm."""
        kept = self.samples[int(len(self.samples) * WARM_UP) :]
        return line_through([s["at"] for s in kept], [s[what] for s in kept])

    def total(self, what: str) -> int:
        """Return how many calls there were, or how many of some end."""
        return int(self.samples[-1][what])

    def faults(self) -> list[str]:
        """Return what is not as it must be."""
        floors = self.floors
        grown = {what: self.growth(what) for what in floors}
        bad = [
            f"{what} grew: {grown[what]}"
            for what, floor in floors.items()
            if not grown[what].within(floor)
        ]
        if self.seconds >= SHORT:
            bad += self._unseen()
        return [f"{self.kind}, {self.place}: {fault}" for fault in bad]

    def _unseen(self) -> Iterator[str]:
        for event, title in EVENTS[self.place].items():
            if not self.total(event):
                yield f"no {title}"
        if self.total("calls") < CALLS_PER_MINUTE * self.seconds / 60:
            yield f"too few calls: {self.total('calls')}"


def main() -> int:
    """Run both kinds, print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of them")
    parser.add_argument("--leak", action="store_true", help="leak, to see it noticed")
    parser.add_argument("--kind", choices=KINDS, help="only that")
    parser.add_argument("--place", choices=PLACES, help="only there")
    options = parser.parse_args()
    kinds = [options.kind] if options.kind else [*KINDS]
    places = [options.place] if options.place else [*PLACES]
    seconds = options.minutes * 60 / (len(kinds) * len(places))
    runs = [
        Run(kind, place, seconds, list(_samples(kind, place, seconds, options.leak)))
        for place in places
        for kind in kinds
    ]
    command = f"make soak MINUTES={options.minutes:g}"
    if options.kind or options.place:
        command = f"python -m tests.soak --minutes {options.minutes:g}"
        command += f" --kind {options.kind}" if options.kind else ""
        command += f" --place {options.place}" if options.place else ""
    print(conditions(command, "gevent"))
    for place in places:
        these = [run for run in runs if run.place == place]
        print(f"\n{PLACES[place]}:\n\n{_table(these)}")
    bad = [fault for run in runs for fault in run.faults()]
    for fault in bad:
        print(fault, file=sys.stderr)
    return 1 if bad else 0


def _table(runs: list[Run]) -> str:
    events = EVENTS[runs[0].place]
    head = ["what", *(title for run in runs for title in (run.kind, "growth"))]
    rows = [["calls"]]
    for run in runs:
        rows[0] += [f"{run.total('calls'):,}", ""]
    ends = ["failed", "cancelled", "expired"]
    ends += ["lost"] if "kills" in events else []
    for end in ends:
        rows.append([f"of them {end}"])
        for run in runs:
            rows[-1] += [f"{run.total(end) / run.total('calls'):.1%}", ""]
    for what, title in events.items():
        rows.append([title])
        for run in runs:
            rows[-1] += [f"{run.total(what):,}", ""]
    for what in FLOORS[runs[0].place]:
        memory = what.endswith("rss")
        unit, digits = (MB, 1) if memory else (1.0, 0)
        title = what.replace("rss", "RSS, MB").replace("_", " ")
        rows.append([title])
        for run in runs:
            found = run.growth(what)
            first, last = found.first / unit, found.last / unit
            growth, error = found.growth / unit, found.error / unit
            rows[-1] += [f"{first:.{digits}f} to {last:.{digits}f}"]
            rows[-1] += [f"{growth:+.2f} ± {error:.2f}"]
        bounds = dict.fromkeys(f"{run.floors[what] / unit:g}" for run in runs)
        rows[-1].append(f"{' and '.join(bounds)}, or ±")
    calls = f">= {CALLS_PER_MINUTE:,} a minute"
    rows[0].append(calls)
    return table(
        [*head, "growth at most"],
        [row + [""] * (len(head) + 1 - len(row)) for row in rows],
    )


def _samples(
    kind: str, place: str, seconds: float, leak: bool
) -> Iterator[dict[str, Any]]:
    """Run a child; return what it counts."""
    tell = progress(f"soak, {kind}, {place}", seconds)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.soak_child", kind, place, f"{seconds}"],
        cwd=ROOT,
        env=environment(**({LEAK: "1"} if leak else {})),
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                sample = json.loads(line)
                tell(sample["at"])
                yield sample
            child.wait(PATIENCE)
        finally:
            child.kill()
    if child.returncode:
        sys.exit(f"{kind}, {place}: the child ended with {child.returncode}")


if __name__ == "__main__":
    sys.exit(main())
