"""What do several workers of one gunicorn gain by one model for all of them?

Each with a model and a batcher of its own, beside a model server for all: how large the
batches are, with bursts of new connections and with connections that are kept busy, and
what memory it takes. Both have a ``timeout`` of about twice the handler's time: a batch
that has waited for longer, behind another, waits for nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from registry import Cell, Metrics
from serve_server import Server, bodies

BURSTS, CLOSED = "bursts of 20", "closed, 64"
CONNECTIONS = 64
BEFORE = 5
"""Bursts that are not counted."""


def measure(server: Server, cell: Cell, parameters: Cell) -> Metrics:
    """Return the mean batch, and the waits in seconds."""
    if cell["load"] == CLOSED:
        found = server.drive("/predict", CONNECTIONS, parameters["seconds"])
        wanted = "mean_batch", "requests_per_second", "p50", "p99"
        return {name: found[name] for name in wanted}
    return _bursts(server, parameters["bursts"])


def _bursts(server: Server, count: int) -> Metrics:
    from bursts import burst
    from load import percentiles

    request = _request(bodies()[0])
    for _ in range(BEFORE):
        burst(server.port, request)
    before = server.settled()
    seen = [answer for _ in range(count) for answer in burst(server.port, request)]
    after = server.settled()
    batches = after["batches"] - before["batches"]
    p50, p99 = percentiles([seconds for seconds, _ in seen])
    mean_batch = (after["calls"] - before["calls"]) / batches
    return {"mean_batch": mean_batch, "p50": p50, "p99": p99}


def _request(body: str) -> bytes:
    return (
        "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def memory(server: Server, parameters: Cell) -> Metrics:
    """Return the bytes of the workers, of the others, and of all.

    Memory that several processes share counts in parts. The master, which does not grow
    with what it serves, does not count.
    """
    server.drive("/predict", CONNECTIONS, parameters["seconds"])
    found: dict[str, Any] = {
        who: float(memory_of(pids)) for who, pids in server.processes().items()
    }
    found["all"] = sum(found.values())
    return found


def memory_of(pids: Iterable[int]) -> int:
    """Return the bytes that are theirs: of shared ones, their part (PSS)."""
    return sum(_pss(Path(f"/proc/{pid}/smaps_rollup").read_text()) for pid in pids)


def _pss(text: str) -> int:
    line = next(line for line in text.splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024
