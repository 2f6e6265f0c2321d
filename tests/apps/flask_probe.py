"""The probe as a Flask app, for servers whose own WSGI code should meet Flask's."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, request

from tests.apps import probe

app = Flask(__name__)


@app.get("/")
def ready() -> str:
    """Say that the app is there."""
    return "ready"


@app.get("/square")
def square() -> dict[str, Any]:
    """Answer as one of a batch."""
    return {"pid": os.getpid(), "result": probe.ub.ubatch(request.args["n"])}


@app.get("/seen")
def seen() -> dict[str, Any]:
    """Tell what this worker has seen so far; this does not wait for a batch."""
    return probe.seen()
