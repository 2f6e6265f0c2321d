"""Does anything grow while a batcher runs on and on?

A child on gevent, then one on native threads, each for half of the minutes: callers
call, and of their calls 5 % fail and 5 % are given up by the caller; some spoil their
batch, which is then run again in parts, and some hang for longer than a handler may.
Now and then all pause, and what there is then is counted. The table tells what a line
through these counts says of the growth; the exit code, whether that is within noise.
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
from tests.tables import conditions, table

KINDS = ("gevent", "thread")

WARM_UP = 0.3
"""The share of the samples that is left out: pools and the allocator fill up."""

MB = 1e6
FLOORS = {
    "rss": 2 * MB,
    "fds": 2.0,
    "threads": 2.0,
    "greenlets": 2.0,
    "batches": 2.0,
    "futures": 2.0,
}
"""Growth over a run that is within noise, whatever the samples say.

A line through a few samples of memory has a slope; one object more or less is one.
"""

EVENTS = {"reruns": "runs of parts of a batch", "stuck": "workers stuck, replaced"}
"""What has to happen, or the run has shown nothing of it."""

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
    seconds: float
    samples: list[dict[str, Any]]

    def growth(self, what: str) -> Growth:
        """Return how something grew once the run was warm."""
        kept = self.samples[int(len(self.samples) * WARM_UP) :]
        return line_through([s["at"] for s in kept], [s[what] for s in kept])

    def total(self, what: str) -> int:
        """Return how many calls there were, or how many of some end."""
        return int(self.samples[-1][what])

    def faults(self) -> list[str]:
        """Return what is not as it must be."""
        grown = {what: self.growth(what) for what in FLOORS}
        bad = [
            f"{self.kind}: {what} grew: {grown[what]}"
            for what, floor in FLOORS.items()
            if not grown[what].within(floor)
        ]
        bad += [f"{self.kind}: no {EVENTS[e]}" for e in EVENTS if not self.total(e)]
        if self.total("calls") < CALLS_PER_MINUTE * self.seconds / 60:
            bad.append(f"{self.kind}: too few calls: {self.total('calls')}")
        return bad


def main() -> int:
    """Run both kinds, print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for both kinds")
    parser.add_argument("--leak", action="store_true", help="leak, to see it noticed")
    options = parser.parse_args()
    seconds = options.minutes * 60 / len(KINDS)
    runs = [
        Run(kind, seconds, list(_samples(kind, seconds, options.leak)))
        for kind in KINDS
    ]
    command = f"make soak MINUTES={options.minutes:g}"
    print(f"{conditions(command, 'gevent')}\n\n{_table(runs)}")
    bad = [fault for run in runs for fault in run.faults()]
    for fault in bad:
        print(fault, file=sys.stderr)
    return 1 if bad else 0


def _table(runs: list[Run]) -> str:
    head = ["what", *(title for run in runs for title in (run.kind, "growth"))]
    rows = [["calls"]]
    for run in runs:
        rows[0] += [f"{run.total('calls'):,}", ""]
    for end in ("failed", "cancelled", "expired"):
        rows.append([f"of them {end}"])
        for run in runs:
            rows[-1] += [f"{run.total(end) / run.total('calls'):.1%}", ""]
    for what, title in EVENTS.items():
        rows.append([title])
        for run in runs:
            rows[-1] += [f"{run.total(what):,}", ""]
    for what, floor in FLOORS.items():
        unit, digits = (MB, 1) if what == "rss" else (1.0, 0)
        rows.append(["RSS, MB" if what == "rss" else what])
        for run in runs:
            found = run.growth(what)
            first, last = found.first / unit, found.last / unit
            growth, error = found.growth / unit, found.error / unit
            rows[-1] += [f"{first:.{digits}f} to {last:.{digits}f}"]
            rows[-1] += [f"{growth:+.2f} ± {error:.2f}"]
        rows[-1].append(f"{floor / unit:g}, or ±")
    calls = f">= {CALLS_PER_MINUTE:,} a minute"
    rows[0].append(calls)
    return table(
        [*head, "growth at most"], [row + [""] * (6 - len(row)) for row in rows]
    )


def _samples(kind: str, seconds: float, leak: bool) -> Iterator[dict[str, Any]]:
    """Run a child; return what it counts."""
    tell = progress(f"soak, {kind}", seconds)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.soak_child", kind, f"{seconds}", f"{int(leak)}"],
        cwd=ROOT,
        env=environment(),
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
        sys.exit(f"{kind}: the child ended with {child.returncode}")


if __name__ == "__main__":
    sys.exit(main())
