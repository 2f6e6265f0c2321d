"""Does the default linger do as well as the best of the others, whatever the load?

The same loads for ``now``, ``settle``, ``full`` and ``adaptive``, the default. The
handler sleeps in C for 2, 10 or 20 ms and 0.05 ms more per call: on a native thread,
or *inline*, where it keeps the hub. ``max_size`` is 64. ``timeout`` is 20 ms, not less
than the handler takes for a batch of any size: a shorter one would end every wait that
can pay. Each call is preceded by 0 or 0.1 ms of work on the hub, as for a request.

- Closed loops of 16, 64 and 256 clients.
- Poisson streams at 30, 60 and 90 % of what the handler, or the hub, can do at most;
  the same moments for every linger and in every repeat.
- Bursts of 20 new connections to a real gunicorn with a tiny Flask app: ``bursts.py``.

The lingers take turns in each repeat, so the one is compared with the other in the same
second: *against the best* is the median over the repeats of adaptive's figure over that
of the fixed linger which has the best median, and (min-max). It is turned so that
1.1 means 10 % worse, for throughput as for latency. The best of three is partly luck:
it would beat itself by some of the noise, which is shown. Where less than 5 % cannot
be told from noise, the 90th percentile, over more calls, is compared too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import plots
from registry import Benchmark, Cell, Metrics
from results import Aim, Result, table
from systems import System

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EACH = 0.00005
"""Seconds that the handler takes for one more call."""
OWN = 0.00005
"""About what a call costs the hub beside the work: a greenlet, a socket, a place."""
MAX_SIZE, TIMEOUT = 64, 0.02
OURS = "linger:adaptive"
FIXED = ("linger:now", "linger:settle", "linger:full")
THROUGHPUT = "calls_per_second"
NEAR = 1.05
"""What counts as doing as well as the best."""
NOT_KEYS = ("system", "metrics", "failed", "failures")
METRICS = {"throughput": THROUGHPUT, "p90": "p90_ms", "p99": "p99_ms"}


def cells(system: System, parameters: Cell) -> Sequence[Cell]:
    """Return closed loops, streams and bursts."""
    names = {
        "closed": ("executor", "fixed_ms", "clients", "work_us"),
        "poisson": ("executor", "fixed_ms", "percent", "work_us"),
        "burst": ("fixed_ms", "workers"),
    }
    return [
        {"load": load, **dict(zip(keys, values))}
        for load, keys in names.items()
        for values in parameters[load]
    ]


def measure(system: System, cell: Cell, parameters: Cell) -> Metrics:
    """Return throughput, latency, the mean batch, and CPU time without the work."""
    from bursts import bursts
    from traffic import Handler, closed_loop, poisson

    fixed = cell["fixed_ms"] / 1000
    if cell["load"] == "burst":
        linger = system.name.partition(":")[2]
        return bursts(linger, fixed, EACH, cell["workers"], parameters)
    handler, work = Handler(fixed, EACH), cell["work_us"] / 1e6
    with system.open(handler, MAX_SIZE, TIMEOUT, executor=cell["executor"]) as call:
        if cell["load"] == "closed":
            return closed_loop(call, handler, work, cell["clients"], parameters)
        rate = cell["percent"] / 100 * capacity(cell["executor"], fixed, work)
        return poisson(call, handler, work, rate, parameters)


def capacity(executor: str, fixed: float, work: float) -> float:
    """Return the calls per second that full batches allow, or the hub does."""
    handled, work = fixed / MAX_SIZE + EACH, work + OWN
    return 1 / (handled + work if executor == "inline" else max(handled, work))


class Compared(NamedTuple):
    """How adaptive did against the best fixed linger, in one cell, by one metric."""

    cell: Cell
    best: str
    ratio: float
    """Above 1 it is worse."""
    low: float
    high: float

    @property
    def text(self) -> str:
        """What a table shows."""
        spread = f" ({self.low:.2f}-{self.high:.2f})" if self.low < self.high else ""
        return f"{self.ratio:.2f}{spread} {self.best}"


def compare(result: Result, cell: Cell, metric: str) -> Compared | None:
    """Compare adaptive with the best of the others; None where one is unknown."""
    more_is_better = metric == THROUGHPUT
    seen = {
        name: found["values"]
        for name in (OURS, *FIXED)
        if (found := result.metric(name, metric, **cell))
        and None not in found["values"]
    }
    if len(seen) < 1 + len(FIXED):
        return None
    middle = {name: median(seen[name]) for name in FIXED}
    best = (max if more_is_better else min)(FIXED, key=middle.__getitem__)
    ratios = [
        theirs / ours if more_is_better else ours / theirs
        for ours, theirs in zip(seen[OURS], seen[best])
    ]
    name = best.partition(":")[2]
    return Compared(cell, name, median(ratios), min(ratios), max(ratios))


def show(result: Result) -> str:
    """Return a table for each kind of load, and the noise."""
    parts = [
        _table(result, "closed", "calls per second, p99 in ms, mean batch", METRICS),
        _table(result, "poisson", "p50 and p99 in ms, mean batch", ("p90", "p99")),
        _table(
            result,
            "burst",
            "p50 and p99 in ms, handler calls per burst and (per burst and worker)",
            ("p90", "p99"),
        ),
        _noise(result),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(result: Result, load: str, shown: str, names: Any) -> str:
    rows = []
    for cell in _cells(result, load):
        against = [compare(result, cell, METRICS[name]) for name in names]
        rows.append(
            [
                title(cell),
                *(_figures(result, system, cell) for system in (*FIXED, OURS)),
                *(found.text if found else "-" for found in against),
            ]
        )
    head = ["load", "now", "settle", "full", "adaptive"]
    head += [f"{name}, against the best" for name in names]
    heading = {"closed": "Closed loops", "poisson": "Poisson", "burst": "Bursts"}[load]
    return f"{heading}: {shown}; medians:\n\n{table(head, rows)}" if rows else ""


def _figures(result: Result, system: str, cell: Cell) -> str:
    """Return what a table shows of one linger under one load."""
    shown = {
        "closed": f"{THROUGHPUT} p99_ms mean_batch",
        "poisson": "p50_ms p99_ms mean_batch",
        "burst": "p50_ms p99_ms calls_per_burst calls_per_share",
    }[cell["load"]]
    found = [result.text(system, name, 1, False, **cell) for name in shown.split()]
    if cell["load"] == "burst":
        found[-1] = f"({found[-1]})"
    return "  ".join(found).replace("  ", " ")


def title(cell: Cell) -> str:
    """Return a load's name in tables."""
    if cell["load"] == "burst":
        return f"{cell['fixed_ms']} ms, -w {cell['workers']}"
    who = f"{cell['clients']} clients" if "clients" in cell else f"{cell['percent']} %"
    where = "" if cell["executor"] == "threadpool" else "inline, "
    return f"{where}{cell['fixed_ms']} ms, {who}, work {cell['work_us']} us"


