"""What is a benchmark, and which are there?

A benchmark is a module beside this one with a constant ``BENCHMARK``. It asks for
*cells*, each a dict of what is varied, such as ``{"callers": 100}``; a cell is measured
in a child process, in the environment of one system; the framework repeats, collects
and reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from results import Aim, Result
    from systems import System

NAMES = ("cost", "lone", "stall", "serve", "process", "linger", "growth")
"""In the order of the report."""

RIVALS = ("ubatch-0.0.2", "service-streamer", "batched", "ray-serve", "bentoml")
"""The systems that do what ours does."""

Cell = Mapping[str, Any]
Metrics = Mapping[str, "float | None"]


@dataclass(frozen=True)
class Benchmark:
    """One question, how it is measured, and how its answer is shown."""

    name: str
    """The module's name, and the stem of the files in ``results/``."""
    question: str
    """One line, for ``--help`` and above the table."""
    systems: Sequence[str]
    """Names of ``systems.SYSTEMS``, or what they begin with, such as ``"floor"``."""
    cells: Callable[[System, Cell], Sequence[Cell]]
    """(system, parameters): what to measure of this system, in this order."""
    measure: Callable[[System, Cell, Cell], Metrics]
    """(system, cell, parameters): the figures. Runs in a child process, where only
    the standard library and the system itself can be imported. What it raises makes
    its cell failed; the child goes on with the next one."""
    table: Callable[[Result], str]
    """The tables, in reStructuredText, without a title."""
    plot: Callable[[Result, Figure], None]
    """Draws on an empty matplotlib figure, to be saved as ``results/NAME.svg``."""
    aims: Callable[[Result], Sequence[Aim]] = lambda result: ()
    """What was aimed at, and what was reached."""
    full: Cell = field(default_factory=dict)
    """The parameters of a real run."""
    quick: Cell = field(default_factory=dict)
    """What ``--quick`` changes in them: a try-out, whose figures mean little."""
    most_repeats: int = 1000
    """However many are asked for: where a run is long and its figures are steady."""
    limit: float = 120.0
    """Seconds after which a child is ended, and what it did not measure is failed."""
    requirements: Sequence[str] = ()
    """What a rival's environment needs for this benchmark beside the rival."""


def load(name: str) -> Benchmark:
    """Return the benchmark *name*."""
    benchmark: Benchmark = import_module(name).BENCHMARK
    return benchmark
