"""What does a call cost while it waits, and does it cost more beside 100,000 others?

A worker is held in the handler, at a gate, while N calls gather behind it; then the
gate is opened. Two ways of waiting: ``ubatch``, one greenlet per call, parked in
``ubatch()``; and ``submit``, one caller that holds all the futures, on greenlets' and
on threads' backend. ``max_size`` is 64, or so large that all form one batch.

*Bytes* are traced (``tracemalloc``) from before the first call to when all wait, over
N. The items are made before and not counted. For ``ubatch``, the same is done in the
same process with N greenlets that do no more than ``hub.switch()``: that is the
caller's own greenlet, whose bytes are subtracted, and shown. What is left contains the
C stack that a greenlet keeps while it waits inside gevent's own code; so greenlets that
wait on a ``Waiter`` of gevent's, the least it offers, are shown too, less the bare
greenlet. For ``submit`` nothing is subtracted: the future is counted, the list that
holds it is not.

*Join* is the CPU time of the process per call, from the first call until all wait;
*settle*, from opening the gate until each caller has its result. For ``ubatch`` both
contain starting and ending greenlets: what that costs for the bare ones is shown
beside. This is measured apart from the bytes, as tracing is slow.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import plots
from parked import Bare, Futures, Greenlets, Parked, Waiters
from registry import Benchmark, Cell, Metrics
from results import Aim, Result, brief, most, table
from systems import System

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONE_BATCH = 200_000
POOL, THREAD = "ours:gevent:threadpool", "ours:thread"


def cells(system: System, parameters: Cell) -> Sequence[Cell]:
    """Return ways of waiting, sizes, and numbers of calls."""
    ways = [("submit", 64), ("submit", ONE_BATCH)]
    if system.world == "gevent":
        ways += [("ubatch", 64), ("ubatch", ONE_BATCH)]
    return [
        {"how": how, "max_size": size, "waiting": n}
        for how, size in ways
        for n in parameters["waiting"]
    ]


def measure(system: System, cell: Cell, parameters: Cell) -> Metrics:
    """Return bytes and CPU times per call, and those of the bare greenlets."""
    made = Greenlets if cell["how"] == "ubatch" else Futures
    calls, enough = cell["waiting"], parameters["calls"]

    def ours(calls: int = calls) -> Parked:
        return made(system, cell["max_size"], calls)

    with ours(10) as parked:  # for what only the first one makes
        parked.join()
        parked.settle()
    metrics = {"bytes": _bytes(ours, calls)}
    metrics["join_us"], metrics["settle_us"] = _cpu(ours, calls, enough)
    if cell["how"] == "ubatch":
        metrics |= _bare(calls, enough)
        metrics["bytes"] -= metrics["bare_bytes"]
    return metrics


@cache
def _bare(calls: int, enough: int) -> dict[str, float]:
    """Return the figures of greenlets that ask nobody; once in a process."""
    bare = _bytes(lambda: Bare(calls), calls)
    waiting = _bytes(lambda: Waiters(calls), calls)
    join, settle = _cpu(lambda: Bare(calls), calls, enough)
    return {
        "waiter_bytes": waiting - bare,
        "bare_bytes": bare,
        "bare_join_us": join,
        "bare_settle_us": settle,
    }


def _bytes(make: Callable[[], Parked], calls: int) -> float:
    """Return the traced bytes of a waiting call."""
    with make() as parked:
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        parked.join()
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        parked.settle()
    return (after - before) / calls


def _cpu(make: Callable[[], Parked], calls: int, enough: int) -> tuple[float, float]:
    """Return the CPU times of joining and of settling; few calls are done often."""
    joining = settling = 0.0
    rounds = max(1, enough // calls)
    gc.collect()
    for _ in range(rounds):
        with make() as parked:
            begun = time.process_time()
            parked.join()
            joined = time.process_time()
            parked.settle()
            settling += time.process_time() - joined
            joining += joined - begun
    each = 1e6 / (calls * rounds)
    return joining * each, settling * each


def show(result: Result) -> str:
    """Return a table of bytes and one of CPU time, a column for each number."""
    counts = result.values("waiting")
    series = _series(result)
    head = ["waiting", *(f"{n:,}" for n in counts)]
    rows_of_bytes, rows_of_cpu = [], []
    for system, how, size in series:
        title, keys = _title(system, how, size), {"how": how, "max_size": size}
        seen = [result.median(system, "bytes", waiting=n, **keys) for n in counts]
        rows_of_bytes.append([title, *map(brief, seen)])
        spent = [_own_cpu(result, system, n, keys) for n in counts]
        rows_of_cpu.append([title, *map(brief, spent)])
    for title, metrics, rows in (
        ("greenlet in a Waiter", ["waiter_bytes"], rows_of_bytes),
        ("bare greenlet, subtracted", ["bare_bytes"], rows_of_bytes),
        ("bare greenlet, subtracted", ["bare_join_us", "bare_settle_us"], rows_of_cpu),
    ):
        rows.append([title, *(brief(_sum(result, metrics, n)) for n in counts)])
    return (
        f"Bytes per waiting call, medians:\n\n{table(head, rows_of_bytes)}\n\n"
        "CPU time per call to join and to be settled, in microseconds, medians:\n\n"
        f"{table(head, rows_of_cpu)}"
    )


def _sum(result: Result, metrics: list[str], waiting: int) -> float | None:
    """Return the sum of some medians of bare greenlets, or None."""
    keys = {"how": "ubatch", "max_size": 64, "waiting": waiting}
    seen = [result.median(POOL, metric, **keys) for metric in metrics]
    return None if None in seen else sum(seen)  # type: ignore


def _title(system: str, how: str, size: int) -> str:
    return f"{system}, {how}(), max_size {size:,}"


def _series(result: Result) -> list[tuple[str, str, int]]:
    found = [(c["system"], c["how"], c["max_size"]) for c in result.cells]
    return list(dict.fromkeys(found))


def aims(result: Result) -> list[Aim]:
    """What was aimed at: under 500 bytes, and the cost of 1000 for 100,000."""
    found = []
    for system, how, size in _series(result):
        title, keys = _title(system, how, size), {"how": how, "max_size": size}
        counted = [n for n in result.values("waiting") if n >= 1000]
        seen = [result.median(system, "bytes", waiting=n, **keys) for n in counted]
        found.append(Aim(f"{title}: 1000 and more waiting", most(seen), 500, "bytes"))
        many, few = (_own_cpu(result, system, n, keys) for n in (100_000, 1000))
        flat = many / few if many is not None and few else None
        found.append(Aim(f"{title}: CPU at 100,000 over 1000", flat, 1.25))
    return found


def _own_cpu(result: Result, system: str, waiting: int, keys: Any) -> float | None:
    """Return what joining and settling cost, less what bare greenlets do."""
    spent = [
        result.median(system, f"{prefix}{part}_us", waiting=waiting, **keys)
        for prefix in ("", "bare_")
        for part in ("join", "settle")
    ]
    if spent[0] is None or spent[1] is None:
        return None
    return spent[0] + spent[1] - (spent[2] or 0.0) - (spent[3] or 0.0)


def plot(result: Result, figure: Figure) -> None:
    """Draw bytes and CPU time per call over the number of those that wait."""
    left, right = figure.subplots(1, 2)
    for number, (system, how, size) in enumerate(_series(result)):
        keys = {"how": how, "max_size": size}
        shown = {"color": f"C{number}", "marker": "o", "markersize": 4}
        bytes_at, cpu_at = {}, {}
        for n in result.values("waiting"):
            bytes_at[n] = result.median(system, "bytes", waiting=n, **keys)
            cpu_at[n] = _own_cpu(result, system, n, keys)
        left.plot(*_known(bytes_at), **shown)
        right.plot(*_known(cpu_at), label=_title(system, how, size), **shown)
    right.set_yscale("log")
    for axes, label in (left, "bytes per waiting call"), (
        right,
        "own CPU, µs per call",
    ):
        plots.finish(axes)
        axes.set(xscale="log", xlabel="calls waiting", ylabel=label)
    left.set_ylim(0, None)
    figure.suptitle("What a waiting call costs")
    right.get_legend().remove()
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def _known(found: dict[int, float | None]) -> tuple[list[int], list[float]]:
    pairs = [(x, y) for x, y in found.items() if y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


BENCHMARK = Benchmark(
    name="growth",
    question="What does a waiting call cost, up to 100,000 of them?",
    systems=(POOL, THREAD),
    cells=cells,
    measure=measure,
    table=show,
    plot=plot,
    aims=aims,
    most_repeats=3,
    full={"waiting": [10, 100, 1000, 10_000, 100_000], "calls": 2000},
    quick={"waiting": [10, 1000], "calls": 100},
)

if __name__ == "__main__":
    from cli import main

    main([BENCHMARK.name])
