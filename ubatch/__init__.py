"""Batching for greenlet servers and for threads."""

from ubatch.decorators import ubatch_decorator
from ubatch.errors import (
    BackendError,
    BadBatchOutput,
    BadBatchOutputSize,
    DeadlineExceeded,
    HandlerAlreadySet,
    HandlerExit,
    HandlerNotSet,
    QueueFull,
    Stopped,
    UBatchError,
)
from ubatch.future import Future
from ubatch.stats import Stats
from ubatch.ubatch import UBatch

__all__ = [
    "BackendError",
    "BadBatchOutput",
    "BadBatchOutputSize",
    "DeadlineExceeded",
    "Future",
    "HandlerAlreadySet",
    "HandlerExit",
    "HandlerNotSet",
    "QueueFull",
    "Stats",
    "Stopped",
    "UBatch",
    "UBatchError",
    "ubatch_decorator",
]
