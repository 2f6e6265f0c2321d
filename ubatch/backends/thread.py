"""Native threads."""

from __future__ import annotations

import sys
import threading
from _queue import SimpleQueue
from _thread import LockType
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any

from ubatch.backends.native import allocate_lock, start_thread
from ubatch.errors import BackendError
from ubatch.future import Future

if TYPE_CHECKING:
    from ubatch.backends.base import Wake
    from ubatch.batch import Batch
    from ubatch.executors import Executor, ExecutorOption

QUIET_GAP = 0.0002
"""Seconds without a new call after which arrivals have settled.

Twice what a thread needs to be woken and to call again, measured on two cores:
0.05 to 0.1 ms.
"""


class ThreadBackend:
    """Strands are daemon threads; state is guarded by a lock."""

    name = "thread"
    settled_turns = 1

    def __init__(self) -> None:
        self._callbacks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._starting = allocate_lock()  # held once the callbacks have a thread

    def lock(self) -> AbstractContextManager[Any]:
        return threading.RLock()

    def holds(self, lock: AbstractContextManager[Any]) -> bool:
        return bool(lock._is_owned())  # type: ignore[attr-defined]

    def mutex(self) -> AbstractContextManager[Any]:
        return allocate_lock()

    def latch(self) -> ThreadLatch:
        return ThreadLatch()

    def latch_here(self) -> ThreadLatch:
        self.is_foreign()
        return ThreadLatch()

    def wake(self) -> ThreadWake:
        return ThreadWake()

    def turn(self, wake: Wake) -> None:
        wake.wait(QUIET_GAP)

    def spawn(
        self, work: Callable[[], None], ended: Callable[[BaseException | None], None]
    ) -> None:
        def run() -> None:
            escaped: BaseException | None = None
            try:
                work()
            except BaseException as error:  # told to all who wait by ended()
                escaped = error
            ended(escaped)

        start_thread(run)

    def defer(self, fn: Callable[[], object]) -> None:
        self._callbacks.put(fn)
        if self._starting.acquire(blocking=False):
            try:
                start_thread(self._run_callbacks)
            except BaseException:  # whoever comes next may try
                self._starting.release()
                raise

    def _run_callbacks(self) -> None:
        while (fn := self._callbacks.get()) is not None:
            fn()

    def close(self) -> None:
        self._callbacks.put(None)

    def is_foreign(self) -> bool:
        # The usual way here: an unpatched program made its first call before its hub
        # ran. Two look-ups, and more only where gevent is there.
        if "gevent" in sys.modules:
            from ubatch.backends.gevent import runs_under_a_hub

            if runs_under_a_hub():
                raise BackendError(
                    "a greenlet waits for a batcher that runs on native threads, and "
                    "would stall its hub; pass backend='gevent', or set "
                    "UBATCH_BACKEND=gevent"
                )
        return False

    def in_owner(self, fn: Callable[[], Any]) -> Any:
        return fn()

    def soon(self, fn: Callable[[], object]) -> None:
        fn()

    def alive(self) -> bool:
        return True

    def again(self) -> ThreadBackend:
        return ThreadBackend()

    def future(
        self, batch: Batch, ticket: float, deadline: float | None
    ) -> Future[Any]:
        return Future(batch, ticket, deadline)

    def executor(self, option: ExecutorOption, workers: int) -> Executor:
        from ubatch.executors import for_threads

        return for_threads(option)


def make() -> ThreadBackend:
    """Return the backend for one collector."""
    return ThreadBackend()


class ThreadLatch:
    """One raw lock per waiter, so that no two waiters contend when it is set.

    A ``threading.Event`` makes every waiter take the same lock again on its way
    out: with 1000 callers the threads queue up a second time.
    """

    __slots__ = ("_locks",)

    def __init__(self) -> None:
        self._locks: list[LockType] | None = []  # None once set

    def set(self) -> None:
        locks, self._locks = self._locks, None
        for lock in locks or ():
            lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        locks = self._locks
        if locks is None:
            return True
        mine = allocate_lock()
        mine.acquire()
        locks.append(mine)
        # Race: 1. this reads a list; 2. set() takes the list away and goes through
        #       it; 3. this appends too late. So look again before waiting.
        if self._locks is None:
            return True
        return mine.acquire(timeout=_bounded(timeout))


class ThreadWake:
    """A lock used as a flag: locked means nothing new, and waiting is locking."""

    __slots__ = ("_flag",)

    def __init__(self) -> None:
        self._flag = allocate_lock()
        self._flag.acquire()

    def set(self) -> None:
        try:
            self._flag.release()
        except RuntimeError:  # set already, and not yet noticed
            pass

    def wait(self, timeout: float | None = None) -> bool:
        return self._flag.acquire(timeout=_bounded(timeout))


def _bounded(timeout: float | None) -> float:
    """Return *timeout* as a lock wants it: -1 for ever, never too large."""
    return -1 if timeout is None else max(0.0, min(timeout, TIMEOUT_MAX))
