"""What do callers in a closed loop cost, and how fast are they answered?

Each caller asks, checks its answer, counts, and asks again. The load is the same text
for every system (its asyncio form differs by ``await`` alone), so its own part of the
CPU time is the same: ``floor:call`` shows it, with a handler and no batcher at all.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Any

from systems import System
from worlds import WORLDS

TIMED = 10
"""Callers that time their calls; the others only count, which is cheaper."""
TO_BEGIN, TO_END = 5.0, 3.0
"""Seconds that callers get for their first answer, and for their last."""


class Load:
    """What the callers share."""

    def __init__(self, callers: int) -> None:
        self.on = True
        self.counts = [0] * callers  # a slot for each: += is not atomic in threads
        self.latencies: list[float] = []
        self.errors: list[str] = []

    def ask(self, call: Any, index: int) -> None:
        """Be one caller, until the load is switched off."""
        counts, timed, clock = self.counts, index < TIMED, time.perf_counter
        try:
            while self.on:
                begun = clock() if timed else 0.0
                if call(index) != index:
                    raise ValueError("a caller got the answer of another")
                if timed:
                    self.latencies.append(clock() - begun)
                counts[index] += 1
        except Exception as error:
            self.fail(error)

    async def ask_asyncio(self, call: Any, index: int) -> None:
        """Be one caller, until the load is switched off."""
        counts, timed, clock = self.counts, index < TIMED, time.perf_counter
        try:
            while self.on:
                begun = clock() if timed else 0.0
                if await call(index) != index:
                    raise ValueError("a caller got the answer of another")
                if timed:
                    self.latencies.append(clock() - begun)
                counts[index] += 1
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Note why a caller gave up, and have the others end too."""
        self.on = False
        self.errors.append(f"{type(error).__name__}: {error}")


@dataclass
class Mark:
    """What had been spent, and done, at one moment."""

    wall: float
    cpu: float
    calls: int
    timed: int

    @classmethod
    def now(cls, load: Load) -> Mark:
        """Return the present state."""
        timed = len(load.latencies)
        return cls(time.perf_counter(), time.process_time(), sum(load.counts), timed)


def closed_loop(
    system: System, callers: int, seconds: float, warm_up: float, **settings: Any
) -> dict[str, float | None]:
    """Keep *callers* asking for some seconds; return the figures.

    Args:
        seconds: How long is measured.
        warm_up: How long the callers ask before that; longer if they need it.
        settings: What the system is opened with: handler, max_size, timeout, options.

    Returns:
        ``cpu_us``: CPU time of the whole process per call, in microseconds.
        ``calls_per_second``; ``p50_us`` and ``p99_us``: latency.

    Raises:
        RuntimeError: A call failed, or was answered with another's result.
    """
    load = Load(callers)
    if system.world == "asyncio":
        run = _closed_loop_asyncio(system, load, seconds, warm_up, settings)
        begin, end = asyncio.run(run)
    else:
        begin, end = _closed_loop(system, load, seconds, warm_up, settings)
    if load.errors:
        raise RuntimeError(load.errors[0])
    return figures(begin, end, load.latencies[begin.timed : end.timed])


def _closed_loop(
    system: System, load: Load, seconds: float, warm_up: float, settings: Any
) -> tuple[Mark, Mark]:
    world = WORLDS[system.world]
    opened = system.open(**settings)
    call = opened.__enter__()
    everyone = world.spawn_all(partial(load.ask, call), len(load.counts))
    deadline = time.perf_counter() + TO_BEGIN
    world.sleep(warm_up)
    while not all(load.counts) and load.on and time.perf_counter() < deadline:
        world.sleep(0.01)
    begin = Mark.now(load)
    world.sleep(seconds)
    end = Mark.now(load)
    load.on = False
    if world.join(everyone, TO_END):
        opened.__exit__(None, None, None)
    return begin, end  # what hangs is left behind: the process ends soon


async def _closed_loop_asyncio(
    system: System, load: Load, seconds: float, warm_up: float, settings: Any
) -> tuple[Mark, Mark]:
    with system.open(**settings) as call:
        indices = range(len(load.counts))
        everyone = [asyncio.create_task(load.ask_asyncio(call, i)) for i in indices]
        deadline = time.perf_counter() + TO_BEGIN
        await asyncio.sleep(warm_up)
        while not all(load.counts) and load.on and time.perf_counter() < deadline:
            await asyncio.sleep(0.01)
        begin = Mark.now(load)
        await asyncio.sleep(seconds)
        end = Mark.now(load)
        load.on = False
        await asyncio.wait(everyone, timeout=TO_END)
    return begin, end


def figures(begin: Mark, end: Mark, latencies: list[float]) -> dict[str, float | None]:
    """Return the figures between two marks; None for what has no calls."""
    calls, wall = end.calls - begin.calls, end.wall - begin.wall
    p50, p99 = percentiles(latencies)
    return {
        "cpu_us": (end.cpu - begin.cpu) / calls * 1e6 if calls else None,
        "calls_per_second": calls / wall,
        "p50_us": None if p50 is None else p50 * 1e6,
        "p99_us": None if p99 is None else p99 * 1e6,
    }


def percentiles(values: list[float]) -> tuple[float | None, float | None]:
    """Return the 50th and the 99th, or None twice where there is nothing."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (None, None)
    cuts = quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]
