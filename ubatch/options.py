"""Are the options sane? Whatever is not is refused where it is written."""

from __future__ import annotations

import inspect
import math
import operator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from ubatch.isolation import OnError
    from ubatch.policy import Linger

SHORTEST_WAIT = 0.001
"""Seconds; epoll counts in milliseconds, and libuv warns of less."""

LONGEST_WAIT = 1e9
"""Seconds, 30 years; libuv counts milliseconds, and not beyond 64 bits."""

MOST_WORKERS = 100_000
"""More than any machine can run; a pool's semaphore counts no further than 2 ** 31."""

LONGEST_SHOWN = 200
"""Characters of a value that an error message repeats."""

Word = TypeVar("Word", bound=str)


class Options(NamedTuple):
    """What the user chose for all of a batcher's calls; see UBatch."""

    max_size: int
    timeout: float
    workers: int
    linger: Linger
    max_pending: int | None
    shed: bool
    on_error: OnError
    handler_timeout: float | None

    @property
    def threads(self) -> int:
        """How many handlers may run at once, stuck ones besides."""
        return self.workers if self.handler_timeout is None else 2 * self.workers


def count(option: str, value: int, most: int | None = None) -> int:
    """Return a whole number of at least 1, and at most *most*."""
    try:
        number = operator.index(value)
    except Exception:
        raise TypeError(
            f"{option} must be a whole number, not {shown(value)}"
        ) from None
    if number < 1:
        raise ValueError(f"{option} must be at least 1, not {shown(value)}")
    if most is not None and number > most:
        raise ValueError(f"{option} must be at most {most}, not {shown(value)}")
    return number


def seconds(option: str, value: float) -> float:
    """Return a finite time of 0 seconds or more."""
    try:
        time = float(value)
    except OverflowError:  # a whole number that no float can hold
        time = math.inf
    except Exception:
        raise TypeError(
            f"{option} must be a number of seconds, not {shown(value)}"
        ) from None
    if not 0 <= time < math.inf:  # NaN fails this too
        raise ValueError(
            f"{option} must be 0 seconds or more, and finite, not {shown(value)}"
        )
    return min(time, LONGEST_WAIT)


def clocked(wait: float | None) -> float | None:
    """Return how long a clock can wait, for a wait of any length; 0 is none."""
    return wait and min(max(wait, SHORTEST_WAIT), LONGEST_WAIT)


def limit(option: str, value: float | None) -> float | None:
    """Return a time that can be waited for, or None."""
    if value is None:
        return None
    time = seconds(option, value)
    if time == 0:
        raise ValueError(
            f"{option} must be more than 0 seconds; None means no {option}"
        )
    return max(time, SHORTEST_WAIT)


def flag(option: str, value: bool) -> bool:
    """Return True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{option} must be True or False, not {shown(value)}")
    return value


def one_of(option: str, value: Word, words: tuple[Word, ...]) -> Word:
    """Return one of a few words."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(
            f"{option}={shown(value)} is unknown; use one of {', '.join(words)}"
        )
    return value


def name(value: str | None) -> str | None:
    """Return a name, for log lines and numbers."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"name must be a string, not {shown(value)}")
    return value


def check_handler(handler: object) -> None:
    """Refuse what cannot answer a batch.

    Raises:
        TypeError: It cannot be called, or is a coroutine function.
    """
    if not callable(handler):
        raise TypeError(
            f"handler must be a function that takes lists, not {shown(handler)}"
        )
    for function in (handler, getattr(handler, "__call__", None)):
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(
            function
        ):
            raise TypeError(
                f"handler {shown(handler)} is a coroutine function, and nothing here "
                "would await it; pass a plain function, for instance one that calls "
                "asyncio.run()"
            )


def shown(value: object) -> str:
    """Return a value for an error message, in a line that can be read."""
    try:
        text = repr(value)
    except Exception:  # the value's own, or a number with too many digits
        return f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
