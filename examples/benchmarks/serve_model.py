"""Which models does the benchmark `serve` have?

It runs in each system's own environment, in gunicorn's workers or in a model process.
BENCH_MODEL is a name of MODELS. As a program it prints what may be posted to /predict,
as JSON.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.neural_network import MLPClassifier

from serve_notes import Notes

MODELS: dict[str, Callable[[], Any]] = {
    "forest": lambda: RandomForestClassifier(200, random_state=0),
    "mlp": lambda: MLPClassifier((512, 256), max_iter=4, random_state=0),
}
PICTURES = 32


class Handler:
    """Calls the model, and notes each call: the same way for every system."""

    def __init__(self, model: Any, notes: Notes) -> None:
        self.model = model
        self.notes = notes

    def __call__(self, pictures: list[np.ndarray]) -> list[int]:
        """Return the digit of each picture."""
        began, cpu = time.perf_counter(), time.thread_time()
        digits: list[int] = self.model.predict(np.stack(pictures)).tolist()
        seconds, cpu = time.perf_counter() - began, time.thread_time() - cpu
        self.notes.add(len(pictures), seconds, cpu)
        return digits


def make() -> Handler:
    """Train the model, a fraction of a second and the same one in every process."""
    model = MODELS[os.environ.get("BENCH_MODEL", "forest")]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # four rounds of training do not converge
        model.fit(*load_digits(return_X_y=True))
    return Handler(model, Notes())


def time_alone(handler: Handler, size: int) -> float:
    """Time the model while nobody else asks: the median of seven batches."""
    rows = np.stack(load_digits().data[:size])
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        handler(list(rows))
        taken.append(time.perf_counter() - began)
    return sorted(taken)[3]


if __name__ == "__main__":
    rows = load_digits().data[:PICTURES].astype(int).tolist()
    print(json.dumps([json.dumps({"pixels": row}) for row in rows]))
