"""How fast is a server, end to end, and what holds it back?

gunicorn with one worker process serves a scikit-learn model of the digits; wrk keeps 1
to 256 connections busy on the same machine. ``forest`` is dear and gains much by
batches; ``mlp`` is cheap beside the HTTP around it. Each system answers with its own
server: ``floor:call`` calls the model once per request, unbatched, and shows with
``/echo`` what HTTP alone allows. Handlers are counted and timed in the handler, alike
for all; what the threads use comes from the kernel.

*mean wait* is connections / (requests/s): what a closed loop waits for, whoever is
counted. p50 and p99 are wrk's, of the requests that were answered; where a connection
waited for longer than usual, wrk adds the waits of the requests that it would have sent
meanwhile. A handler on the hub that never waits lets gunicorn serve the same few
connections again and again: then p50 is theirs, and far below the mean. With fewer than
four answers per connection p50 and p99 are not shown.

Needs wrk: ``apt install wrk``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from registry import Benchmark, Cell, Metrics
from results import Aim, Result
from serve_report import DEFAULTS, POOL, UNBATCHED, bounds, plot, plotted, show
from serve_server import INSTALL, Config, Server, has_wrk
from systems import System

LEVELS = {"forest": "connections", "mlp": "many_connections"}
INLINE, U002 = "ours:gevent:inline", "ubatch-0.0.2:gevent"
PROCESS, SERVER = "ours-process:gevent", "ours-server:gevent"


def cells(system: System, parameters: Cell) -> Sequence[Cell]:
    """Return what to ask this system's servers; cells of one server are neighbours."""
    if system.world == "thread" and system.name != UNBATCHED:
        return _levels("forest", parameters["threads_connections"], worker="gthread")
    found: list[Cell] = []
    many = parameters["many_connections"]
    for model in parameters["models"]:
        found += _levels(model, parameters[LEVELS[model]])
        if system.name == UNBATCHED:
            found += [cell(model, 1, route="/handler/64")]
        if system.name == UNBATCHED and model == "forest":
            found += _levels(model, many, route="/echo")
    if system.name == UNBATCHED:
        few = parameters["threads_connections"]
        found += _levels("forest", few, worker="gthread")
        found += _levels("forest", few, worker="gthread", route="/echo")
    return found


def _levels(model: str, levels: Sequence[int], **more: Any) -> list[Cell]:
    return [cell(model, connections, **more) for connections in levels]


def cell(model: str, connections: int, **more: Any) -> Cell:
    return {"model": model, "connections": connections, **DEFAULTS, **more}


class Running:
    """The server that this process has started last."""

    server: Server | None = None

    @classmethod
    def of(cls, config: Config) -> Server:
        """Return the server of a config, started if another ran before."""
        if cls.server is None or cls.server.config != config:
            cls.close()
            cls.server = Server(config)
        return cls.server

    @classmethod
    def close(cls) -> None:
        """End it, if there is one."""
        if cls.server is not None:
            cls.server.close()
            cls.server = None


def measure(system: System, cell: Cell, parameters: Cell) -> Metrics:
    """Drive one server for a while. What runs last is ended with this process."""
    if not has_wrk():
        raise RuntimeError(INSTALL)
    server = Running.of(config(system, cell))
    if cell["route"].startswith("/handler/"):
        return {"alone_seconds": server.ask(cell["route"])["seconds"]}
    return server.drive(cell["route"], cell["connections"], parameters["seconds"])


BATCHERS = {UNBATCHED: "none", PROCESS: "process", SERVER: "server"}
"""Of those systems that are not some ubatch, with its handler in the server."""


def config(system: System, cell: Cell, workers: int = 1, **options: Any) -> Config:
    """Return the server that a cell wants, with some options of the batcher."""
    batcher = BATCHERS.get(system.name, "ubatch")
    if system.name in (POOL, INLINE):
        options["executor"] = system.name.rpartition(":")[2]
    how = tuple(options.items()), cell["worker"], workers
    return Config(cell["model"], batcher, *how)


def aims(result: Result) -> list[Aim]:
    """Compare the better of our executors for each model with unbatched and 0.0.2."""
    found = []
    for model in result.values("model"):
        levels = sorted({c["connections"] for c in plotted(result, model)})
        best = max((POOL, INLINE), key=lambda name: _total(result, name, model, levels))
        for connections in levels:
            found += _aims_of(result, best, model, connections)
    return found


def _aims_of(result: Result, best: str, model: str, connections: int) -> list[Aim]:
    keys = {"model": model, "connections": connections, **DEFAULTS}
    rate, unbatched, theirs = (
        result.median(system, "requests_per_second", **keys)
        for system in (best, UNBATCHED, U002)
    )
    where = f"{model}, {best.rpartition(':')[2]}, {connections}:"
    found = []
    if connections >= 64 and rate and unbatched:
        text = f"{where} unbatched requests/s over ours"
        possible = bounds(result, model).get("in turns", 0.0) / unbatched
        if 0 < possible < 3:
            text += f" (the bound allows {1 / possible:.2f})"
        found.append(Aim(text, unbatched / rate, 0.333))
    if rate and theirs:
        found.append(Aim(f"{where} 0.0.2's requests/s over ours", theirs / rate, 1.0))
        ours, theirs = (result.median(name, "p99", **keys) for name in (best, U002))
        ratio = ours / theirs if ours and theirs else None
        found.append(Aim(f"{where} our p99 over 0.0.2's", ratio, 1.0))
    return found


def _total(result: Result, system: str, model: str, levels: Sequence[int]) -> float:
    """Rate a system over all levels, each of which weighs the same."""
    keys = {"model": model, **DEFAULTS}
    rates = (
        result.median(system, "requests_per_second", connections=level, **keys)
        for level in levels
    )
    return sum(math.log(rate) for rate in rates if rate)


BENCHMARK = Benchmark(
    name="serve",
    question="How fast is a server, end to end, and what holds it back?",
    systems=(UNBATCHED, U002, POOL, INLINE, "ubatch-0.0.2:thread", "ours:thread"),
    cells=cells,
    measure=measure,
    table=show,
    plot=plot,
    aims=aims,
    full={
        "models": ["forest", "mlp"],
        "connections": [1, 16, 64, 256],
        "many_connections": [64, 256],
        "threads_connections": [64],
        "seconds": 1,
    },
    quick={
        "models": ["forest"],
        "connections": [16],
        "many_connections": [16],
        "threads_connections": [],
    },
    requirements=("flask", "gunicorn[gevent]", "numpy", "scikit-learn"),
)

if __name__ == "__main__":
    from cli import main

    if not has_wrk() and not {"-h", "--help"} & set(sys.argv):
        sys.exit(INSTALL)
    main([BENCHMARK.name])
