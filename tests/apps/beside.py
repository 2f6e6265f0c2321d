"""A Flask app whose model is beside its workers, and that model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from flask import Flask, request

from ubatch import UBatch
from ubatch.flask import init_app

app = Flask(__name__)
init_app(app)
doubled = UBatch[int, Any].connect(f"unix:{os.environ['SOCKET']}", deadline=30.0)


@app.get("/")
def ready() -> str:
    """Say that the app is there."""
    return "ready"


@app.get("/double")
def double() -> dict[str, Any]:
    """Answer one request, and tell who did."""
    answer, model = doubled.ubatch(int(request.args["n"]))
    return {"answer": answer, "model": model, "worker": os.getpid()}


def make() -> Callable[[list[int]], list[Any]]:
    """Return the handler, in a model process."""
    return lambda numbers: [(2 * number, os.getpid()) for number in numbers]
