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
    RemoteError,
    Stopped,
    UBatchError,
    WorkerLost,
)
from ubatch.future import Future
from ubatch.processes import ProcessExecutor
from ubatch.remote import ServerExecutor
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
    "ProcessExecutor",
    "QueueFull",
    "RemoteError",
    "ServerExecutor",
    "Stats",
    "Stopped",
    "UBatch",
    "UBatchError",
    "WorkerLost",
    "ubatch_decorator",
]
