"""How are figures printed, so that they can be pasted into the README?"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from textwrap import fill


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a simple table of reStructuredText."""
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    rule = "  ".join("=" * width for width in widths)
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in cells
    ]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def conditions(command: str, *libraries: str) -> str:
    """Return what is needed to judge the figures, or to measure them again."""
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    text = (
        f"``{command}``, on {os.cpu_count()} cores of an {_processor()}, "
        f"{platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, {versions}, {date.today()}:"
    )
    return fill(text, 88, break_on_hyphens=False, break_long_words=False)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join(names[0].split()) if names else platform.machine()
