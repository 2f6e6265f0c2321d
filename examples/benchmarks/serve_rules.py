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


RULE_APART = f"""\
Where the handler has a process of its own:

* *HTTP*, *model server* or *handler*: the process of that uses most, and {BUSY:.0%}.
* *cores*: one of them uses less, and was ready to, but had no core.
* *handler*: the handler runs {BUSY:.0%} of the time.
* *waiting*: calls wait for company, or callers are too few."""


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
    model_cpu: float | None = None
    """CPU of the handler's process; None if that is the server."""
    model_queued: float = 0.0
    """As the server's."""
    model_server_cpu: float = 0.0
    """CPU of the process between those two, where there is one."""
    model_server_queued: float = 0.0
    """As the server's."""


def binding(load: Load) -> str:
    """Return the resource that binds: see RULE and RULE_APART."""
    if load.generator_cpu >= BUSY:
        return "generator"
    if load.model_cpu is not None:
        return _binding_apart(load, load.model_cpu)
    if load.server_cpu < BUSY:
        if _lacks_core(load.server_cpu, load.server_queued):
            return "cores"
        return "handler" if load.handler_busy >= BUSY else "waiting"
    share = load.handler_cpu / load.server_cpu
    if share <= SHARE or load.server_cpu - load.handler_cpu >= BUSY:
        return "HTTP"
    if load.handler_busy >= STRETCHED * load.handler_cpu:
        return "GIL"
    return "handler" if share >= 1 - SHARE or load.handler_cpu >= BUSY else "turns"


def _binding_apart(load: Load, model_cpu: float) -> str:
    """Return what binds where server and handler are processes that run at once."""
    stages = {
        "HTTP": (load.server_cpu, load.server_queued),
        "model server": (load.model_server_cpu, load.model_server_queued),
        "handler": (model_cpu, load.model_queued),
    }
    busiest = max(stages, key=lambda name: stages[name][0])
    if stages[busiest][0] >= BUSY:
        return busiest
    if any(_lacks_core(*stage) for stage in stages.values()):
        return "cores"
    return "handler" if load.handler_busy >= BUSY else "waiting"


def _lacks_core(cpu: float, queued: float) -> bool:
    return queued >= 0.1 and cpu + queued >= BUSY


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
