"""What submit() returns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ubatch.errors import BackendError, Failure
from ubatch.log import tell
from ubatch.nesting import waiting_for
from ubatch.options import clocked

if TYPE_CHECKING:
    from ubatch.batch import Batch

S = TypeVar("S")
logger = logging.getLogger(__name__)


class Future(Generic[S]):
    """The result of one call, now or later.

    Speaks the language of ``concurrent.futures.Future``. Every method may be
    called from any greenlet and any native thread.

    Owner: changed only by the collector's owner, under its lock.
    Invariant: once ``_done``, the result or the error stays what it is.
    """

    __slots__ = ("_batch", "_done", "_cancelled", "_answer", "_links")
    _batch: Batch
    """Where its call is; set by the collector that puts it there."""

    def __init__(self) -> None:
        self._done = False
        self._cancelled = False
        self._answer: Any = None
        self._links: list[Callable[[Future[S]], object]] = []

    def result(self, timeout: float | None = None) -> S:
        """Wait for the result, blocking this caller but not the hub.

        Args:
            timeout: Seconds to wait at most; None for as long as it takes.

        Raises:
            TimeoutError: Not there after *timeout* seconds. The call goes on;
                cancel() gives it up.
            concurrent.futures.CancelledError: cancel() came first.
            DeadlineExceeded: The call's own deadline passed.
            Exception: What the handler raised, in a copy for this call.
        """
        self._wait(timeout)
        answer = self._answer
        if type(answer) is Failure:
            raise answer.own()
        result: S = answer
        return result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait as result() does; return the error it would raise, or None.

        Raises:
            TimeoutError: Not there after *timeout* seconds.
            concurrent.futures.CancelledError: cancel() came first.
        """
        self._wait(timeout)
        if type(self._answer) is not Failure:
            return None
        error = self._answer.own()
        if self._cancelled:
            raise error
        return error

    def done(self) -> bool:
        """Tell whether result() would return or raise at once."""
        return self._done

    def running(self) -> bool:
        """Tell whether the handler has this call now."""
        return self._batch.running and not self._done

    def cancelled(self) -> bool:
        """Tell whether cancel() gave this call up."""
        return self._cancelled

    def cancel(self) -> bool:
        """Give the call up, if the handler does not have it yet.

        Returns:
            True if the call will never reach the handler; False if it is running
            or done.
        """
        return self._owned(lambda: self._batch.collector.endings.cancel(self))

    def add_done_callback(self, fn: Callable[[Future[S]], object]) -> None:
        """Call ``fn(self)`` when the call is done, at once if it is.

        On the gevent backend *fn* runs in a greenlet of its own; on the thread
        backend in a thread for the callbacks of this batcher, where one that blocks
        holds up the others. If the call is done already, *fn* runs here. What it
        raises is logged and harms nobody.
        """

        def guarded(future: Future[S]) -> None:
            try:
                fn(future)
            except BaseException:  # SystemExit too: it has no caller to end
                name = self._batch.collector.name
                message = "%s: a done callback raised"
                tell(logger, logging.ERROR, message, name, exc_info=True)

        def deferred(future: Future[S]) -> None:
            self._batch.collector.backend.defer(lambda: guarded(future))

        if not self._link(deferred):
            guarded(self)

    def _link(self, notify: Callable[[Future[S]], object]) -> bool:
        """Have *notify* called when done; return False if it is done already.

        *notify* is ours: it runs no user's code, and neither blocks nor raises.
        """
        return self._owned(lambda: self._batch.collector.link(self, notify))

    def _unlink(self, notify: Callable[[Future[S]], object]) -> None:
        with suppress(ValueError):  # it was notified meanwhile
            self._links.remove(notify)

    def _finish(self, answer: Any) -> None:
        """Take the end of the call; whoever calls this then calls _notify()."""
        self._answer = answer
        self._done = True

    def _notify(self) -> None:
        # Race (unlinked): 1. this copies the links; 2. a waiter whose time is up
        #       unlinks itself from the list. In a copy nobody else is skipped.
        for notify in tuple(self._links):
            notify(self)
        self._links.clear()

    def _wait(self, timeout: float | None) -> None:
        if not self._done and (timeout is None or timeout > 0):
            self._wait_for_link(clocked(timeout))
        if not self._done:
            raise TimeoutError(f"no result after {timeout} seconds; the call goes on")

    def _wait_for_link(self, timeout: float | None) -> None:
        with waiting_for(self._batch):
            latch = self._batch.collector.backend.latch_here()

            def wake(_: Future[S]) -> None:
                latch.set()

            if self._link(wake):
                try:
                    latch.wait(timeout)
                finally:
                    self._unlink(wake)

    def _owned(self, act: Callable[[], object]) -> bool:
        """Do *act* where the collector's state may be touched."""
        collector = self._batch.collector
        if collector.inherited():
            if self._done:
                return False
            raise BackendError(
                f"{collector.name}: this call was made before the process forked; "
                "its answer goes to the parent. Call again here"
            )
        return bool(collector.backend.in_owner(act))
