"""A page that reads drawn digits; what is posted to /predict is batched."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from flask import Flask, abort, render_template, request
from werkzeug.exceptions import HTTPException

import ubatch.flask
from ubatch import ServerExecutor, ubatch_decorator

PIXELS, FULL = 64, 16.0  # an 8x8 picture, each value from 0 (paper) to 16 (ink)

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 4096  # bytes; 64 numbers need about 1200

# The model is here, in each worker; or in a process that serves all workers, which then
# import nothing of it: see gunicorn.conf.py.
if "MODEL_SOCKET" in os.environ:
    executor: Any = ServerExecutor(f"unix:{os.environ['MODEL_SOCKET']}")
else:
    import model

    executor, read = "threadpool", model.make()


@ubatch_decorator(
    *(64, 0.01), executor=executor, max_pending=1000, deadline=5.0, name="digits"
)
def probabilities(pictures: list[np.ndarray]) -> np.ndarray:
    """Return one row of ten probabilities per picture."""
    return read(pictures)


@app.get("/")
def index() -> str:
    return render_template("index.html")


@app.post("/predict")
def predict() -> dict[str, Any]:
    return answer(probabilities.ubatch(read_picture()))


@app.post("/predict_single")
def predict_single() -> dict[str, Any]:
    """Do as one does without ubatch: one predict per request, all others wait."""
    return answer(probabilities([read_picture()])[0])


@app.get("/stats")
def stats() -> dict[str, Any]:
    """Return the counters of the worker process that happens to answer."""
    now = probabilities.stats()
    return {
        "pid": os.getpid(),
        "backend": now.backend,
        "executor": now.executor,
        "calls_total": now.calls_total,
        "batches_total": now.batches_total,
        "mean_batch_size": now.mean_batch_size,
        "batch_sizes": dict(now.batch_sizes),
        "dispatch_reasons": dict(now.dispatch_reasons),
        "pending": now.pending,
        "running": now.running,
    }


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


def read_picture() -> np.ndarray:
    """Return the request's picture, or answer 400 and say what is wrong with it."""
    try:
        body = request.get_json(silent=True)
    except RecursionError:  # "[[[[[[..."
        body = None
    if not isinstance(body, dict):
        abort(400, "send a JSON object, with Content-Type: application/json")
    if "pixels" not in body:
        abort(400, '"pixels" is missing')
    pixels = body["pixels"]
    if not isinstance(pixels, list) or len(pixels) != PIXELS:
        abort(400, f'"pixels" must be a list of {PIXELS} numbers')
    for index, value in enumerate(pixels):
        if type(value) not in (int, float) or not 0 <= value <= FULL:
            abort(400, f'"pixels"[{index}] must be a number from 0 to {FULL:g}')
    return np.array(pixels, dtype=float)


def answer(row: np.ndarray) -> dict[str, Any]:
    return {"digit": int(row.argmax()), "probabilities": row.round(4).tolist()}


@app.errorhandler(HTTPException)
def answer_http(error: HTTPException) -> Any:
    response = error.get_response()  # keeps headers such as Allow
    response.data = app.json.dumps({"error": error.description})
    response.mimetype = "application/json"
    return response


# Too busy is 503, with Retry-After; too late is 504.
ubatch.flask.init_app(app)
