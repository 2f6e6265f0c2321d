"""How can a handler end, and how can a call?"""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ubatch import (
    BackendError,
    BadBatchOutput,
    BadBatchOutputSize,
    DeadlineExceeded,
    HandlerExit,
    QueueFull,
    Stopped,
    WorkerLost,
)

if TYPE_CHECKING:
    from tests.model import Batch

Way = Literal["results", "some", "raise", "none", "short", "long", "exit"]
"""How a handler ends."""

GOOD: tuple[Way, ...] = "results", "some"
FAILED: tuple[Way, ...] = "raise", "none", "short", "long"
WAYS: tuple[Way, ...] = (*GOOD, *FAILED, "exit")


class Boom(Exception):
    """What a handler raises, or returns for one call."""


class End(NamedTuple):
    """How a call ends: with its own result, or with an error of this very class."""

    counter: str
    error: type[BaseException] | None = None
    args: tuple[Any, ...] | None = None
    """Of the error; None for whatever it says."""


RESULT = End("results")
CANCELLED = End("cancelled", CancelledError)
EXPIRED = End("expired", DeadlineExceeded)
STOPPED = End("failures", Stopped)
BROKEN = End("failures", RuntimeError)
STUCK = End("expired", DeadlineExceeded)
JAMMED = End("failures", BackendError)
LOST = End("failures", WorkerLost)
REFUSED = End("failures", QueueFull)


class Call:
    """One call that was accepted."""

    def __init__(self, number: int, shape: str) -> None:
        self.number = number
        self.shape = shape
        self.batch: Batch | None = None  # None while it is not known which
        self.end: End | None = None
        self.doomed = False  # it is cancelled, unless a worker is quicker

    def __repr__(self) -> str:
        return f"<call {self.number} {self.shape}: {self.end or 'alive'}>"


def end_of(call: Call, calls: list[Call], way: Way, picked: bool) -> End:
    """Return how one of the calls ends that a handler was given.

    Args:
        picked: It gets an error of its own, if the handler returns some.
    """
    size = len(calls)
    ends: dict[Way, End] = {
        "results": RESULT,
        "some": End("failures", Boom, (call.number,)) if picked else RESULT,
        "raise": End("failures", Boom, tuple(one.number for one in calls)),
        "none": End("failures", BadBatchOutput),
        "short": End("failures", BadBatchOutputSize, (size, size - 1)),
        "long": End("failures", BadBatchOutputSize, (size, size + 1)),
        "exit": End("failures", HandlerExit),
    }
    return ends[way]
