"""Join titles into one upstream call: gunicorn -k gevent flask_join_requests:app."""

from __future__ import annotations

import os

import requests
from flask import Flask, abort, request

from ubatch import (
    BadBatchOutput,
    DeadlineExceeded,
    QueueFull,
    Stopped,
    ubatch_decorator,
)

UPSTREAM_URL = os.environ.get("UPSTREAM_URL", "http://127.0.0.1:8001/predict")
CONNECT_TIMEOUT, READ_TIMEOUT = 1.0, 2.0

app = Flask(__name__)


# Each upstream call costs, so wait the whole 20 ms for more titles ("full"). Under
# gevent `requests` lets other greenlets run while it waits, so no thread is needed
# ("inline"). Up to four calls run at once: a slow one does not hold up the next.
# The deadline also bounds an answer that trickles in, which READ_TIMEOUT does not.
@ubatch_decorator(
    max_size=100, timeout=0.02, linger="full", executor="inline", workers=4, deadline=5
)
def are_suspicious(titles: list[str]) -> list[bool]:
    """Ask the upstream about all titles at once; what goes wrong, goes to each."""
    response = requests.post(
        UPSTREAM_URL,
        json={"predict": titles},
        timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
    )
    response.raise_for_status()
    answer = response.json()
    if not isinstance(answer, dict) or "predictions" not in answer:
        raise requests.RequestException("upstream sent no predictions")
    predictions: list[bool] = answer["predictions"]
    return predictions


@app.post("/predict")
def predict() -> dict[str, bool]:
    return {"prediction": are_suspicious.ubatch(read_title())}


def read_title() -> str:
    """Return the request's title, or answer 400 and say what is wrong with it."""
    try:
        body = request.get_json(silent=True)
    except RecursionError:  # "[[[[[[..."
        body = None
    if not isinstance(body, dict) or not isinstance(body.get("title"), str):
        abort(400, 'send {"title": "some text"} as JSON')
    return str(body["title"])


@app.errorhandler(requests.Timeout)
@app.errorhandler(DeadlineExceeded)
def answer_late(error: Exception) -> tuple[dict[str, str], int]:
    return {"error": "the upstream service took too long"}, 504


@app.errorhandler(requests.RequestException)
@app.errorhandler(BadBatchOutput)
def answer_broken(error: Exception) -> tuple[dict[str, str], int]:
    return {"error": "the upstream service failed"}, 502


@app.errorhandler(QueueFull)
@app.errorhandler(Stopped)
def answer_busy(error: Exception) -> tuple[dict[str, str], int]:
    return {"error": str(error)}, 503


@app.errorhandler(400)
def answer_wrong(error: Exception) -> tuple[dict[str, str], int]:
    return {"error": getattr(error, "description", "bad request")}, 400
