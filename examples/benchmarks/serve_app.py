"""Which application does the benchmark `serve` put under gunicorn?

It runs in each system's own environment, so it imports nothing of the benchmarks' but
its model. What it serves comes by the environment: BENCH_BATCHER is a name of BATCHERS;
BENCH_OPTIONS holds the batcher's options as JSON; serve_model.py and serve_conf.py read
the others. Where the handler is in another process, this one does not import the model.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flask import Flask, request

OPTIONS = {
    "max_size": 64,
    "timeout": 0.01,
    **json.loads(os.environ.get("BENCH_OPTIONS", "{}")),
}

app = Flask(__name__)


def unbatched() -> tuple[Callable[[np.ndarray], int], Any]:
    """Call the model once per request."""
    import serve_model

    handler = serve_model.make()
    return lambda picture: handler([picture])[0], handler


def here() -> tuple[Callable[[np.ndarray], int], Any]:
    """Batch in this process, with whichever ubatch is installed."""
    import serve_model
    from ubatch.ubatch import UBatch

    batcher: Any = UBatch(**OPTIONS)
    batcher.set_handler(serve_model.make())
    batcher.start()
    return batcher.ubatch, None


def process() -> tuple[Callable[[np.ndarray], int], Any]:
    """Batch here, and run the batches in a process of their own."""
    from ubatch import ProcessExecutor, UBatch

    executor = ProcessExecutor("serve_model:make")
    batcher: Any = UBatch(executor=executor, **OPTIONS).start()
    return batcher.ubatch, None


def server() -> tuple[Callable[[np.ndarray], int], Any]:
    """Ask the model server that serve_conf.py has gunicorn run."""
    from ubatch import UBatch

    return UBatch.connect(f"unix:{os.environ['BENCH_HOME']}/socket").ubatch, None


BATCHERS = {"none": unbatched, "ubatch": here, "process": process, "server": server}

if "BENCH_SWITCH_INTERVAL" in os.environ:
    sys.setswitchinterval(float(os.environ["BENCH_SWITCH_INTERVAL"]))

predict_one, handle = BATCHERS[os.environ.get("BENCH_BATCHER", "ubatch")]()


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
    return {"digit": len(picture) - 64}


@app.get("/pid")
def pid() -> dict[str, int]:
    return {"pid": os.getpid()}


@app.get("/handler/<int:size>")
def time_handler(size: int) -> dict[str, float]:
    """Time the model alone, unbatched, while nobody else asks."""
    import serve_model

    return {"seconds": serve_model.time_alone(handle, size)}
