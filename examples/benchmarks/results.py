"""What did a benchmark measure? Reading a result, and writing tables of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
EMPTY = "-"


@dataclass(frozen=True)
class Aim:
    """What was aimed at: that *measured* is at most *limit*."""

    text: str
    measured: float | None
    limit: float
    unit: str = "x"

    @property
    def verdict(self) -> str:
        """``met``, ``not met`` or ``not measured``."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.limit else "not met"


class Result:
    """One benchmark's JSON, with the questions that tables and plots ask of it."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.cells: list[dict[str, Any]] = data["cells"]

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what ``write`` wrote."""
        return cls(json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Replace *path* at once: a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(unfinished, path)

    def systems(self) -> list[str]:
        """The systems that were measured, in the order they were asked for."""
        return list(dict.fromkeys(cell["system"] for cell in self.cells))

    def values(self, key: str) -> list[Any]:
        """What a parameter was set to, in order: ``result.values("callers")``."""
        found = dict.fromkeys(cell[key] for cell in self.cells if key in cell)
        return sorted(found) if all(isinstance(x, int) for x in found) else list(found)

    def cell(self, system: str, **keys: Any) -> dict[str, Any] | None:
        """The cell of a system and its parameters, or None."""
        wanted = {"system": system, **keys}.items()
        return next((cell for cell in self.cells if wanted <= _flat(cell)), None)

    def metric(self, system: str, name: str, **keys: Any) -> dict[str, Any] | None:
        """``{"median", "min", "max", "values"}``, or None where nothing was seen."""
        found = (self.cell(system, **keys) or {}).get("metrics", {}).get(name)
        return found if found and found["median"] is not None else None

    def median(self, system: str, name: str, **keys: Any) -> float | None:
        """A metric's median over the repeats, or None."""
        found = self.metric(system, name, **keys)
        return found and found["median"]

    def ratio(self, system: str, to: str, name: str, **keys: Any) -> float | None:
        """A median over another system's, or None where either is unknown."""
        above, below = self.median(system, name, **keys), self.median(to, name, **keys)
        return above / below if above is not None and below else None

    def text(
        self,
        system: str,
        name: str,
        scale: float = 1.0,
        spread: bool = True,
        **keys: Any,
    ) -> str:
        """A cell of a table: ``median (min-max)``, or that there is none.

        Args:
            scale: What the figures are multiplied with, to change their unit.
            spread: Whether (min-max) is shown; *keys* are the cell's parameters.
        """
        found, cell = self.metric(system, name, **keys), self.cell(system, **keys)
        if found:
            low, middle, high = (found[k] * scale for k in ("min", "median", "max"))
            if low == high or not spread:
                return brief(middle)
            return f"{brief(middle)} ({brief(low)}-{brief(high)})"
        if cell is None:
            return EMPTY
        calls = cell.get("metrics", {}).get("calls_per_second")
        if calls and calls["median"] == 0:
            return "0 calls"
        return "failed" if "failed" in cell else "no figure"


def _flat(cell: dict[str, Any]) -> Any:
    """The items of a cell that can be compared."""
    return {k: v for k, v in cell.items() if k not in ("metrics", "failed")}.items()


def least(numbers: Iterable[float | None]) -> float | None:
    """The least of those that are known."""
    return min((n for n in numbers if n is not None), default=None)


def most(numbers: Iterable[float | None]) -> float | None:
    """The greatest; None if one of them is not known."""
    known = list(numbers)
    return None if not known or None in known else max(known)  # type: ignore


def brief(number: float | None) -> str:
    """Three significant digits, with separators and no exponent."""
    if number is None:
        return EMPTY
    if abs(number) >= 100:
        return f"{number:,.0f}"
    if abs(number) >= 1:
        return f"{number:.{1 if abs(number) >= 10 else 2}f}"
    return f"{number:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A simple table of reStructuredText."""
    lines = [list(head), *([str(cell) or EMPTY for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = "  ".join("=" * width for width in widths)
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        for line in lines
    ]
    return "\n".join([rule, text[0], rule, *text[1:], rule])
