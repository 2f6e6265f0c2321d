"""What do a model process, and one model for all workers, gain and cost?

Four questions, in one run:

* *server*: gunicorn with one worker, wrk, and the random forest, as in `serve`.
* *stall*: how late others are in the worker while handlers work that hold the GIL for
  50 ms, as in `stall`.
* *trip*: what the way to another process and back costs without HTTP.
* *workers* and *memory*: gunicorn with several workers.

``ours-process`` is a batcher with ``ProcessExecutor``; ``ours-server`` asks a model
server (``ubatch serve``) that gunicorn runs beside its workers. Linux only; needs wrk.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import process_trips
import process_workers
import serve
import stall
from process_report import aims, plot, show
from registry import Benchmark, Cell, Metrics
from serve_server import INSTALL, has_wrk
from systems import System

OURS = ("ours-process", "ours-server")


def cells(system: System, parameters: Cell) -> Sequence[Cell]:
    """Return what to ask of this system; all that one server answers is together."""
    found: list[dict[str, Any]] = []

    def add(part: str, **cell: Any) -> None:
        found.append({"part": part, **cell})

    if system.name.partition(":")[0] in OURS:
        for payload in process_trips.PAYLOADS:
            add("trip", payload=payload)
    if system.name == stall.POOL:
        add("stall", handler=stall.NOTHING, switch_interval=stall.DEFAULT)
    if system.name in (stall.POOL, stall.PROCESS):
        for handler in parameters["stall"]["handlers"]:
            add("stall", handler=handler, switch_interval=stall.DEFAULT)
    if system.world == "gevent" or system.name == serve.UNBATCHED:
        route = "/echo" if system.name == serve.UNBATCHED else "/predict"
        for connections in parameters["server"]["connections"]:
            add("server", **serve.cell("forest", connections, route=route))
    if system.name in (serve.POOL, serve.SERVER):
        for load in process_workers.BURSTS, process_workers.CLOSED:
            add("workers", load=load, workers=parameters["workers"]["workers"])
        add("memory", workers=parameters["memory"]["workers"])
    return found


def measure(system: System, cell: Cell, parameters: Cell) -> Metrics:
    """Measure one cell, with the parameters of its part."""
    part = cell["part"]
    mine = parameters[part]
    if part == "trip":
        return process_trips.measure(system, cell, mine)
    if part == "stall":
        return stall.measure(system, cell, mine)
    if part == "server":
        return serve.measure(system, cell, mine)
    if not has_wrk():
        raise RuntimeError(INSTALL)
    wanted = serve.cell("forest", 0)
    options = {"timeout": mine["timeout"]} if part == "workers" else {}
    config = serve.config(system, wanted, cell["workers"], **options)
    server = serve.Running.of(config)
    if part == "memory":
        return process_workers.memory(server, mine)
    return process_workers.measure(server, cell, mine)


BENCHMARK = Benchmark(
    name="process",
    question="What do a model process, and one model for all workers, gain and cost?",
    systems=(serve.UNBATCHED, serve.U002, serve.POOL, *OURS),
    cells=cells,
    measure=measure,
    table=show,
    plot=plot,
    aims=aims,
    full={
        "server": {"connections": [64, 256], "seconds": 2},
        "stall": {"handlers": list(stall.HELD), "seconds": 1.0},
        "trip": {"rounds": 2000, "picture_rounds": 100, "warm_up": 20},
        "workers": {"workers": 2, "bursts": 30, "seconds": 2, "timeout": 0.03},
        "memory": {"workers": 4, "seconds": 1},
    },
    quick={
        "server": {"connections": [64], "seconds": 1},
        "stall": {"handlers": ["python"], "seconds": 0.3},
        "trip": {"rounds": 50, "picture_rounds": 5, "warm_up": 5},
        "workers": {"workers": 2, "bursts": 5, "seconds": 1, "timeout": 0.03},
        "memory": {"workers": 2, "seconds": 1},
    },
    limit=300.0,
    requirements=serve.BENCHMARK.requirements,
)

if __name__ == "__main__":
    from cli import main

    if not has_wrk() and not {"-h", "--help"} & set(sys.argv):
        sys.exit(INSTALL)
    main([BENCHMARK.name])
