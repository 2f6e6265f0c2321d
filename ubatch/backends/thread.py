"""Native threads."""

from __future__ import annotations

import sys
import threading
from _queue import SimpleQueue
from _thread import LockType
from collections.abc import Callable, Iterable, Set
from contextlib import AbstractContextManager
from math import inf
from threading import TIMEOUT_MAX
from time import monotonic
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ubatch.backends.native import allocate_lock, start_thread, wait_for
from ubatch.errors import BackendError
from ubatch.future import Future

if TYPE_CHECKING:
    from ubatch.backends.base import Wake
    from ubatch.batch import Caller, Told
    from ubatch.executors import Executor, ExecutorOption

P = ParamSpec("P")
R = TypeVar("R")

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
        self._starting = allocate_lock()  # held while the callbacks have a thread
        self._closed = False

    def lock(self) -> AbstractContextManager[Any]:
        return threading.RLock()

    def cannot_wait(self, lock: AbstractContextManager[Any]) -> bool:
        return bool(lock._is_owned())  # type: ignore[attr-defined]

    def mutex(self) -> AbstractContextManager[Any]:
        return allocate_lock()

    def guarded(
        self, fn: Callable[P, R], lock: AbstractContextManager[Any]
    ) -> Callable[P, R]:
        def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            with lock:
                return fn(*args, **kwargs)

        return locked

    def caller(self) -> ParkedThread:
        self._check_caller()
        return ParkedThread()

    def park(self, caller: Any) -> Told:
        told: Told = caller.park()
        return told

    def tell(self, told: Iterable[Told], gone: Set[Caller]) -> None:
        for one in told:
            one[0].resume(one)  # type: ignore[attr-defined]  # a ParkedThread

    def latch_here(self) -> ThreadLatch:
        self._check_caller()
        return ThreadLatch()

    def wake(self) -> ThreadWake:
        return ThreadWake()

    def alarm(self, ring: Callable[[], object]) -> ThreadAlarm:
        return ThreadAlarm(ring)

    def turn(self, wake: Wake) -> None:
        wake.wait(QUIET_GAP)

    def breathe(self) -> None:
        pass

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
        if self._closed:
            self._callbacks.put(None)
        self._start_callbacks()

    def _start_callbacks(self) -> None:
        if self._starting.acquire(blocking=False):
            try:
                start_thread(self._run_callbacks)
            except RuntimeError:  # no thread is to be had; whoever comes next may try
                self._starting.release()
            except BaseException:
                self._starting.release()
                raise

    def _run_callbacks(self) -> None:
        while (fn := self._callbacks.get()) is not None:
            fn()
            del fn  # with its future, and all that holds
        # Race (deferred): 1. stop() closes this; 2. somebody who was just cancelled
        #       defers a callback, and leaves it to this thread; 3. this thread ends,
        #       as it was told. So it looks again when it has said that it is gone.
        self._starting.release()
        if not self._callbacks.empty():
            self._start_callbacks()

    def close(self) -> None:
        self._closed = True
        left = not self._callbacks.empty()
        self._callbacks.put(None)
        if left:  # perhaps since they have no thread yet
            self._start_callbacks()

    def wait_for(
        self, fd: int, write: bool = False, timeout: float | None = None
    ) -> bool:
        return wait_for(fd, write, timeout)

    def wait_idly(self, fd: int) -> bool:
        return wait_for(fd)

    def is_foreign(self) -> bool:
        return False

    def _check_caller(self) -> None:
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

    def in_owner(self, fn: Callable[[], Any]) -> Any:
        return fn()

    def soon(self, fn: Callable[[], object]) -> None:
        fn()

    def alive(self) -> bool:
        return True

    def again(self) -> ThreadBackend:
        return ThreadBackend()

    def future(self) -> Future[Any]:
        return Future()

    def executor(self, option: ExecutorOption, workers: int) -> Executor:
        from ubatch.executors import for_threads

        return for_threads(option)


def make() -> ThreadBackend:
    """Return the backend for one collector."""
    return ThreadBackend()


class ParkedThread:
    """One thread that waits to be told, on a lock of its own.

    A ``threading.Event`` for the batch would make all its waiters take the same lock
    again on their way out: with 1000 callers the threads queue up a second time.
    """

    __slots__ = ("_lock", "_told")

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()
        self._told: Told | None = None

    def park(self) -> Told:
        """Wait for resume()."""
        self._lock.acquire()
        told, self._told = self._told, None  # it holds this, too
        assert told is not None  # resume() says so first
        return told

    def resume(self, told: Told) -> None:
        """Have park() return *told*."""
        self._told = told
        self._lock.release()


class ThreadLatch:
    """One raw lock per waiter, so that no two waiters contend when it is set."""

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
        # Race (late_waiter): 1. this reads a list; 2. set() takes the list away and
        #       goes through it; 3. this appends too late. So look again before waiting.
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


class ThreadAlarm:
    """A daemon thread that sleeps until it has to ring; started when it is first set.

    Owner: ``_at`` is set under the lock of whoever sets the alarm; the thread forgets
    it, without that lock, before it rings.
    Race (forgotten): 1. the thread sees that it is time; 2. somebody sets another
    time; 3. the thread forgets that, and rings. Whoever is rung sets the next time,
    by all that it knows.
    """

    __slots__ = (
        "_ring",
        "_at",
        "_latest",
        "_wake",
        "_started",
        "_closed",
        "_sleeps_until",
    )

    def __init__(self, ring: Callable[[], object]) -> None:
        self._ring = ring
        self._at = inf
        self._latest = -inf  # what it was last set for
        self._sleeps_until = -inf  # it does not
        self._wake = ThreadWake()
        self._started = False
        self._closed = False

    def set(self, at: float) -> None:
        self._latest = at
        self._at = at
        if not self._started:
            start_thread(self._run)
            self._started = True
        elif at < self._sleeps_until:
            self._wake.set()

    def clear(self) -> None:
        self._at = inf  # it is not woken for that: it finds out when it wakes

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            # Race (overslept): 1. this reads when to ring; 2. somebody sets an earlier
            #       time, and sees no need to wake what does not sleep yet; 3. this
            #       sleeps. So it says until when it sleeps, and then looks again.
            at = self._at
            if at == inf and self._latest > monotonic():
                at = self._latest  # or each lone call, that sets and clears, wakes it
            self._sleeps_until = at
            if self._at < at:
                continue
            self._wake.wait(None if at == inf else at - monotonic())
            if monotonic() >= self._at:
                self._at = inf
                self._ring()


def _bounded(timeout: float | None) -> float:
    """Return *timeout* as a lock wants it: -1 for ever, never too large."""
    return -1 if timeout is None else max(0.0, min(timeout, TIMEOUT_MAX))
