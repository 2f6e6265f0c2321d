"""A Flask app of six batchers, whose items say how the handler is to fail."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from tests.chaos.handler import Item, handler_of
from tests.chaos.journal import HOME
from tests.chaos.plan import BATCHERS, DEADLINE, KIND, socket_of
from ubatch import BackendError, ProcessExecutor, UBatch, WorkerLost
from ubatch.flask import answer, init_app

SHARED: Any = "hub_threadpool"
"""A pool that others use too: under gevent the look-ups of names do."""
if os.environ.get(KIND) == "gthread":
    SHARED = ThreadPoolExecutor(4)


def _options(name: str) -> dict[str, Any]:
    kind = BATCHERS[name]
    return {
        "name": name,
        "workers": kind.workers,
        "on_error": kind.on_error,
        "handler_timeout": kind.limit,
        "max_pending": kind.max_pending,
        "deadline": DEADLINE,
    }


def _here(name: str) -> dict[str, Any]:
    return {"handler": handler_of(name), **_options(name)}


executor = ProcessExecutor("tests.chaos.handler:process", BATCHERS["process"].workers)
batchers: dict[str, UBatch[Item, str]] = {
    "pool": UBatch(32, 0.01, **_here("pool")),
    "pair": UBatch(8, 0.01, linger="settle", **_here("pair")),
    "hub": UBatch(16, 0.02, executor="inline", **_here("hub")),
    "shared": UBatch(16, 0.01, executor=SHARED, **_here("shared")),
    "process": UBatch(16, 0.01, executor=executor, **_options("process")),
}
for batcher in batchers.values():
    batcher.start()
address = f"unix:{socket_of(os.environ[HOME])}"
batchers["server"] = UBatch.connect(address, deadline=DEADLINE, name="server")

calls: dict[str, Callable[[Item], str]] = {
    **{name: batcher.ubatch for name, batcher in batchers.items()},
    "pair": lambda item: batchers["pair"].submit(item).result(),
}

app = Flask(__name__)
init_app(app)


@app.errorhandler(WorkerLost)
@app.errorhandler(BackendError)
def tell_all(error: BackendError) -> Any:
    """Say what was lost: the ledger is told what others are not."""
    body, status, headers = answer(error)
    return {**body, "message": str(error)}, status, headers


@app.get("/")
def ready() -> str:
    """Say that the app is there."""
    return "ready"


@app.post("/<batcher>")
def ask(batcher: str) -> dict[str, str]:
    """Answer one request."""
    asked = request.get_json()
    if asked["dns"]:
        socket.getaddrinfo("localhost", 80)
    item = Item(asked["name"], asked["data"], asked["fault"])
    return {"answer": calls[batcher](item)}


@app.errorhandler(Exception)
def failed(error: Exception) -> Any:
    """Tell which error it was, and whose fault; those of ours have their handlers."""
    if isinstance(error, HTTPException):
        return error
    return {"error": type(error).__name__, "of": getattr(error, "of", "")}, 500


@app.after_request
def sign(response: Response) -> Response:
    """Tell which worker answered."""
    response.headers["X-Worker"] = str(os.getpid())
    return response