def _cells(result: Result, load: str | None = None) -> Iterator[dict[str, Any]]:
    """The loads that were measured, without what was seen."""
    for cell in result.cells:
        if cell["system"] == result.systems()[0] and load in (None, cell["load"]):
            yield {key: cell[key] for key in cell if key not in NOT_KEYS}


def _noise(result: Result) -> str:
    """Return how much one linger differs from itself, from repeat to repeat."""
    parts = []
    for name, metric in METRICS.items():
        spreads = [
            found["max"] / found["min"] - 1
            for system in result.systems()
            for cell in _cells(result)
            if (found := result.metric(system, metric, **cell))
        ]
        if spreads:
            usual, worst = median(spreads), max(spreads)
            parts.append(f"{name} {usual:.0%} (at most {worst:.0%})")
    return (
        "Noise, from the least to the greatest repeat of the same linger, median over "
        f"all cells:\n{', '.join(parts)}."
    )


def aims(result: Result) -> list[Aim]:
    """What was aimed at: within 5 % of the best everywhere, and whole bursts."""
    found = []
    for name, metric in METRICS.items():
        for load in ("closed",) if metric == THROUGHPUT else result.values("load"):
            everything = [
                compare(result, cell, metric) for cell in _cells(result, load)
            ]
            known = [one for one in everything if one is not None]
            worst = max(known, key=lambda one: one.ratio, default=None)
            where = f", of which the worst is {title(worst.cell)}" if worst else ""
            sure = sum(one.low > NEAR for one in known)
            near = sum(one.ratio <= NEAR for one in known)
            found.append(
                Aim(
                    f"{load}, {name}, against the best: {near} of {len(known)} near, "
                    f"{sure} worse in every repeat{where}",
                    worst and worst.ratio,
                    NEAR,
                )
            )
    for cell in _cells(result, "burst"):
        measured = result.median(OURS, "calls_per_share", **cell)
        text = f"burst, {title(cell)}: handler calls per burst and worker"
        found.append(Aim(text, measured, round(1 / 0.9, 2)))
    return found


