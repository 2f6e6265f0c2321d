"""What does one call cost, in CPU time?

The handler returns its list, so that what is measured is the batcher. Callers ask in a
closed loop: 1, 10, 100, 1000 and 10,000 of them; native threads up to 1000. After a
warm-up, the CPU time of the whole process (``time.process_time``: every thread of it)
is divided by the calls that were answered. That includes the load, which is the same
for every system; ``floor:call`` shows how much it is. Nothing is subtracted.

One process measures all the cells of one system; ``gc.collect()`` runs before each, and
the garbage collector stays on. ``max_size`` is 64 and ``timeout`` 10 ms for all; for
the rest each library has its defaults.

A floor is the least that can park a caller and wake it, with no batcher: see
``systems/floors.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plots
from load import closed_loop
from registry import RIVALS, Benchmark, Cell, Metrics
from results import Aim, Result, least, table
from systems import SYSTEMS, System

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_THREADS = 1000
INLINE, POOL, THREAD = "ours:gevent:inline", "ours:gevent:threadpool", "ours:thread"
WAITER, U002 = "floor:waiter", "ubatch-0.0.2:gevent"


def cells(system: System, parameters: Cell) -> Sequence[Cell]:
    """Return the numbers of callers; the load by itself is one caller."""
    callers = parameters["callers"]
    if system.name == "floor:call":
        callers = callers[:1]
    if system.world == "thread":
        callers = [n for n in callers if n <= MOST_THREADS]
    return [{"callers": n} for n in callers]


def measure(system: System, cell: Cell, parameters: Cell) -> Metrics:
    """Return ``cpu_us``, ``calls_per_second``, ``p50_us`` and ``p99_us``."""
    return closed_loop(
        system,
        cell["callers"],
        parameters["seconds"],
        parameters["warm_up"],
        handler=lambda items: items,
        max_size=64,
        timeout=0.01,
    )


def show(result: Result) -> str:
    """Return the table of CPU times, and those of throughput and latency."""
    return "\n\n".join(
        f"{title}\n\n{_table(result, metric, scale)}"
        for title, metric, scale in (
            ("CPU time per call, in microseconds:", "cpu_us", 1.0),
            ("Thousands of calls per second, medians:", "calls_per_second", 0.001),
            ("Latency (p50) in milliseconds, medians:", "p50_us", 0.001),
        )
    )


def _table(result: Result, metric: str, scale: float) -> str:
    callers = result.values("callers")
    main = metric == "cpu_us"
    head = ["system", *(f"{n:,} caller{'s' * (n > 1)}" for n in callers)]
    if main:
        head += ["/ Waiter (100)", "0.0.2 / it (100)"]
    rows = []
    for system in result.systems():
        cells = (result.text(system, metric, scale, main, callers=n) for n in callers)
        row = [system, *cells]
        if main:
            row += [
                _over_the_floor(result, system),
                _times(result.ratio(U002, system, metric, callers=100)),
            ]
        rows.append(row)
    return table(head, rows)


def _over_the_floor(result: Result, system: str) -> str:
    """Return the multiple of a greenlet's floor; threads and tasks have another."""
    if SYSTEMS[system].world != "gevent":
        return "-"
    return _times(result.ratio(system, WAITER, "cpu_us", callers=100))


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def aims(result: Result) -> list[Aim]:
    """What was aimed at: multiples of the floor and of the others."""

    def ratio(system: str, to: str, callers: int) -> float | None:
        return result.ratio(system, to, "cpu_us", callers=callers)

    found = [
        Aim(f"{name}, {n} callers, over the Waiter floor", ratio(system, WAITER, n), x)
        for name, system, x in (("inline", INLINE, 1.5), ("threadpool", POOL, 2.5))
        for n in (100, 1000)
    ]
    for name, system in ("inline", INLINE), ("threadpool", POOL):
        many, few = (result.median(system, "cpu_us", callers=n) for n in (10_000, 1000))
        measured = many / few if many and few else None
        found.append(Aim(f"{name}, 10,000 callers over 1000", measured, 1.1))
    for name, system in ("inline", INLINE), ("threadpool", POOL):
        measured = ratio(system, U002, 100)
        found.append(Aim(f"{name}, 100 callers, over 0.0.2", measured, round(1 / 6, 3)))
    best = least(_rivals_on_threads(result))
    ours = result.median(THREAD, "cpu_us", callers=100)
    measured = ours / best if ours and best else None
    return [*found, Aim("threads, 100 callers, over the best rival", measured, 0.5)]


def _rivals_on_threads(result: Result) -> list[float | None]:
    return [
        result.median(system, "cpu_us", callers=100)
        for system in result.systems()
        if system.endswith(":thread") and not system.startswith("ours")
    ]


def plot(result: Result, figure: Figure) -> None:
    """Draw CPU time over callers, both logarithmic, a line for each system."""
    axes: Any = figure.add_subplot()
    plots.lines(axes, result, "callers", "cpu_us")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="concurrent callers",
        ylabel="CPU time per call, µs",
        title="What one call costs (no-op handler)",
    )


BENCHMARK = Benchmark(
    name="cost",
    question="What does one call cost, in CPU time?",
    systems=("ours", "floor", *RIVALS),
    cells=cells,
    measure=measure,
    table=show,
    plot=plot,
    aims=aims,
    full={"callers": [1, 10, 100, 1000, 10_000], "seconds": 0.2, "warm_up": 0.06},
    quick={"callers": [1, 100], "seconds": 0.05, "warm_up": 0.02},
)

if __name__ == "__main__":
    from cli import main

    main([BENCHMARK.name])
