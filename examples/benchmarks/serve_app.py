"""Which application does the benchmark `serve` put under gunicorn?

It runs in each system's own environment, so it imports nothing of the benchmarks'. What
it serves comes by the environment: BENCH_MODEL is a name of MODELS; BENCH_BATCHER is
"none" or "ubatch"; BENCH_OPTIONS holds UBatch's options as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from flask import Flask, request
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.neural_network import MLPClassifier

MODELS: dict[str, Callable[[], Any]] = {
    "forest": lambda: RandomForestClassifier(200, random_state=0),
    "mlp": lambda: MLPClassifier((512, 256), max_iter=4, random_state=0),
}
MAX_SIZE, TIMEOUT = 64, 0.01

app = Flask(__name__)


class Handler:
    """Calls the model, and notes each call: the same way for every system."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # (calls, seconds, CPU seconds) of each batch. To append is atomic, whichever
        # threads do it, and under gevent asks no lock.
        self.batches: list[tuple[int, float, float]] = []

    def __call__(self, pictures: list[np.ndarray]) -> list[int]:
        """Return the digit of each picture."""
        began, cpu = time.perf_counter(), time.thread_time()
        digits = self.model.predict(np.stack(pictures)).tolist()
        seconds, cpu = time.perf_counter() - began, time.thread_time() - cpu
        self.batches.append((len(pictures), seconds, cpu))
        return digits


def load() -> Any:
    """Train the model: a fraction of a second, and the same one in every process."""
    model = MODELS[os.environ.get("BENCH_MODEL", "forest")]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # four rounds of training do not converge
        return model.fit(*load_digits(return_X_y=True))


def make_predict(handler: Handler) -> tuple[Callable[[np.ndarray], int], Any]:
    """Return what answers one request, and the batcher, if there is one."""
    if os.environ.get("BENCH_BATCHER", "ubatch") == "none":
        return lambda picture: handler([picture])[0], None
    from ubatch.ubatch import UBatch

    options = json.loads(os.environ.get("BENCH_OPTIONS", "{}"))
    batcher: Any = UBatch(MAX_SIZE, TIMEOUT, **options)
    batcher.set_handler(handler)
    batcher.start()
    return batcher.ubatch, batcher


if "BENCH_SWITCH_INTERVAL" in os.environ:
    sys.setswitchinterval(float(os.environ["BENCH_SWITCH_INTERVAL"]))

handle = Handler(load())
predict_one, batcher = make_predict(handle)


def read_picture() -> np.ndarray:
    return np.array(request.get_json()["pixels"], dtype=float)


@app.post("/predict")
def predict() -> dict[str, int]:
    return {"digit": predict_one(read_picture())}


@app.post("/echo")
def echo() -> dict[str, int]:
    """Do all that /predict does, but for the model: the ceiling.

    It gives way once, as whoever waits for a batch does. A greenlet that never waits
    would have gunicorn serve the same few connections again and again.
    """
    picture = read_picture()
    time.sleep(0)
    return {"digit": len(picture) - MAX_SIZE}


@app.get("/stats")
def stats() -> dict[str, Any]:
    batches = list(handle.batches)
    calls, seconds, cpu_seconds = map(sum, zip((0, 0.0, 0.0), *batches))
    return {
        "pid": os.getpid(),
        "batches": len(batches),
        "calls": calls,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "ubatch": seen_by_ubatch(),
    }


def seen_by_ubatch() -> dict[str, Any] | None:
    """Return what the batcher counted itself, where it counts."""
    if not hasattr(batcher, "stats"):
        return None
    seen = batcher.stats()
    return {
        "calls": seen.calls_total,
        "batches": seen.batches_total,
        "reasons": seen.dispatch_reasons,
        "backend": seen.backend,
        "executor": seen.executor,
    }


@app.get("/pictures")
def pictures() -> list[dict[str, Any]]:
    """Return what to post, and what the model says to each alone."""
    rows = load_digits().data[:32]
    digits = [int(handle.model.predict([row])[0]) for row in rows]
    bodies = [json.dumps({"pixels": row.astype(int).tolist()}) for row in rows]
    return [{"body": body, "digit": digit} for body, digit in zip(bodies, digits)]


@app.get("/handler/<int:size>")
def time_handler(size: int) -> dict[str, float]:
    """Time the model alone, while nobody else asks: the median of seven batches."""
    rows = load_digits().data[:size]
    before = len(handle.batches)
    for _ in range(7):
        handle(list(rows))
    seconds = [seconds for _, seconds, _ in handle.batches[before:]]
    return {"seconds": sorted(seconds)[3]}
