"""What can go wrong, and how one failure is handed to many callers."""

from __future__ import annotations

import copy
import sys
from types import FrameType, MemberDescriptorType, TracebackType
from weakref import WeakKeyDictionary


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

    def __init__(
        self,
        message: str = "",
        pending: int = 0,
        max_pending: int = 0,
        retry_after: float = 1.0,
    ) -> None:
        """Say how long the queue is, and when to ask again.

        Args:
            message: The text of this error.
            pending: Number of calls that were waiting.
            max_pending: How many may wait: the batcher's option.
            retry_after: Seconds after which another try may fare better.
        """
        super().__init__(message)  # alone: a copy is made from this, then gets the rest
        self.pending = pending
        self.max_pending = max_pending
        self.retry_after = retry_after


class DeadlineExceeded(UBatchError, TimeoutError):
    """The call's ``deadline`` passed before its result was there (HTTP 504)."""


class Stopped(UBatchError):
    """stop() has begun, or it timed out with this call unanswered (HTTP 503)."""


class BackendError(UBatchError):
    """The backend cannot be used here, or what ran the batches is gone."""


class WorkerLost(BackendError):
    """The process that ran this call, or was to run it, is gone (HTTP 503)."""


class RemoteError(UBatchError):
    """What a handler raised in another process, where its class is not known here."""

    def __init__(self, message: str = "", kind: str = "") -> None:
        """Say what it was.

        Args:
            message: Its class and its text.
            kind: The name of its class, with its module.
        """
        super().__init__(message)
        self.kind = kind


def kind_of(error: BaseException) -> str:
    """Return the name of an error's class, wherever that is known."""
    if isinstance(error, RemoteError):
        return error.kind
    return type(error).__name__


class RemoteTraceback(Exception):
    """The traceback of an error in another process: the ``__cause__`` of that error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def ends_strand(error: BaseException) -> bool:
    """Tell whether what was raised is no call's fault: a kill, or Ctrl-C."""
    greenlet = sys.modules.get("greenlet")
    killed = greenlet is not None and isinstance(error, greenlet.GreenletExit)
    return killed or isinstance(error, KeyboardInterrupt)


def set_on(error: BaseException, name: str, value: object) -> None:
    """Set what any error has, such as its cause, on one whose class refuses that."""
    vars(BaseException)[name].__set__(error, value)


class Failure:
    """One exception and the traceback it arrived with, to be raised many times.

    A shared instance would grow its traceback at every raise, keep the frames
    of each caller alive, and carry one caller's ``__context__`` into another's
    log. So each caller raises its own copy, always from the first traceback: the
    handler's frames, without ours, which hold the items of the whole batch.
    """

    __slots__ = ("error", "_traceback", "_alone")

    def __init__(self, error: BaseException, alone: bool = False) -> None:
        """Take an error; *alone* if it is raised once, for one caller.

        A thousand copies that are thrown away take 8 ms of the 50 in which as many
        calls should hear that their deadline has passed.
        """
        self._alone = alone
        self.error = error
        self._traceback = _drop_our_frames(error)
        if error.__cause__ is not None:
            _drop_our_frames(error.__cause__)

    def release_frames(self) -> None:
        """Empty our frames below the handler's, once they have all returned.

        A frame keeps the one that called it, and ours hold the batch.
        """
        _clear_callers(self._traceback)
        if self.error.__cause__ is not None:
            _clear_callers(self.error.__cause__.__traceback__)

    def own(self) -> BaseException:
        """Return a copy of the error for one caller.

        An error whose class resists copying is handed out as it is, with its
        traceback cut back to where it arrived.
        """
        mine = self.error if self._alone else _duplicate(self.error)
        if mine is not self.error:
            for name in ("__cause__", "__context__", "__suppress_context__"):
                set_on(mine, name, getattr(self.error, name))
            notes = mine.__dict__.get("__notes__")
            if type(notes) is list:  # or what one caller adds, all of them show
                mine.__dict__["__notes__"] = notes[:]
        return BaseException.with_traceback(mine, self._traceback)


def _drop_our_frames(error: BaseException) -> TracebackType | None:
    traceback = error.__traceback__
    while traceback is not None and _is_ours(traceback.tb_frame):
        traceback = traceback.tb_next
    set_on(error, "__traceback__", traceback)
    return traceback


def _is_ours(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__")
    return isinstance(module, str) and module.partition(".")[0] == "ubatch"


def _clear_callers(traceback: TracebackType | None) -> None:
    frame = traceback.tb_frame.f_back if traceback else None
    while frame is not None and _is_ours(frame):
        try:
            frame.clear()
        except RuntimeError:  # it has not returned yet, nor have its callers
            return
        frame = frame.f_back


def _duplicate(error: BaseException) -> BaseException:
    """Return an equal error; the same one if that cannot be made."""
    for make in (_copy_without_init, copy.copy):
        try:
            mine = make(error)
            if _same(mine, error):
                return mine
        except Exception:  # an odd constructor, __str__ or __reduce__: try the next
            continue
    return error


def _copy_without_init(error: BaseException) -> BaseException:
    """Copy an error without running its constructor, which may refuse its ``args``."""
    mine = type(error).__new__(type(error), *error.args)
    mine.__dict__.update(error.__dict__)
    for name, value in _members(error).items():
        object.__setattr__(mine, name, value)  # its class may refuse it
    return mine


_member_names: WeakKeyDictionary[type, list[str]] = WeakKeyDictionary()


def _members(error: BaseException) -> dict[str, object]:
    """Return what an error holds in slots, its own or those of a class in C."""
    names = _member_names.get(type(error))
    if names is None:  # to find them takes 10 us: much, for a thousand callers
        names = _member_names[type(error)] = [
            name
            for kind in type(error).__mro__
            for name, member in vars(kind).items()
            if isinstance(member, MemberDescriptorType) and not name.startswith("__")
        ]
    return {name: getattr(error, name) for name in names if hasattr(error, name)}


def _same(mine: BaseException, error: BaseException) -> bool:
    members, others = _members(mine), _members(error)
    return (
        mine is not error
        and type(mine) is type(error)
        and len(mine.args) == len(error.args)
        and all(a is b for a, b in zip(mine.args, error.args))
        and members.keys() == others.keys()
        and all(members[name] is others[name] for name in members)
        and str(mine) == str(error)
    )