def plot(result: Result, figure: Figure) -> None:
    """Draw each linger over the best fixed one: throughput and the 99th percentile."""
    sides: Any = figure.subplots(1, 2, sharey=False)
    for axes, (name, metric) in zip(
        sides, (("throughput", THROUGHPUT), ("p99", "p99_ms"))
    ):
        wanted = "closed" if metric == THROUGHPUT else None
        loads = list(_cells(result, wanted))
        for system in (*FIXED, OURS):
            points = [
                (ratio, row)
                for row, cell in enumerate(loads)
                if (ratio := _over_best(result, system, cell, metric)) is not None
            ]
            look = plots.style(system)
            axes.scatter(
                *(zip(*points) if points else ([], [])),
                label=system.partition(":")[2],
                color=look["color"],
                marker="D" if system == OURS else "o",
                s=26 if system == OURS else 14,
                zorder=look["zorder"] + (system == OURS),
            )
        plots.finish(axes)
        axes.get_legend().remove()
        axes.axvspan(1 / NEAR, NEAR, color="#e8f3ee", zorder=0)
        axes.set_yticks(range(len(loads)), [_short(cell) for cell in loads], fontsize=6)
        axes.set(xscale="log", xlabel="times the best fixed linger")
        ticks = (0.2, 0.5, 1.0) if wanted else (1.0, 2.0, 5.0)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_title(f"{name}: {'right' if wanted else 'left'} is better", fontsize=9)
        axes.invert_yaxis()
    sides[0].legend(loc="best", frameon=False, fontsize=7)
    figure.suptitle("The four lingers, over the best fixed one")


def _over_best(result: Result, system: str, cell: Cell, metric: str) -> float | None:
    known = [result.median(name, metric, **cell) for name in FIXED]
    mine = result.median(system, metric, **cell)
    if mine is None or None in known:
        return None
    best: float = (max if metric == THROUGHPUT else min)(known)  # type: ignore
    return mine / best


def _short(cell: Cell) -> str:
    return title(cell).replace(" clients", "").replace("work ", "")


BENCHMARK = Benchmark(
    name="linger",
    question="Is the default linger as good as the best one, whatever the load?",
    systems=("linger",),
    cells=cells,
    measure=measure,
    table=show,
    plot=plot,
    aims=aims,
    most_repeats=3,
    full={
        "seconds": 0.35,
        "warm_up": 0.1,
        "closed": [
            *(
                ("threadpool", 2, clients, work)
                for clients in (16, 64, 256)
                for work in (0, 100)
            ),
            *(("threadpool", 10, clients, 100) for clients in (16, 64, 256)),
            ("threadpool", 10, 64, 0),
            ("threadpool", 20, 64, 100),
            *(("inline", fixed, 64, 100) for fixed in (2, 10)),
        ],
        "poisson": [
            *(
                ("threadpool", fixed, percent, 100)
                for fixed in (2, 10)
                for percent in (30, 60, 90)
            ),
            ("inline", 2, 60, 100),
        ],
        "burst": [(10, 1), (10, 2), (2, 2)],
        "bursts_before": 3,
        "bursts": 8,
    },
    quick={
        "seconds": 0.1,
        "warm_up": 0.05,
        "closed": [("threadpool", 2, 16, 100)],
        "poisson": [("threadpool", 2, 30, 100)],
        "burst": [(2, 2)],
        "bursts_before": 1,
        "bursts": 2,
    },
)

if __name__ == "__main__":
    from cli import main

    main([BENCHMARK.name])
