"""How do calls come to a batcher, and how fast are they answered? On one gevent hub.

A *closed loop*: so many clients, each of which asks again when it has its answer; they
are sockets, as they would be a server's, and measure the latency themselves. A
*Poisson* stream: calls come at random, at a rate, whether the others are answered or
not; latency is counted from the moment when a call should have come, so that a hub
that is late makes its calls late too. Before each call the hub works for some
microseconds, as it does for the HTTP request around a real one.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import arrivals

HERE = Path(__file__).resolve().parent
FEEDER, CLIENTS = HERE / "arrivals.py", HERE / "clients.py"
SEED = 20
START_UP = 0.1
"""Seconds that a process that makes calls gets to start."""
PATIENCE = 5.0
"""Seconds that callers get for their last answer."""


class Handler:
    """Takes ``fixed + size * each`` seconds, asleep in C, and notes the sizes."""

    def __init__(self, fixed: float, each: float) -> None:
        from gevent.monkey import get_original

        self._sleep = get_original("time", "sleep")
        self._fixed, self._each = fixed, each
        self.sizes: list[int] = []

    def __call__(self, items: list[Any]) -> list[Any]:
        self.sizes.append(len(items))
        self._sleep(self._fixed + self._each * len(items))
        return items


class Traffic:
    """The calls of one cell, and what was seen of them."""

    def __init__(self, call: Any, handler: Handler, work: float) -> None:
        self.errors: list[str] = []
        self.latencies: list[tuple[float, float]] = []
        """When each call should have come, and the seconds until its answer."""
        self._call, self._handler, self._work = call, handler, work

    def ask(self, number: int, due: float | None = None) -> None:
        """Make one call; *due* is when it should have come, if it was not just now."""
        clock = time.monotonic
        end = clock() + self._work
        while clock() < end:
            pass
        begun = clock() if due is None else due
        if self._call(number) != number:
            raise ValueError("a caller got the answer of another")
        self.latencies.append((begun, clock() - begun))

    def serve(self, number: int, client: socket.socket) -> None:
        """Answer one client of a closed loop, until it goes away."""
        try:
            while client.recv(1):
                self.ask(number)
                client.send(b"!")
        except Exception as error:
            self.fail(error)
            client.close()

    def ask_once(self, number: int, due: float) -> None:
        """Be one call of a stream."""
        try:
            self.ask(number, due)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Note why a caller gave up."""
        self.errors.append(f"{type(error).__name__}: {error}")

    def mark(self) -> tuple[float, float, int, int]:
        """Return what was spent and done until now: wall, CPU, calls, batches."""
        calls, batches = len(self.latencies), len(self._handler.sizes)
        return time.monotonic(), time.process_time(), calls, batches

    def figures(self, begin: Any, end: Any, seen: list[float]) -> dict[str, Any]:
        """Return the figures between two marks, with the latencies in *seen*."""
        if self.errors:
            raise RuntimeError(self.errors[0])
        wall, cpu, calls, _ = (y - x for x, y in zip(begin, end))
        sizes = self._handler.sizes[begin[3] : end[3]]
        return {
            "calls_per_second": calls / wall,
            "mean_batch": sum(sizes) / len(sizes) if sizes else None,
            "cpu_us": (cpu / calls - self._work) * 1e6 if calls else None,
            **latency_ms(seen),
        }


def latency_ms(seconds: list[float]) -> dict[str, float | None]:
    """Return percentiles in milliseconds."""
    names = {"p50_ms": 49, "p90_ms": 89, "p99_ms": 98}
    if len(seconds) < 2:
        return dict.fromkeys(names)
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {name: cuts[place] * 1e3 for name, place in names.items()}


def closed_loop(
    call: Any, handler: Handler, work: float, clients: int, parameters: Any
) -> dict[str, Any]:
    """Have *clients* ask from another process; return the figures, as they see it."""
    import gevent

    traffic = Traffic(call, handler, work)
    begin = time.monotonic() + START_UP + parameters["warm_up"]
    end = begin + parameters["seconds"]
    pairs = [socket.socketpair() for _ in range(clients)]
    theirs = [one.fileno() for _, one in pairs]
    command = [sys.executable, "-S", "-E", str(CLIENTS), str(begin), str(end)]
    process = subprocess.Popen(
        [*command, *map(str, theirs)], stdout=subprocess.PIPE, pass_fds=theirs
    )
    for _, one in pairs:
        one.close()
    everyone = [
        gevent.spawn(traffic.serve, number, ours)
        for number, (ours, _) in enumerate(pairs)
    ]
    gevent.sleep(max(0.0, begin - time.monotonic()))
    first = traffic.mark()
    gevent.sleep(max(0.0, end - time.monotonic()))
    last = traffic.mark()
    gevent.joinall(everyone, timeout=PATIENCE)
    for ours, _ in pairs:
        ours.close()
    taken = array("d", process.communicate(timeout=PATIENCE)[0])
    return traffic.figures(first, last, list(taken))


def poisson(
    call: Any, handler: Handler, work: float, rate: float, parameters: Any
) -> dict[str, Any]:
    """Make *rate* calls a second, at random moments; return the figures.

    They hold for the calls that should have come after the warm-up, all of them.
    """
    import gevent

    traffic = Traffic(call, handler, work)
    seconds = parameters["warm_up"] + parameters["seconds"]
    due = arrivals.moments(SEED, rate, seconds)
    start = time.monotonic() + START_UP
    timed = start + parameters["warm_up"]
    everyone, begin = [], None
    with _feeder(start, rate, seconds) as come:
        for number in range(len(due)):
            if not next(come):
                raise RuntimeError("the stream of calls ended too early")
            if begin is None and start + due[number] >= timed:
                begin = traffic.mark()
            everyone.append(gevent.spawn(traffic.ask_once, number, start + due[number]))
    gevent.joinall(everyone, timeout=PATIENCE)
    if len(traffic.latencies) < len(due):
        traffic.errors.append(f"TimeoutError: not answered within {PATIENCE:g} s")
    seen = [x for begun, x in traffic.latencies if begun >= timed]
    return traffic.figures(begin, traffic.mark(), seen)


@contextmanager
def _feeder(start: float, rate: float, seconds: float) -> Iterator[Iterator[bool]]:
    """Start the process that makes the stream; give True for each call, as it comes."""
    from gevent.os import make_nonblocking, nb_read

    options = (start, SEED, rate, seconds)
    command = [sys.executable, "-S", "-E", str(FEEDER), *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        make_nonblocking(pipe)

        def come() -> Iterator[bool]:
            while some := nb_read(pipe, 4096):
                for _ in some:
                    yield True
            yield False

        try:
            yield come()
        finally:
            process.kill()
