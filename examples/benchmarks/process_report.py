"""What do the tables, the plot and the aims of `process` show?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import plots
from process_trips import BACK, ROWS, THERE
from process_workers import BURSTS, CLOSED
from results import EMPTY, Aim, Result, brief, most, table
from serve_report import label
from serve_rules import RULE, RULE_APART, binding, is_censored
from serve_server import load_of
from stall import NOTHING, PROBES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

U002, POOL = "ubatch-0.0.2:gevent", "ours:gevent:threadpool"
PROCESS, SERVER = "ours-process:gevent", "ours-server:gevent"
MS, US, MB = 1e3, 1e6, 1 / 2**20


def show(result: Result) -> str:
    """Return a table for each part that was measured."""
    parts = {
        "server": _servers,
        "stall": _stalls,
        "trip": _trips,
        "workers": _workers,
        "memory": _memory,
    }
    return "\n\n".join(
        make(result, cells)
        for part, make in parts.items()
        if (cells := [cell for cell in result.cells if cell["part"] == part])
    )


Cells = Sequence[dict[str, Any]]


def _text(result: Result, cell: dict[str, Any], name: str, scale: float = 1.0) -> str:
    keys = {k: v for k, v in cell.items() if k in KEYS}
    return result.text(cell["system"], name, scale, **keys)


KEYS = (
    *("part", "connections", "route", "handler", "payload", "load", "workers"),
    *("model", "worker", "switch_interval"),
)


def _median(cell: dict[str, Any], name: str) -> float | None:
    found = cell["metrics"].get(name)
    return found and found["median"]


# Part by part.


def _servers(result: Result, cells: Cells) -> str:
    head = (
        *("server", "connections", "requests/s", "p99 ms", "mean batch", "handler ms"),
        *("server CPU", "model CPU", "model server CPU", "binds"),
    )
    rows = [
        [label(cell), str(cell["connections"]), *_of_server(result, cell)]
        for cell in sorted(cells, key=lambda cell: cell["connections"])
    ]
    title = "One worker, ``forest``, ``-k gevent``:"
    return f"{RULE}\n\n{RULE_APART}\n\n{title}\n\n{table(head, rows)}"


def _of_server(result: Result, cell: dict[str, Any]) -> Iterator[str]:
    yield _text(result, cell, "requests_per_second")
    medians = {k: v["median"] for k, v in cell["metrics"].items()}
    if not medians:
        yield from [EMPTY] * 7
        return
    hidden = is_censored(medians["answered"], cell["connections"])
    yield EMPTY if hidden else _text(result, cell, "p99", MS)
    modelled = cell["route"] != "/echo"
    yield brief(medians["mean_batch"]) if modelled else EMPTY
    yield brief(medians["handler_seconds"] * MS) if modelled else EMPTY
    for name in "server_cpu", "model_cpu", "model_server_cpu":
        yield f"{medians[name]:.0%}" if name in medians else EMPTY
    yield binding(load_of(medians))


def _stalls(result: Result, cells: Cells) -> str:
    head = ["handler", "system"]
    head += [f"{name}: {q} ms" for name in SHORT.values() for q in ("p50", "p99")]
    rows = [
        [
            cell["handler"],
            EMPTY if cell["handler"] == NOTHING else _short(cell),
            *(
                _text(result, cell, f"{probe}_{q}", MS)
                for probe in PROBES
                for q in ("p50", "p99")
            ),
            (
                EMPTY
                if cell["handler"] == NOTHING
                else _text(result, cell, "handler_seconds", MS)
            ),
        ]
        for cell in _by(cells, "handler")
    ]
    title = (
        "Beside handlers of 50 ms, the heartbeat's lateness and an unrelated request:"
    )
    return f"{title}\n\n{table([*head, 'handler ms'], rows)}"


SHORT = {"beat": "beat", "ping": "request"}


def _short(cell: dict[str, Any]) -> str:
    """Return what a reader calls a system, where greenlets are nothing special."""
    if cell["system"].endswith(":thread"):
        return f"{label({'route': '', **cell})}, threads"
    return label({"route": "", **cell})


def _by(cells: Cells, key: str) -> list[dict[str, Any]]:
    """Sort by the order in which values first come, so that neighbours compare."""
    order = list(dict.fromkeys(cell[key] for cell in cells))
    return sorted(cells, key=lambda cell: order.index(cell[key]))


def _trips(result: Result, cells: Cells) -> str:
    head = ("batch", "system", "added us", "inline us", "one copy us", "added, copies")
    rows = [
        [
            cell["payload"],
            _short(cell),
            _text(result, cell, "added_seconds", US),
            _text(result, cell, "inline_seconds", US),
            *(
                _text(result, cell, name, scale) if cell["payload"] != ROWS else EMPTY
                for name, scale in (("copy_seconds", US), ("copies", 1.0))
            ),
        ]
        for cell in _by(cells, "payload")
    ]
    title = (
        "A batch to another process and back, over the same handler inline (medians):\n"
        "16 rows of 64 float64 that come back; 64 pictures of 224x224x3 uint8 there\n"
        "or back, and one plain copy of those 64 arrays in this process:"
    )
    return f"{title}\n\n{table(head, rows)}"


def _workers(result: Result, cells: Cells) -> str:
    head = ("load", "model", "mean batch", "requests/s", "p50 ms", "p99 ms")
    rows = [
        [
            cell["load"],
            WHERE[cell["system"]],
            _text(result, cell, "mean_batch"),
            (
                _text(result, cell, "requests_per_second")
                if cell["load"] == CLOSED
                else EMPTY
            ),
            *(_text(result, cell, name, MS) for name in ("p50", "p99")),
        ]
        for cell in _by(cells, "load")
    ]
    count = cells[0]["workers"]
    return f"``gunicorn -w {count}``, one ``forest`` or many:\n\n{table(head, rows)}"


WHERE = {POOL: "in each worker", SERVER: "one for all"}


def _memory(result: Result, cells: Cells) -> str:
    head = ("model", "workers MB", "model server MB", "model process MB", "all MB")
    names = ("server", "model_server", "model", "all")
    rows = [
        [
            WHERE[cell["system"]],
            *(
                _text(result, cell, name, MB) if _median(cell, name) else EMPTY
                for name in names
            ),
        ]
        for cell in cells
    ]
    count = cells[0]["workers"]
    title = (
        f"Memory of {count} workers (PSS: what is shared counts in parts), no master"
    )
    return f"{title}:\n\n{table(head, rows)}"


# What was aimed at.


def aims(result: Result) -> list[Aim]:
    """Compare with what is promised of model processes."""
    return [*_server_aims(result), *_stall_aims(result), *_trip_aims(result)] + [
        Aim(
            f"{load}: mean batch, in each worker over one for all",
            result.ratio(POOL, SERVER, "mean_batch", part="workers", load=load),
            1 / 1.8,
        )
        for load in (BURSTS, CLOSED)
    ]


RIVALS = {U002: "0.0.2", POOL: "threadpool"}


def _server_aims(result: Result) -> Iterator[Aim]:
    for connections in result.values("connections"):
        keys = {"part": "server", "connections": connections}
        for rival, name in RIVALS.items():
            ratio = result.ratio(rival, PROCESS, "requests_per_second", **keys)
            text = f"{connections} connections: {name}'s requests/s over process"
            yield Aim(text, ratio, 1 / 1.5)
            ratio = result.ratio(PROCESS, rival, "p99", **keys)
            yield Aim(f"{connections} connections: p99 over {name}'s", ratio, 1.0)


def _stall_aims(result: Result) -> Iterator[Aim]:
    for handler in result.values("handler"):
        if handler != NOTHING:
            late = result.median(PROCESS, "beat_p99", part="stall", handler=handler)
            late = late and late * MS
            yield Aim(f"process, {handler}: heartbeat, p99", late, 2.0, "ms")


def _trip_aims(result: Result) -> Iterator[Aim]:
    for kind in "ours-process", "ours-server":
        for payload, name, scale, limit, unit in (
            (ROWS, "added_seconds", US, 200.0, "us"),
            (THERE, "copies", 1.0, 1.5, "x"),
            (BACK, "copies", 1.0, 1.5, "x"),
        ):
            found = most(
                result.median(f"{kind}:{world}", name, part="trip", payload=payload)
                for world in ("gevent", "thread")
            )
            text = f"{kind}, {payload}: added"
            if unit == "x":
                text += ", in copies"
            yield Aim(text, found and found * scale, limit, unit)


# The plot.


def plot(result: Result, figure: Figure) -> None:
    """Draw one panel for each part, but for memory."""
    grid: Any = figure.subplots(2, 2)
    panels = (
        ("server", "connections", "requests_per_second", 1.0, "requests/s"),
        ("stall", "handler", "beat_p99", MS, "heartbeat's lateness, p99, ms"),
        ("trip", "payload", "added_seconds", US, "added by the way, us"),
        ("workers", "load", "mean_batch", 1.0, "mean batch, several workers"),
    )
    for axes, (part, key, metric, scale, title) in zip(grid.flat, panels):
        cells = [cell for cell in result.cells if cell["part"] == part]
        _bars(axes, cells, key, metric, scale)
        axes.set_title(title, fontsize=9)
        if part in ("stall", "trip"):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.xaxis.set_minor_formatter("")


def _bars(axes: Any, cells: Cells, key: str, metric: str, scale: float) -> None:
    """Draw a group of bars for each value of *key*, one for each system."""
    ticks, names, at = [], [], 0
    for value in dict.fromkeys(cell[key] for cell in cells):
        group = [cell for cell in cells if cell[key] == value]
        known = [(cell, m) for cell in group if (m := _median(cell, metric))]
        ticks.append(at + (len(known) - 1) / 2)
        names.append(str(value))
        for cell, found in known:
            width = found * scale
            idle = cell.get("handler") == NOTHING
            colour = "#a0a0a0" if idle else plots.style(cell["system"])["color"]
            axes.barh(at, width, 0.9, color=colour)
            text = f" {'' if idle else _short(cell)} {brief(width)}"
            axes.text(width, at, text, va="center", fontsize=6)
            at += 1
        at += 1
    axes.set_yticks(ticks, names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.45)
    plots.finish(axes)
    axes.grid(False, axis="y")
