"""Which resource binds a cell of `serve`, and how fast could it have been at best?

Pure functions: they take the figures of one cell, and are tested with made-up ones.
"""

from __future__ import annotations

from typing import NamedTuple

BUSY = 0.85
"""A process with one GIL that works this share of a core is at its limit."""

SHARE = 0.3
"""Whoever has less than this share of the server's CPU is a bystander."""

STRETCHED = 1.25
"""A handler that takes so many times its CPU time, while the server never idles, waits
for the GIL."""

RULE = f"""\
*binds* is what fits first, in CPU and wall seconds per second of the run:

* *generator*: wrk uses {BUSY:.0%} of a core.
* *cores*: the server uses less than {BUSY:.0%}, and was ready to, but had no core.
* *handler*: the server uses less, and yet the handler runs {BUSY:.0%} of the time.
* *waiting*: the server uses less; calls wait for company, or callers are too few.
* *HTTP*: the server is at its limit, as below; {1 - SHARE:.0%} is not the handler's.
* *GIL*: the handler takes {STRETCHED:g} times its own CPU time.
* *handler*: {1 - SHARE:.0%} of the server's CPU is the handler's.
* *turns*: HTTP and the handler, one after the other."""


class Load(NamedTuple):
    """Who used what in one cell, in seconds per second of wall."""

    server_cpu: float
    """CPU of the server process, all threads."""
    server_queued: float
    """Time for which the server's first thread was ready and had no core."""
    handler_busy: float
    """Time inside the handler, summed over its batches; above 1.0 if some overlap."""
    handler_cpu: float
    """CPU inside the handler."""
    generator_cpu: float
    """CPU of wrk."""


def binding(load: Load) -> str:
    """Return the resource that binds: see RULE."""
    if load.generator_cpu >= BUSY:
        return "generator"
    if load.server_cpu < BUSY:
        if load.server_queued >= 0.1 and load.server_cpu + load.server_queued >= BUSY:
            return "cores"
        return "handler" if load.handler_busy >= BUSY else "waiting"
    share = load.handler_cpu / load.server_cpu
    if share <= SHARE or load.server_cpu - load.handler_cpu >= BUSY:
        return "HTTP"
    if load.handler_busy >= STRETCHED * load.handler_cpu:
        return "GIL"
    return "handler" if share >= 1 - SHARE or load.handler_cpu >= BUSY else "turns"


def best_rate(ceiling: float, max_size: int, handler_seconds: float) -> float:
    """Return the requests per second that neither HTTP nor the handler lets pass.

    Args:
        ceiling: Requests per second of the same route without a model.
        max_size: Calls in the largest batch.
        handler_seconds: What the handler takes for such a batch, alone.
    """
    return min(ceiling, max_size / handler_seconds)


def best_rate_in_turns(ceiling: float, max_size: int, handler_seconds: float) -> float:
    """Return the same for a handler that holds the GIL: HTTP stands still meanwhile."""
    return 1.0 / (1.0 / ceiling + handler_seconds / max_size)


def is_censored(answered: int, connections: int) -> bool:
    """Tell whether the waits say little: they are those of the lucky ones.

    When wrk ends, each connection waits for an answer that is not counted. With fewer
    than four answers per connection those are the long ones.
    """
    return answered < 4 * connections
