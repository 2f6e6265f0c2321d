"""Greenlets on one gevent hub.

Callers park in the hub, and are switched to from one of its callbacks, each with what
it is told. Nothing of gevent's is touched from another native thread: see inbox.py.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import AbstractContextManager
from contextvars import Context
from errno import ECHILD
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import gevent
from gevent import getcurrent, monkey
from gevent._hub_local import get_hub_if_exists
from gevent.event import AsyncResult
from gevent.hub import (  # type: ignore[attr-defined]
    MAIN_THREAD_IDENT,
    Hub,
    get_hub,
    get_thread_ident,
)
from gevent.lock import Semaphore
from gevent.socket import wait
from greenlet import greenlet

from ubatch import process
from ubatch.backends.inbox import Inbox
from ubatch.backends.thread import ThreadLatch
from ubatch.errors import BackendError
from ubatch.future import Future
from ubatch.options import SHORTEST_WAIT, clocked

if TYPE_CHECKING:
    from ubatch.backends.base import Latch, Wake
    from ubatch.batch import Caller, Told
    from ubatch.executors import Executor, ExecutorOption


LOOK_AFTER_OWNER = 1.0
"""Seconds between two looks of a waiting native thread for the hub it waits for."""

P = ParamSpec("P")
R = TypeVar("R")

switch_to = greenlet.switch
"""Park in favour of a hub. Its own ``switch()`` first asks for a ``switch_out`` hook,
which only hubs have: 0.07 of 0.67 us, measured."""

_local: Any = monkey.get_original("_thread", "_local")()


class _TooLong(Exception):
    """A wait has reached its timeout."""


class _Token:
    """Lives as long as a native thread does; idents are given out again."""


def runs_under_a_hub() -> bool:
    """Tell whether the caller is a greenlet that a hub runs.

    True in uWSGI and gevent.pywsgi too, which need not patch anything.
    """
    hub = get_hub_if_exists()
    return hub is not None and getcurrent() is not hub.parent


def threading_is_patched() -> bool:
    """Tell whether ``threading`` makes greenlets."""
    return bool(monkey.is_module_patched("threading"))


class GeventBackend:
    """Strands are greenlets; the hub's thread owns all state.

    Owner: only the thread of ``_hub`` touches the collector's state, and never
    switches while it does. Anybody else is foreign.
    """

    name = "gevent"
    settled_turns = 2

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._inbox = Inbox.of(hub)
        self._owner = _thread_token() if get_hub_if_exists() is hub else None
        self._epoch = process.epoch

    def lock(self) -> AbstractContextManager[Any]:
        return _NO_LOCK

    def cannot_wait(self, lock: AbstractContextManager[Any]) -> bool:
        return getcurrent() is self._hub

    def mutex(self) -> AbstractContextManager[Any]:
        return Semaphore(1, self._hub)

    def guarded(
        self, fn: Callable[P, R], lock: AbstractContextManager[Any]
    ) -> Callable[P, R]:
        return fn

    def caller(self) -> greenlet | None:
        caller = getcurrent()
        if caller.parent is self._hub and type(caller) in _told_apart:
            return caller
        if caller is self._hub:
            raise BackendError(
                "a callback of the hub called and would wait, which would stall the "
                "hub; use submit(), or spawn a greenlet"
            )
        if get_hub_if_exists() is self._hub and _can_be_told_apart(type(caller)):
            return caller
        return None

    def park(self, caller: Caller) -> Told:
        told: Any = switch_to(self._hub)
        try:
            if told[0] is caller:
                return told  # type: ignore[no-any-return]
        except (TypeError, LookupError):
            pass
        raise BackendError(
            f"somebody else switched to a greenlet that waits for its result: {told!r}"
        )

    def tell(self, told: Iterable[Told], gone: Set[Caller]) -> None:
        self._hub.loop.run_callback(_resume, iter(told), gone)

    def latch_here(self) -> Latch:
        return ForeignLatch(self) if self.is_foreign() else AsyncResult()

    def wake(self) -> Wake:
        return GeventWake(self._hub)

    def alarm(self, ring: Callable[[], object]) -> GeventAlarm:
        return GeventAlarm(self._hub, ring)

    def turn(self, wake: Wake) -> None:
        # One full turn of the loop: callbacks alone run who is ready but poll no
        # socket, and a zero timer fires before that turn's sockets are read. By hand,
        # since gevent's own sleep() costs twice as much.
        timer = self._hub.loop.timer(0.0)
        try:
            timer.start(getcurrent().switch)
            switch_to(self._hub)
        finally:
            timer.close()
        self.breathe()

    def breathe(self) -> None:
        callback = self._hub.loop.run_callback(getcurrent().switch)
        try:
            switch_to(self._hub)
        finally:
            callback.stop()

    def spawn(
        self, work: Callable[[], None], ended: Callable[[BaseException | None], None]
    ) -> None:
        # A link, not a try: a greenlet killed before its first switch runs nothing.
        strand = gevent.Greenlet(Context().run, work)
        strand.rawlink(lambda dead: ended(_escaped(dead)))
        strand.start()

    def defer(self, fn: Callable[[], object]) -> None:
        gevent.spawn(Context().run, fn)

    def close(self) -> None:
        pass

    def again(self) -> GeventBackend:
        again = GeventBackend(self._hub)
        again._owner = self._owner
        return again

    def wait_for(
        self, fd: int, write: bool = False, timeout: float | None = None
    ) -> bool:
        return self._wait(self._hub.loop.io(fd, 2 if write else 1), timeout)

    def wait_idly(self, fd: int) -> bool:
        return self._wait(self._hub.loop.io(fd, 1, ref=False), None)

    def _wait(self, watcher: Any, timeout: float | None) -> bool:
        # Before the sockets of those who call: while a busy loop goes through them, the
        # model process stands idle. Measured with 64 connections on libev, which alone
        # knows priorities: 2228 requests/s for 1768.
        watcher.priority = self._hub.loop.MAXPRI  # type: ignore[attr-defined]
        try:
            wait(watcher, timeout, _TooLong())
        except _TooLong:
            return False
        finally:
            watcher.close()
        if self._epoch is not process.epoch:
            raise OSError(ECHILD, "this file is of the process that forked this one")
        return True

    def is_foreign(self) -> bool:
        return get_hub_if_exists() is not self._hub

    def in_owner(self, fn: Callable[[], Any]) -> Any:
        if not self.is_foreign():
            return fn()
        returned: list[Any] = []
        raised: list[BaseException] = []
        done = ForeignLatch(self)

        def call() -> None:
            try:
                returned.append(fn())
            except BaseException as error:
                raised.append(error)
            finally:
                done.set()

        if not self._inbox.send(call):
            raise _gone()
        done.wait()
        if raised:
            raise raised[0]
        return returned[0]

    def soon(self, fn: Callable[[], object]) -> None:
        self._inbox.send(fn)

    def alive(self) -> bool:
        ended = self._owner is not None and self._owner() is None
        return self._hub.loop is not None and not ended

    def future(self) -> Future[Any]:
        return GeventFuture()

    def executor(self, option: ExecutorOption, workers: int) -> Executor:
        from ubatch.executors import for_gevent

        return for_gevent(option, workers, self._hub)


def make() -> GeventBackend:
    """Return the backend for one collector, on the hub that should run it.

    Raises:
        BackendError: A native thread asks first, and no hub runs anywhere.
    """
    if runs_under_a_hub() or get_thread_ident() == MAIN_THREAD_IDENT:
        return GeventBackend(get_hub())
    # The first caller is a native thread, which may end before the second call
    # comes: the hub of the main thread is the one that lives on.
    for candidate in gc.get_objects():
        if isinstance(candidate, Hub) and candidate.loop and candidate.loop.default:
            return GeventBackend(candidate)
    raise BackendError(
        "the first call came from a native thread, and the main thread has no gevent "
        "hub; make the first call from a greenlet, or use backend='thread'"
    )


class ForeignLatch(ThreadLatch):
    """A latch for a native thread, which looks now and then whether to give up.

    The owner's thread may end, or destroy its hub, and then nobody will set it.
    """

    __slots__ = ("_backend",)

    def __init__(self, backend: GeventBackend) -> None:
        super().__init__()
        self._backend = backend

    def wait(self, timeout: float | None = None) -> bool:
        left = inf if timeout is None else timeout
        while not super().wait(min(left, LOOK_AFTER_OWNER)):
            left -= LOOK_AFTER_OWNER
            if left <= 0:
                return False
            if not self._backend.alive():
                raise _gone()
        return True


_told_apart: set[type] = set()


def _can_be_told_apart(kind: type) -> bool:
    """Tell whether greenlets of a class are equal only if they are the same."""
    if any("__eq__" in vars(base) for base in kind.__mro__ if base is not object):
        return False
    _told_apart.add(kind)
    return True


def _resume(told: Iterator[Told], gone: Set[Caller]) -> None:
    """Switch to one greenlet after the other; runs in the hub."""
    try:
        for one in told:
            if one[0] not in gone:
                one[0].switch(one)  # type: ignore[attr-defined]  # a greenlet
    except BaseException:  # a bare greenlet's own, which its parent gets: the hub
        get_hub().loop.run_callback(_resume, told, gone)
        raise


class GeventFuture(Future[Any]):
    """A future that ``gevent.wait`` and ``gevent.iwait`` can wait for."""

    __slots__ = ()

    def rawlink(self, callback: Callable[[Future[Any]], object]) -> None:
        """Call ``callback(self)`` in the hub when the call is done.

        For ``gevent.wait()``, and like it only in the hub's own thread. *callback*
        must not block.
        """
        link = _HubLink(callback)
        if not self._link(link):
            link(self)

    def unlink(self, callback: Callable[[Future[Any]], object]) -> None:
        """Take back a rawlink(), if it has not been called."""
        for link in self._links:
            if isinstance(link, _HubLink) and link.callback == callback:
                self._unlink(link)
                return


class _HubLink:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[Future[Any]], object]) -> None:
        self.callback = callback

    def __call__(self, future: Future[Any]) -> None:
        get_hub().loop.run_callback(self.callback, future)


class GeventWake:
    """A semaphore that never counts past one."""

    __slots__ = ("_semaphore",)

    def __init__(self, hub: Hub) -> None:
        self._semaphore = Semaphore(0, hub)

    def set(self) -> None:
        if self._semaphore.locked():
            self._semaphore.release()

    def wait(self, timeout: float | None = None) -> bool:
        return bool(self._semaphore.acquire(timeout=clocked(timeout)))


class GeventAlarm:
    """A timer of the hub's loop, made when it is set."""

    __slots__ = ("_hub", "_ring", "_timer")

    def __init__(self, hub: Hub, ring: Callable[[], object]) -> None:
        self._hub = hub
        self._ring = ring
        self._timer: Any = None

    def set(self, at: float) -> None:
        self.clear()
        self._timer = self._hub.loop.timer(max(at - monotonic(), SHORTEST_WAIT))
        self._timer.start(self._ring, update=True)

    def clear(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.close()

    close = clear


class _NoLock:
    """What guards state that only one thread touches, between two switches."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NO_LOCK = _NoLock()


def _escaped(strand: gevent.Greenlet[..., None]) -> BaseException | None:
    """Return what ended a greenlet, if it did not just return."""
    value = strand.exception or strand.value  # a killed one *returns* GreenletExit
    return value if isinstance(value, BaseException) else None


def _thread_token() -> weakref.ref[_Token]:
    if not hasattr(_local, "token"):
        _local.token = _Token()
    return weakref.ref(_local.token)


def _gone() -> BackendError:
    return BackendError("the gevent hub that ran the batches is gone; call again")
