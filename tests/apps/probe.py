"""A WSGI app with a batched route, one that is not, and a look into the worker.

In the environment: GATE, a FIFO that the handler waits for; EXECUTOR; WARM, how many
calls to make at import; UBATCH_LOG, a file for the library's log lines.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, cast
from urllib.parse import parse_qsl

if os.environ.get("PATCH"):  # as an app that patches by itself, before all imports
    from gevent import monkey

    monkey.patch_all()

from ubatch import UBatch
from ubatch.executors import ExecutorName

lines: list[tuple[int, str]] = []
handled: list[tuple[int, int]] = []


class Lines(logging.Handler):
    """Keeps what the library logs, with the process that logged it."""

    def emit(self, record: logging.LogRecord) -> None:
        lines.append((os.getpid(), f"{record.levelname} {record.getMessage()}"))


logging.getLogger("ubatch").setLevel(logging.INFO)
logging.getLogger("ubatch").addHandler(Lines())
if "UBATCH_LOG" in os.environ:
    logging.getLogger("ubatch").addHandler(
        logging.FileHandler(os.environ["UBATCH_LOG"])
    )
    logging.getLogger("ubatch").propagate = False


def squares(numbers: list[str]) -> list[int]:
    """Answer a batch; hold it at the gate; misbehave if a call asks for that."""
    handled.append((os.getpid(), len(numbers)))
    if "exit" in numbers:
        raise SystemExit(3)
    if "block" in numbers:
        os.close(os.open(os.environ["BLOCK"], os.O_RDONLY))
    if "GATE" in os.environ:
        os.close(os.open(os.environ["GATE"], os.O_RDONLY))
    return [int(number) ** 2 for number in numbers]


ub: UBatch[str, int] = UBatch(
    64,
    0.05,
    handler=squares,
    executor=cast(ExecutorName, os.environ.get("EXECUTOR", "threadpool")),
)
ub.start()
WARMED = [ub.ubatch(str(number)) for number in range(int(os.environ.get("WARM", "0")))]


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request."""
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    status = "200 OK"
    if environ["PATH_INFO"] == "/square":
        try:
            body: dict[str, Any] = {"pid": os.getpid(), "result": ub.ubatch(query["n"])}
        except Exception as error:
            status, body = "500 Server Error", {"error": type(error).__name__}
    elif environ["PATH_INFO"] == "/plain":
        body = {"pid": os.getpid(), "result": int(query["n"]) ** 2}
    elif environ["PATH_INFO"] == "/seen":
        body = seen()
    else:
        start_response(status, [("Content-Type", "text/plain")])
        return [b"ready"]
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]


def seen() -> dict[str, Any]:
    """Return what this worker has seen so far."""
    stats = ub.stats()
    pid = os.getpid()
    return {
        "pid": pid,
        "gevent": "gevent" in sys.modules,
        "lines": [line for owner, line in lines if owner == pid],
        "handled": [size for owner, size in handled if owner == pid],
        "waiting": stats.pending + stats.running,
        "backend": ub.backend,
        "calls": stats.calls_total,
        "batches": stats.batches_total,
        "results": stats.results_total,
    }
