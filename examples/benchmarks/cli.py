"""How are benchmarks run from the command line?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from registry import NAMES, load
from results import FOLDER
from systems import SYSTEMS, selected


def main(only: Sequence[str] = (), argv: Sequence[str] | None = None) -> None:
    """Run benchmarks, then the report.

    Args:
        only: What a benchmark's own program runs; empty to let the user choose.
        argv: The arguments; those of the process by default.
    """
    options = _parser(only).parse_args(argv)
    names = list(only) or options.names or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    try:
        chosen = options.systems and selected(options.systems.split(","))
    except ValueError as error:
        sys.exit(str(error))
    try:
        from measure import measure
        from report import report
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: pip install 'ubatch[bench]'")
    for name in names:
        benchmark = load(name)
        systems = selected(benchmark.systems)
        if chosen:
            systems = [system for system in systems if system in chosen]
        result = measure(benchmark, systems, options.repeats, options.quick)
        result.write(options.results / f"{name}.json")
    print(report(options.results))


def _parser(only: Sequence[str]) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:8} {load(name).question}" for name in only or NAMES)
    parser = argparse.ArgumentParser(
        description=f"Measure, and write tables and plots.\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if not only:
        parser.add_argument(
            "names", nargs="*", metavar="NAME", help="which to run; all by default"
        )
    parser.add_argument(
        "--repeats", type=_count, default=5, help="runs of each system (default: 5)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a try-out; its figures mean little"
    )
    parser.add_argument(
        "--systems",
        metavar="A,B",
        help="only these, or those that begin so: ours,floor. All: "
        + ", ".join(SYSTEMS),
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=FOLDER,
        metavar="FOLDER",
        help="where results are written (default: examples/benchmarks/results)",
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
