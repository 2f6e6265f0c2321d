"""A Flask app of four batchers, whose items say how the handler is to fail."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from tests.chaos.journal import HOME, Journal
from tests.chaos.plan import BATCHERS, DEADLINE, HANG, KIND, answer_to
from ubatch import UBatch
from ubatch.flask import init_app

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
    """The handler cannot run with this item."""

    def __init__(self, of: str) -> None:
        super().__init__(of)
        self.of = of


class Refused(Poisoned):
    """The handler answers one item with this."""


journal = Journal(os.environ[HOME])
at_work: list[None] = []
"""One entry per run of a handler, even if nobody waits for that any more."""
numbers = count()


def handle(batcher: str, items: list[Item]) -> Any:
    """Answer a batch, in whichever way the worst of it wants."""
    number = next(numbers)
    at_work.append(None)
    journal.write(run=number, batcher=batcher, names=[item.name for item in items])
    try:
        return _handle(items, BATCHERS[batcher].takes)
    finally:
        journal.write(ran=number)
        at_work.pop()


def _handle(items: list[Item], takes: float) -> Any:
    faults = {item.fault for item in items}
    if "hang" in faults:
        time.sleep(HANG)
    if "busy" in faults:
        _keep_the_interpreter(0.05)
    if "exit" in faults:
        raise SystemExit(3)
    time.sleep(takes)
    for item in items:
        if item.fault == "poison":
            raise Poisoned(item.name)
    if "none" in faults:
        return None
    answers = [
        Refused(name) if fault == "own" else answer_to(name, data)
        for name, data, fault in items
    ]
    return answers[1:] if "short" in faults else answers


def _options(name: str) -> dict[str, Any]:
    kind = BATCHERS[name]
    return {
        "handler": partial(handle, name),
        "name": name,
        "workers": kind.workers,
        "on_error": kind.on_error,
        "handler_timeout": kind.limit,
        "max_pending": kind.max_pending,
        "deadline": DEADLINE,
    }


batchers: dict[str, UBatch[Item, str]] = {
    "pool": UBatch(32, 0.01, **_options("pool")),
    "pair": UBatch(8, 0.01, linger="settle", **_options("pair")),
    "hub": UBatch(16, 0.02, executor="inline", **_options("hub")),
    "shared": UBatch(16, 0.01, executor=SHARED, **_options("shared")),
}
for batcher in batchers.values():
    batcher.start()

calls: dict[str, Callable[[Item], str]] = {
    **{name: batcher.ubatch for name, batcher in batchers.items()},
    "pair": lambda item: batchers["pair"].submit(item).result(),
}

app = Flask(__name__)
init_app(app)


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


def _keep_the_interpreter(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
