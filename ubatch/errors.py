"""What can go wrong, and how one failure is handed to many callers."""

from __future__ import annotations

import copy
from types import TracebackType


class UBatchError(Exception):
    """Root of the errors that ubatch itself raises."""


class HandlerNotSet(UBatchError):
    """start() needs a handler: pass ``handler=`` or call set_handler() first."""


class HandlerAlreadySet(UBatchError):
    """A batcher keeps its handler for life; make another UBatch for another one."""


class BadBatchOutput(UBatchError):
    """The handler returned something that cannot answer its calls one by one."""


class BadBatchOutputSize(BadBatchOutput):
    """The handler returned more or fewer results than it was given calls."""

    def __init__(self, input_size: int, output_size: int) -> None:
        """Say how many calls went in and how many results came out.

        Args:
            input_size: Number of calls in the batch.
            output_size: Number of results the handler returned.
        """
        super().__init__(input_size, output_size)
        self.input_size = input_size
        self.output_size = output_size

    @property
    def message(self) -> str:
        """The text of this error; kept for users of ubatch 0.0.2."""
        return (
            f"the handler got {self.input_size} calls and returned "
            f"{self.output_size} results; return one result per call, in order"
        )

    def __str__(self) -> str:
        return self.message


class HandlerExit(UBatchError):
    """The handler ended with something that is not an ``Exception``.

    ``SystemExit``, ``KeyboardInterrupt``, ``GreenletExit`` or ``gevent.Timeout``
    is its ``__cause__``; raised in a request it would stop the server, or be
    mistaken for the request's own.
    """


class QueueFull(UBatchError):
    """``max_pending`` calls are waiting already; shed this one (HTTP 503)."""


class DeadlineExceeded(UBatchError, TimeoutError):
    """The call's ``deadline`` passed before its result was there (HTTP 504)."""


class Stopped(UBatchError):
    """stop() has begun, or it timed out with this call unanswered (HTTP 503)."""


class BackendError(UBatchError):
    """The backend cannot be used here, or what ran the batches is gone."""


class Failure:
    """One exception and the traceback it arrived with, to be raised many times.

    A shared instance would grow its traceback at every raise, keep the frames
    of each caller alive, and carry one caller's ``__context__`` into another's
    log. So each caller raises its own copy, always from the first traceback: the
    handler's frames, without ours, which hold the items of the whole batch.
    """

    __slots__ = ("error", "_traceback")

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self._traceback = _drop_our_frames(error)
        if error.__cause__ is not None:
            _drop_our_frames(error.__cause__)

    def own(self) -> BaseException:
        """Return a copy of the error for one caller.

        An error whose class resists copying is handed out as it is, with its
        traceback cut back to where it arrived.
        """
        mine = _duplicate(self.error)
        if mine is not self.error:
            mine.__cause__ = self.error.__cause__
            mine.__context__ = self.error.__context__
            mine.__suppress_context__ = self.error.__suppress_context__
        return mine.with_traceback(self._traceback)


def _drop_our_frames(error: BaseException) -> TracebackType | None:
    traceback = error.__traceback__
    while traceback is not None and _is_ours(traceback):
        traceback = traceback.tb_next
    error.__traceback__ = traceback
    return traceback


def _is_ours(traceback: TracebackType) -> bool:
    module: str = traceback.tb_frame.f_globals.get("__name__", "")
    return module == "ubatch" or module.startswith("ubatch.")


def _duplicate(error: BaseException) -> BaseException:
    for make in (copy.copy, _copy_without_init):
        try:
            mine = make(error)
            if _same(mine, error):
                return mine
        except Exception:  # an odd constructor, __str__ or __reduce__: try the next
            continue
    return error


def _copy_without_init(error: BaseException) -> BaseException:
    """Copy an error whose constructor does not accept its own ``args``."""
    mine = type(error).__new__(type(error), *error.args)
    mine.__dict__.update(error.__dict__)
    return mine


def _same(mine: BaseException, error: BaseException) -> bool:
    return (
        mine is not error
        and type(mine) is type(error)
        and len(mine.args) == len(error.args)
        and all(a is b for a, b in zip(mine.args, error.args))
        and str(mine) == str(error)
    )
