"""Does every request get its own answer, or a reason, whatever befalls the server?

A gunicorn of two gevent workers serves Flask and six batchers under steady load while
workers are reloaded, ended and killed, and so are the model processes and the model
server of two of these; handlers raise, hang and return garbage, clients are slow and
leave. The table tells what became of every request; the exit code, whether all of them
fared as they must.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.report import text
from tests.chaos.trial import Trial
from tests.progress import progress
from tests.tables import conditions

RATE = 250.0
"""Requests a second: what two workers and their load can do on two cores."""

TOLD = 10
"""Requests that must not be, of which the evidence is printed."""


def main() -> int:
    """Run a trial, print its table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    parser.add_argument("--kind", choices=("gevent", "gthread"), default="gevent")
    parser.add_argument("--seed", type=int, default=1, help="the same: the same faults")
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second")
    parser.add_argument("--keep", type=Path, help="a folder for the records and logs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        home = options.keep or Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        tell = progress("chaos", options.seconds)
        trial = Trial(home, options.kind, options.seed, options.rate, tell)
        result = trial.run(options.seconds)
    command = f"make chaos SECONDS={options.seconds:g}"
    if (options.kind, options.seed, options.rate) != ("gevent", 1, RATE):
        command = f"python -m tests.chaos --kind {options.kind} --seed {options.seed} "
        command += f"--rate {options.rate:g} --seconds {options.seconds:g}"
    libraries = ("gevent", "gunicorn", "flask")
    print(f"{conditions(command, *libraries)}\n\n{text(result.rows)}")
    for line in result.guilty[:TOLD]:
        print(line, file=sys.stderr)
    bad = [row for row in result.rows if not row.good]
    for row in bad:
        print(f"{row.what}: {row.measured}, not {row.bound}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
