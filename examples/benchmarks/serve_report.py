"""What do the tables and the plot of `serve` show?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import plots
from results import EMPTY, Result, brief, table
from serve_rules import RULE, best_rate, best_rate_in_turns, binding, is_censored
from serve_server import load_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNBATCHED, POOL = "floor:call", "ours:gevent:threadpool"
DEFAULTS = {"worker": "gevent", "route": "/predict"}
MAX_SIZE = 64
HEAD = (
    *("server", "connections", "requests/s", "mean wait ms", "p50 ms", "p99 ms"),
    *("mean batch", "handler ms", "handler", "server CPU", "wrk CPU", "binds"),
)
MS = 1000.0


def show(result: Result) -> str:
    """Return the rule, and a table for each model and kind of worker."""
    parts = [RULE]
    for model in result.values("model"):
        for worker in ("gevent", "gthread"):
            rows = list(_rows(result, model, worker))
            if rows:
                parts.append(f"``{model}``, ``-k {worker}``:\n\n{table(HEAD, rows)}")
        parts.append(_bounds_text(result, model))
    return "\n\n".join(part for part in parts if part)


def _rows(result: Result, model: str, worker: str) -> Iterator[list[str]]:
    cells = [
        cell
        for cell in result.cells
        if (cell["model"], cell["worker"]) == (model, worker)
        and not cell["route"].startswith("/handler/")
    ]
    order = {"/echo": 0, "/predict": 1}
    for cell in sorted(cells, key=lambda c: (c["connections"], order[c["route"]])):
        yield [label(cell), str(cell["connections"]), *_figures(result, cell)]


def label(cell: dict[str, Any]) -> str:
    """Return what a reader calls the server of a cell."""
    if cell["route"] == "/echo":
        return "no model"
    if cell["system"] == UNBATCHED:
        return "unbatched"
    words = cell["system"].split(":")
    return ":".join(word for word in words if word not in ("gevent", "thread"))


def _figures(result: Result, cell: dict[str, Any]) -> list[str]:
    keys = _keys(cell)

    def text(metric: str, scale: float = 1.0) -> str:
        return result.text(cell["system"], metric, scale, **keys)

    medians = {k: v["median"] for k, v in cell["metrics"].items()}
    if "requests_per_second" not in medians:
        return [text("requests_per_second"), *[EMPTY] * (len(HEAD) - 3)]
    wait = brief(cell["connections"] / medians["requests_per_second"] * MS)
    hidden = is_censored(medians["answered"], cell["connections"])
    waits = [EMPTY if hidden else text(name, MS) for name in ("p50", "p99")]
    batches = [brief(medians["mean_batch"]), brief(medians["handler_seconds"] * MS)]
    shares = [f"{medians[name]:.0%}" for name in SHARES]
    if cell["route"] == "/echo":
        batches, shares[0] = [EMPTY, EMPTY], EMPTY
    found = binding(load_of(medians))
    return [text("requests_per_second"), wait, *waits, *batches, *shares, found]


def _keys(cell: dict[str, Any]) -> dict[str, Any]:
    return {key: cell[key] for key in ("model", "connections", *DEFAULTS)}


SHARES = ("handler_busy", "server_cpu", "generator_cpu")


def bounds(result: Result, model: str) -> dict[str, float]:
    """Return the best rates that are possible: by the ceiling and the handler.

    Both from the best of the repeats: what was reached once is possible.
    """
    ceilings = [
        cell["metrics"]["requests_per_second"]["max"]
        for cell in result.cells
        if cell["route"] == "/echo" and cell["worker"] == "gevent" and cell["metrics"]
    ]
    alone = result.metric(
        UNBATCHED, "alone_seconds", model=model, route=f"/handler/{MAX_SIZE}"
    )
    if not ceilings or not alone:
        return {}
    ceiling, taken = max(ceilings), alone["min"]
    return {
        "ceiling": ceiling,
        "alone": taken,
        "at once": best_rate(ceiling, MAX_SIZE, taken),
        "in turns": best_rate_in_turns(ceiling, MAX_SIZE, taken),
    }


def _bounds_text(result: Result, model: str) -> str:
    found = bounds(result, model)
    if not found:
        return ""
    return (
        f"The bound for ``{model}`` under gevent, from the best repeats: HTTP alone "
        f"answers {found['ceiling']:,.0f} requests/s;\nthe handler alone takes "
        f"{found['alone'] * MS:.2f} ms for {MAX_SIZE} calls, which is "
        f"{MAX_SIZE / found['alone']:,.0f} calls/s. So no more than\n"
        f"**{found['at once']:,.0f}** requests/s if both could run at once, and "
        f"**{found['in turns']:,.0f}** if they take turns with one GIL."
    )


def plot(result: Result, figure: Figure) -> None:
    """Draw requests/s and p99 over connections, for each model, under gevent."""
    models = result.values("model")
    grid: Any = figure.subplots(
        2, len(models), squeeze=False, sharex="col", sharey="row"
    )
    for column, model in enumerate(models):
        rates, waits = grid[0][column], grid[1][column]
        _lines(rates, result, model, "requests_per_second", 1.0)
        _lines(waits, result, model, "p99", MS)
        found = bounds(result, model)
        if found:
            rates.axhline(found["in turns"], color="#888888", lw=0.8, ls=":")
        levels = sorted({c["connections"] for c in plotted(result, model)})
        rates.set(title=model, xscale="log", yscale="log")
        waits.set(xscale="log", yscale="log", xlabel="connections")
        waits.set_xticks(levels, [str(level) for level in levels])
        waits.minorticks_off()
        for axis in rates.yaxis, waits.yaxis:
            axis.set_major_formatter("{x:,.0f}")
        if column == 0:
            rates.set_ylabel("requests/s (dotted: bound)")
            waits.set_ylabel("p99, ms")
    for axes in grid.flat:
        plots.finish(axes)
        if axes.get_legend() is not None and axes is not grid[0][-1]:
            axes.get_legend().remove()


def plotted(result: Result, model: str) -> list[dict[str, Any]]:
    """Return the cells that the plot shows, and the aims compare."""
    return [
        cell
        for cell in result.cells
        if {"model": model, **DEFAULTS}.items() <= _keys(cell).items()
    ]


def _lines(axes: Any, result: Result, model: str, metric: str, scale: float) -> None:
    cells = plotted(result, model)
    for system in dict.fromkeys(cell["system"] for cell in cells):
        points = [
            (cell["connections"], cell["metrics"][metric]["median"] * scale)
            for cell in cells
            if cell["system"] == system and metric in cell["metrics"]
            if metric == "requests_per_second"
            or not is_censored(
                cell["metrics"]["answered"]["median"], cell["connections"]
            )
        ]
        if points:
            name = label(next(c for c in cells if c["system"] == system))
            how = {**plots.style(system), "label": name}
            axes.plot(*zip(*points), marker="o", markersize=4, **how)
