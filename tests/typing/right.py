"""Typical uses; mypy --strict accepts all of it. Read, never run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ubatch import Future, Stats, UBatch, ubatch_decorator

Row = NDArray[np.float64]


def lengths(words: list[str]) -> list[int]:
    return [len(word) for word in words]


def scores(rows: list[Row]) -> Row:
    totals: Row = np.stack(rows).sum(axis=1)
    return totals


def modes(words: list[str], mode: list[str]) -> tuple[str, ...]:
    return tuple(word + how for word, how in zip(words, mode))


class Model:
    def predict(self, rows: list[Row]) -> Sequence[float]:
        return [float(row.sum()) for row in rows]

    @ubatch_decorator(max_size=8, timeout=0.01, linger="now")
    def decorated(self, words: list[str]) -> list[int]:
        return lengths(words)


# A handler tells the item and the result.
inferred = UBatch(8, 0.01, handler=lengths)
number: int = inferred.start().ubatch("word")
numbers: list[int] = inferred.map(["a", "b"])
ends: list[int | Exception] = inferred.map(["a"], return_exceptions=True)
future: Future[int] = inferred.submit("word")
later: int = future.result(timeout=1.0)
error: BaseException | None = future.exception()
within: int = inferred.with_options(deadline=0.2).ubatch("word")
stats: Stats = inferred.stats()
sizes: int = stats.batch_sizes[1]

# As in ubatch 0.0.2.
declared: UBatch[Row, Any] = UBatch(max_size=50, timeout=0.01)
declared.set_handler(handler=scores)
declared.start()
result: Any = declared.ubatch(np.zeros(3))

method: UBatch[Row, float] = UBatch(8, 0.01, handler=Model().predict)
score: float = method.ubatch(np.zeros(3))

several = UBatch(8, 0.01, handler=modes, executor=ProcessPoolExecutor(), workers=2)
said: str = several.ubatch("word", mode="loud")

with UBatch(8, 0.01, handler=lengths, backend="thread", max_pending=5) as entered:
    inside: int = entered.ubatch("word")


@ubatch_decorator(max_size=8, timeout=0.01)
def squared(xs: list[int]) -> list[int]:
    return [x * x for x in xs]


plain: list[int] = squared([1, 2])
one: int = squared.ubatch(3)
waiting: Future[int] = squared.submit(3)
mapped: list[int] = squared.map(range(3))
quick: int = squared.with_options(deadline=1.0).ubatch(3)
squared.stop(timeout=1.0)


@ubatch_decorator(8, 0.01, executor="inline", workers=4, name="array")
def array(rows: list[Row]) -> Row:
    return scores(rows)


whole: Row = array([np.zeros(3)])
element: Any = array.ubatch(np.zeros(3))
bound: int = Model().decorated.ubatch("word")
