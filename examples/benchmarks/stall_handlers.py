"""What keeps the interpreter busy for 50 ms in the benchmark `stall`?

Each maker returns a handler whose batches take about SECONDS on an idle machine: it
knows how to stop, or its work is sized by a short trial. They import what they need
when they are made: this module is read where that need not be installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SECONDS = 0.05
Handler = Callable[[list[Any]], list[Any]]


def numpy() -> Handler:
    """Multiply matrices again and again; each multiplication releases the GIL."""
    import numpy

    matrix = numpy.random.default_rng(0).random((400, 400))

    def multiply(items: list[Any]) -> list[Any]:
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            matrix @ matrix
        return items

    return multiply


def sleep() -> Handler:
    """Sleep natively, as any call that waits in C does; the GIL is free."""
    from gevent.monkey import get_original

    native: Callable[[float], None] = get_original("time", "sleep")

    def wait(items: list[Any]) -> list[Any]:
        native(SECONDS)
        return items

    return wait


def python() -> Handler:
    """Count in Python, which holds the GIL and gives it away when asked."""

    def count(items: list[Any]) -> list[Any]:
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            sum(range(100))
        return items

    return count


def one_call() -> Handler:
    """Make one call of a C function that holds the GIL until it returns."""
    size = _sized(lambda size: sum(range(size)), 200_000)

    def add(items: list[Any]) -> list[Any]:
        sum(range(size))
        return items

    return add


def sklearn() -> Handler:
    """Classify many rows with scikit-learn's LogisticRegression."""
    import numpy
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    pictures, digits = load_digits(return_X_y=True)
    model = LogisticRegression(max_iter=5, tol=10).fit(pictures / 16, digits)
    size = _sized(
        lambda size: model.predict_proba(numpy.resize(pictures, (size, 64))), 2_000
    )
    rows = numpy.resize(pictures / 16, (size, 64))

    def classify(items: list[Any]) -> list[Any]:
        model.predict_proba(rows)
        return items

    return classify


def timed(name: str) -> Handler:
    """Make a handler that answers its first call with the seconds that it took.

    The others get 0.0. Wherever it runs, who calls it knows.
    """
    run = MAKERS[name]()

    def work(items: list[Any]) -> list[Any]:
        began = time.perf_counter()
        run(items)
        return [time.perf_counter() - began, *[0.0] * (len(items) - 1)]

    return work


MAKERS: dict[str, Callable[[], Handler]] = {
    "numpy": numpy,
    "sleep": sleep,
    "python": python,
    "one C call": one_call,
    "sklearn": sklearn,
}


def _sized(work: Callable[[int], Any], size: int) -> int:
    """Return the size at which *work* takes SECONDS, tried twice as they say."""
    for _ in range(2):
        taken = min(_time(lambda: work(size)) for _ in range(3))
        size = max(1, int(size * SECONDS / taken))
    return size


def _time(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
