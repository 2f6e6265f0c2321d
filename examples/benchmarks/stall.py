"""Does everything else stand still while the handler works?

Handlers of 50 ms run back to back in a monkey-patched gevent process. First a greenlet
sleeps for 1 ms again and again, and notes how late it wakes up: the heartbeat. Then,
without it, a process outside sends 400 trivial requests a second to a tiny server in
that process, by the clock, and notes how long each answer takes. Handlers that free the
GIL should not be felt. Those that hold it are shown as well, also with
``sys.setswitchinterval(0.0005)``, and in a process of their own.

"no handler" is what the machine does to a process that does nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plots
from registry import Benchmark, Cell, Metrics
from results import Aim, Result, table
from servers import ONE_THREAD
from stall_handlers import MAKERS, timed
from systems import System

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POOL, INLINE, PROCESS, U002 = (
    "ours:gevent:threadpool",
    "ours:gevent:inline",
    "ours-process:gevent",
    "ubatch-0.0.2:gevent",
)
OUTSIDER = Path(__file__).resolve().with_name("stall_outsider.py")
BEAT, RATE = 0.001, 400
DEFAULT, SHORT = 0.005, 0.0005
FREE, HELD = ("numpy", "sleep"), ("python", "one C call", "sklearn")
NOTHING = "no handler"
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
PROBES = {"beat": "The heartbeat's lateness", "ping": "An unrelated request"}


def cells(system: System, parameters: Cell) -> Sequence[Cell]:
    """Return the handlers to try; where the answer is known, not all of them."""
    handlers = parameters["handlers"]
    if system.name == INLINE:
        handlers = [name for name in handlers if name in FREE]
    elif system.name == PROCESS:
        handlers = [name for name in handlers if name in HELD]
    found = [{"handler": name, "switch_interval": DEFAULT} for name in handlers]
    if system.name != POOL:
        return found
    short = [name for name in handlers if name in HELD]
    found += [{"handler": name, "switch_interval": SHORT} for name in short]
    return [{"handler": NOTHING, "switch_interval": DEFAULT}, *found]


def measure(system: System, cell: Cell, parameters: Cell) -> Metrics:
    """Return quantiles of both probes, in seconds, and what the handler did."""
    os.environ.update(ONE_THREAD)  # before the first cell imports numpy
    taken: list[float] = []
    seconds = parameters["seconds"]
    sys.setswitchinterval(cell["switch_interval"])
    try:
        with ExitStack() as stack:
            # First: to fork while another thread is inside OpenBLAS may never return.
            ask = stack.enter_context(_outsider(seconds))
            if cell["handler"] != NOTHING:
                stack.enter_context(_busy(system, cell["handler"], taken))
            began = time.perf_counter()
            found = _quantiles("beat", _lateness(seconds))
            found |= _quantiles("ping", ask())
            batches, wall = len(taken), time.perf_counter() - began
    finally:
        sys.setswitchinterval(DEFAULT)
    if batches:
        found["handler_seconds"] = sum(taken[:batches]) / batches
        found["handler_busy"] = sum(taken[:batches]) / wall
    return found


@contextmanager
def _busy(system: System, handler: str, taken: list[float]) -> Iterator[None]:
    """Keep a batcher busy: while one batch runs, the calls of the next one wait."""
    from gevent import killall, spawn

    make = partial(timed, handler)
    with system.open(make if system.elsewhere else make(), 4, 0.01) as call:
        callers = [spawn(_ask_for_ever, call, taken) for _ in range(8)]
        try:
            call(None)  # it has begun
            taken.clear()
            yield
        finally:
            killall(callers)


def _ask_for_ever(call: Callable[[Any], float], taken: list[float]) -> None:
    while True:
        if seconds := call(None):  # for a whole batch
            taken.append(seconds)


def _lateness(seconds: float) -> list[float]:
    from gevent import sleep

    found = []
    now = time.perf_counter()
    end = now + seconds
    while now < end:
        due = now + BEAT
        sleep(BEAT)
        now = time.perf_counter()
        found.append(now - due)
    return found


@contextmanager
def _outsider(seconds: float) -> Iterator[Callable[[], list[float]]]:
    """Start a server here and a process that asks it, once it is told to."""
    from gevent.server import StreamServer

    server = StreamServer(("127.0.0.1", 0), _send_back)
    server.start()
    command = [sys.executable, str(OUTSIDER), str(server.server_port)]
    outsider = subprocess.Popen(
        [*command, str(RATE), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def ask() -> list[float]:
        said, _ = outsider.communicate(b"go\n")
        latencies: list[float] = json.loads(said)
        return latencies

    try:
        yield ask
    finally:
        outsider.kill()
        outsider.wait()
        server.stop()


def _send_back(connection: Any, address: Any) -> None:
    while data := connection.recv(4096):
        connection.sendall(data)


def _quantiles(probe: str, values: list[float]) -> dict[str, float]:
    values = sorted(values)
    last = len(values) - 1
    return {
        f"{probe}_{name}": values[round(share * last)]
        for name, share in QUANTILES.items()
    }


def show(result: Result) -> str:
    """Return one table for each probe."""
    head = ("handler", "system", "p50 ms", "p90 ms", "p99 ms", "max ms", "handler ms")
    parts = []
    for probe, title in PROBES.items():
        rows = [
            [
                *_named(cell),
                *(_text(result, cell, f"{probe}_{name}") for name in QUANTILES),
                _text(result, cell, "handler_seconds"),
            ]
            for cell in _ordered(result)
        ]
        parts.append(f"{title}:\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _ordered(result: Result) -> list[dict[str, Any]]:
    """The cells handler by handler, so that a reader compares neighbours."""
    handlers = [NOTHING, *MAKERS]
    return sorted(result.cells, key=lambda cell: handlers.index(cell["handler"]))


def _named(cell: dict[str, Any]) -> tuple[str, str]:
    short = ", switch 0.5 ms" if cell["switch_interval"] == SHORT else ""
    system = "-" if cell["handler"] == NOTHING else cell["system"]
    return cell["handler"], system.replace(":gevent", "") + short


def _text(result: Result, cell: dict[str, Any], metric: str) -> str:
    keys = {name: cell[name] for name in ("handler", "switch_interval")}
    if cell["handler"] == NOTHING and metric == "handler_seconds":
        return "-"
    return result.text(cell["system"], metric, 1000.0, **keys)


def aims(result: Result) -> list[Aim]:
    """What is promised of handlers that free the GIL."""
    found = []
    for handler in FREE:
        keys = {"handler": handler, "switch_interval": DEFAULT}
        for probe, text in ("beat", "heartbeat"), ("ping", "request"):
            late = result.median(POOL, f"{probe}_p99", **keys)
            late = late and late * 1000
            found.append(Aim(f"threadpool, {handler}: {text}, p99", late, 5.0, "ms"))
    return found


def plot(result: Result, figure: Figure) -> None:
    """Draw the p99 of both probes, a group of bars for each handler."""
    grid: Any = figure.subplots(1, len(PROBES), sharey=True)
    cells = _ordered(result)
    handlers = list(dict.fromkeys(cell["handler"] for cell in cells))
    for axes, (probe, title) in zip(grid, PROBES.items()):
        for place, handler in enumerate(handlers):
            group = [cell for cell in cells if cell["handler"] == handler]
            _bars(axes, result, probe, place, group)
        axes.set(title=f"{title}, p99", yscale="log")
        axes.set_xticks(range(len(handlers)), handlers, rotation=30, ha="right")
        axes.axhline(5, color="#888888", lw=0.8, ls=":")
        _name_once(axes)
        plots.finish(axes)
    grid[0].set_ylabel("ms (dotted: the aim, 5 ms)")
    if grid[0].get_legend():
        grid[0].get_legend().remove()


def _bars(axes: Any, result: Result, probe: str, place: int, group: Any) -> None:
    width = 0.8 / max(4, len(group))
    for number, cell in enumerate(group):
        found = cell["metrics"].get(f"{probe}_p99")
        if not found:
            continue
        middle, low, high = (found[k] * 1000 for k in ("median", "min", "max"))
        name = "no handler" if cell["handler"] == NOTHING else _named(cell)[1]
        short = cell["switch_interval"] == SHORT
        colour = plots.style(cell["system"])["color"]
        axes.bar(
            place + (number - (len(group) - 1) / 2) * width,
            middle,
            width * 0.9,
            yerr=[[middle - low], [high - middle]],
            color="#a0a0a0" if cell["handler"] == NOTHING else colour,
            alpha=0.55 if short else 1.0,
            hatch="//" if short else None,
            error_kw={"lw": 0.8, "ecolor": "#444444"},
            label=name,
        )


def _name_once(axes: Any) -> None:
    """Keep one bar of each name for the legend."""
    seen: set[str] = set()
    for bars in axes.containers:
        if bars.get_label() in seen:
            bars.set_label("_")
        seen.add(bars.get_label())


BENCHMARK = Benchmark(
    name="stall",
    question="Does everything else stand still while the handler works?",
    systems=(POOL, INLINE, PROCESS, U002),
    cells=cells,
    measure=measure,
    table=show,
    plot=plot,
    aims=aims,
    full={"handlers": list(MAKERS), "seconds": 0.5},
    quick={"handlers": ["sleep", "python"], "seconds": 0.3},
    requirements=("numpy", "scikit-learn"),
)

if __name__ == "__main__":
    from cli import main

    main([BENCHMARK.name])
