"""Run the suite, in several processes at once: most of its tests wait most of the time.

Each process has a part of the tests; what bounds elapsed time is run after all others,
alone. The output of the first is shown as it comes, that of the others when they end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from typing import IO

PLAIN = ["pytest"]
# Patched before pytest, and so the threading it imports, is loaded.
PATCHED = ["gevent.monkey", "--module", "pytest", "-rfE"]

NO_TESTS = 5
"""What pytest returns where nothing is left to be run."""


def main() -> int:
    """Run it; return what a shell should be told."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--patched", action="store_true", help="monkey-patched")
    parser.add_argument("--shards", type=int, default=1, help="processes")
    parser.add_argument("--reports", help="where to write PATH-1.xml and so on")
    parser.add_argument("-m", dest="marks", help="as pytest has it")
    options, more = parser.parse_known_args()
    command = [sys.executable, "-m", *(PATCHED if options.patched else PLAIN), *more]
    count = options.shards
    marks = [f"({options.marks})"] if options.marks else []
    if count == 1:
        parts = [marked(*marks)]
    else:
        parts = [
            [*marked(*marks, "not timing"), f"--shard={number}/{count}"]
            for number in range(1, count + 1)
        ]
        parts.append(marked(*marks, "timing"))
    if options.reports:
        for number, part in enumerate(parts, 1):
            part.append(f"--junitxml={options.reports}-{number}.xml")
    *together, last = [command + part for part in parts]
    codes = [*side_by_side(together), subprocess.call(last)]
    return next((code for code in codes if code not in (0, NO_TESTS)), 0)


def marked(*marks: str) -> list[str]:
    """Return what tells pytest to run tests that have all marks, if there are any."""
    return ["-m", " and ".join(marks)] if marks else []


def side_by_side(commands: list[list[str]]) -> list[int]:
    """Run some commands at once, and show what each of them wrote, one by one."""
    outputs: list[IO[bytes] | None] = [None]  # it has ours
    outputs += [tempfile.TemporaryFile() for _ in commands[1:]]
    running = [
        subprocess.Popen(command, stdout=output, stderr=output)
        for command, output in zip(commands, outputs)
    ]
    codes = []
    for process, output in zip(running, outputs):
        codes.append(process.wait())
        if output is not None:
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
            output.close()
    return codes


if __name__ == "__main__":
    sys.exit(main())
