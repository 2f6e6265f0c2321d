"""A Flask app of four batchers, whose items say how the handler is to fail."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from tests.chaos.plan import DEADLINE, HANG, KIND, answer_to
from ubatch import DeadlineExceeded, QueueFull, Stopped, UBatch

OPTIONS: dict[str, Any] = {"max_pending": 24, "deadline": DEADLINE}
"""What all batchers have in common."""

SHARED: Any = "hub_threadpool"
"""A pool that others use too: under gevent the look-ups of names do."""
if os.environ.get(KIND) == "gthread":
    SHARED = ThreadPoolExecutor(4)


class Item(NamedTuple):
    """What one request asks."""

    name: str
    data: str
    fault: str


class Poisoned(Exception):
    """The handler cannot run with this item; all of its batch get this."""

    def __init__(self, of: str) -> None:
        super().__init__(of)
        self.of = of


class Refused(Poisoned):
    """The handler answers one item with this."""


at_work: list[None] = []
"""One entry per batch in a handler, even if nobody waits for that any more."""


def handle(items: list[Item]) -> Any:
    """Answer a batch, in whichever way the worst of it wants."""
    at_work.append(None)
    try:
        return _handle(items)
    finally:
        at_work.pop()


def _handle(items: list[Item]) -> Any:
    faults = {item.fault for item in items}
    if "hang" in faults:
        time.sleep(HANG)
    if "busy" in faults:
        _keep_the_interpreter(0.05)
    if "exit" in faults:
        raise SystemExit(3)
    for item in items:
        if item.fault == "poison":
            raise Poisoned(item.name)
    time.sleep(0.003)
    if "none" in faults:
        return None
    answers = [
        Refused(name) if fault == "own" else answer_to(name, data)
        for name, data, fault in items
    ]
    return answers[1:] if "short" in faults else answers


batchers: dict[str, UBatch[Item, str]] = {
    "pool": UBatch(32, 0.01, handler=handle, **OPTIONS),
    "pair": UBatch(8, 0.01, handler=handle, workers=2, linger="settle", **OPTIONS),
    "hub": UBatch(16, 0.02, handler=handle, executor="inline", **OPTIONS),
    "shared": UBatch(16, 0.01, handler=handle, executor=SHARED, **OPTIONS),
}
for batcher in batchers.values():
    batcher.start()

calls: dict[str, Callable[[Item], str]] = {
    **{name: batcher.ubatch for name, batcher in batchers.items()},
    "pair": lambda item: batchers["pair"].submit(item).result(),
}

app = Flask(__name__)


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
    """Tell which error it was, and whose fault."""
    if isinstance(error, HTTPException):
        return error
    return {"error": type(error).__name__, "of": getattr(error, "of", "")}, (
        status_of(error)
    )


def status_of(error: Exception) -> int:
    """Return the HTTP status that an error deserves."""
    if isinstance(error, (QueueFull, Stopped)):
        return 503
    return 504 if isinstance(error, DeadlineExceeded) else 500


@app.after_request
def sign(response: Response) -> Response:
    """Tell which worker answered."""
    response.headers["X-Worker"] = str(os.getpid())
    return response


def _keep_the_interpreter(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
