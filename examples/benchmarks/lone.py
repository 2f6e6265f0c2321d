"""How much later does a lone call get its answer than by calling the handler?

One caller asks, waits, and asks again: there is no company to wait for. The handler
takes 1 ms, either ``spin`` (Python code, which holds the GIL) or ``native``
(``time.sleep`` in C, which releases it). *Added* is the median latency of the call,
less the median of the same handler called directly in the same process just before;
that one is shown as *direct*. The added 99th percentile is over that median too.

Every library has ``timeout`` 10 ms, ``max_size`` 64 and otherwise its defaults; the
load is that of ``load.py``, with one caller.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plots
from load import closed_loop, percentiles
from registry import RIVALS, Benchmark, Cell, Metrics
from results import Aim, Result, table
from systems import System

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORK = 0.001
"""Seconds that the handler takes."""


def cells(system: System, parameters: Cell) -> Sequence[Cell]:
    """Return the two kinds of handler."""
    return [{"handler": "spin"}, {"handler": "native"}]


def measure(system: System, cell: Cell, parameters: Cell) -> Metrics:
    """Return the latencies in microseconds: direct, and what is added to it."""
    handler = _spin if cell["handler"] == "spin" else _native(system)
    direct = _direct(handler, parameters["direct"])
    seen = closed_loop(
        system,
        1,
        parameters["seconds"],
        parameters["warm_up"],
        handler=handler,
        max_size=64,
        timeout=0.01,
    )
    p50, p99 = seen["p50_us"], seen["p99_us"]
    return {
        "direct_us": direct,
        "p50_us": p50,
        "p99_us": p99,
        "added_p50_us": None if p50 is None else p50 - direct,
        "added_p99_us": None if p99 is None else p99 - direct,
        "calls_per_second": seen["calls_per_second"],
    }


def _spin(items: list[Any]) -> list[Any]:
    end = time.perf_counter() + WORK
    while time.perf_counter() < end:
        pass
    return items


def _native(system: System) -> Any:
    """Return a handler that sleeps in C: never gevent's ``sleep``."""
    sleep = time.sleep
    if system.patched:
        from gevent.monkey import get_original

        sleep = get_original("time", "sleep")

    def handler(items: list[Any]) -> list[Any]:
        sleep(WORK)
        return items

    return handler


def _direct(handler: Any, calls: int) -> float:
    """Return the median of calling it, in microseconds."""
    taken = []
    for _ in range(calls):
        begun = time.perf_counter()
        handler([0])
        taken.append(time.perf_counter() - begun)
    return (percentiles(taken)[0] or 0.0) * 1e6


def show(result: Result) -> str:
    """Return the table: added latency for both handlers, in milliseconds."""
    columns = [
        (handler, metric, title)
        for handler in result.values("handler")
        for metric, title in (
            ("added_p50_us", "added p50"),
            ("added_p99_us", "added p99"),
            ("direct_us", "direct"),
        )
    ]
    head = ["system", *(f"{handler}: {title}" for handler, _, title in columns)]
    rows = [
        [system, *(result.text(system, m, 0.001, handler=h) for h, m, _ in columns)]
        for system in result.systems()
    ]
    return f"Milliseconds, for a handler of 1 ms:\n\n{table(head, rows)}"


def aims(result: Result) -> list[Aim]:
    """What was aimed at: hundredths of a millisecond."""
    found = []
    for name, system, limit in (
        ("inline", "ours:gevent:inline", 0.15),
        ("threadpool", "ours:gevent:threadpool", 0.3),
    ):
        for handler in result.values("handler"):
            added = result.median(system, "added_p50_us", handler=handler)
            measured = None if added is None else added / 1000
            found.append(Aim(f"{name}, {handler}: added p50", measured, limit, "ms"))
    return found


def plot(result: Result, figure: Figure) -> None:
    """Draw a bar for each system and handler, on a logarithmic axis."""
    axes: Any = figure.add_subplot()
    plots.bars(axes, result, "handler", "added_p50_us", 0.001)
    axes.set(
        xscale="log",
        xlabel="added to the handler's 1 ms, median, ms",
        title="What a lone call waits for",
    )


BENCHMARK = Benchmark(
    name="lone",
    question="How much later is a lone call answered than by calling the handler?",
    systems=("ours", *RIVALS),
    cells=cells,
    measure=measure,
    table=show,
    plot=plot,
    aims=aims,
    full={"seconds": 0.45, "warm_up": 0.1, "direct": 80},
    quick={"seconds": 0.1, "warm_up": 0.05, "direct": 20},
)

if __name__ == "__main__":
    from cli import main

    main([BENCHMARK.name])
