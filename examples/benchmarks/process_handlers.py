"""What do the round trips of the benchmark `process` ask for?

Each function makes a handler that does next to nothing, here or in a model process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

ROWS, PICTURES = 16, 64
Handler = Callable[[list[Any]], list[Any]]


def rows() -> list[np.ndarray]:
    """Return some rows of numbers."""
    return list(np.random.default_rng(0).random((ROWS, 64)))


def pictures() -> list[np.ndarray]:
    """Return some pictures, each in memory of its own."""
    random = np.random.default_rng(0)
    shape = (224, 224, 3)
    return [random.integers(0, 256, shape, np.uint8) for _ in range(PICTURES)]


def echo() -> Handler:
    """Return what comes."""
    return lambda items: items


def look() -> Handler:
    """Return a number for each picture."""
    return lambda items: [int(picture[0, 0, 0]) for picture in items]


def show() -> Handler:
    """Return a picture for each number."""
    kept = pictures()
    return lambda items: [kept[number] for number in items]
