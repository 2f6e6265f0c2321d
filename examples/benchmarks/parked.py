"""How are many calls made to wait, and let go again, at a known moment?"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from systems import System


class Parked:
    """N things that wait: ``join()`` returns when all do, ``settle()`` ends them."""

    def __enter__(self) -> Parked:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of everything."""

    def join(self) -> None:
        """Have them all wait."""
        raise NotImplementedError

    def settle(self) -> None:
        """Have them all end."""
        raise NotImplementedError


class Crowd:
    """Greenlets, one for each item, and how many of them wait or have ended."""

    def __init__(self, ask: Callable[[int], int], items: list[int]) -> None:
        from gevent.event import Event

        self.everyone: list[Any] = [None] * len(items)
        self._ask, self._items = ask, items
        self._parked = self._ended = 0
        self._all_ended = Event()

    def join(self) -> None:
        """Spawn them and return when the last one waits."""
        from gevent import sleep, spawn

        for place, item in enumerate(self._items):
            self.everyone[place] = spawn(self._wait, item)
        while self._parked < len(self._items):
            sleep(0)

    def settle(self) -> None:
        """Return when the last one has its answer; sleeps until then."""
        self._all_ended.wait()

    def _wait(self, item: int) -> None:
        self._parked += 1
        if self._ask(item) != item:
            raise ValueError("a caller got the answer of another")
        self._ended += 1
        if self._ended == len(self._items):
            self._all_ended.set()


class Bare(Parked):
    """Greenlets that switch to the hub and do no more, until they are woken."""

    def __init__(self, calls: int) -> None:
        from gevent import get_hub

        self._hub = get_hub()
        self._crowd = Crowd(self._ask, list(range(calls)))

    def join(self) -> None:
        self._crowd.join()

    def settle(self) -> None:
        for item, greenlet in enumerate(self._crowd.everyone):
            self._hub.loop.run_callback(greenlet.switch, item)
        self._crowd.settle()

    def _ask(self, item: int) -> int:
        answer: int = self._hub.switch()
        return answer


class Waiters(Parked):
    """Greenlets that each wait on a ``Waiter`` of gevent's."""

    def __init__(self, calls: int) -> None:
        from gevent import get_hub
        from gevent.hub import Waiter

        self._hub, self._make = get_hub(), Waiter
        self._waiters: list[Any] = [None] * calls
        self._crowd = Crowd(self._ask, list(range(calls)))

    def join(self) -> None:
        self._crowd.join()

    def settle(self) -> None:
        for item, waiter in enumerate(self._waiters):
            self._hub.loop.run_callback(waiter.switch, item)
        self._crowd.settle()

    def _ask(self, item: int) -> int:
        waiter = self._waiters[item] = self._make(self._hub)
        answer: int = waiter.get()
        return answer


class _Held(Parked):
    """Calls of a batcher whose only worker is in the handler, at a gate."""

    def __init__(self, system: System, max_size: int, calls: int) -> None:
        from ubatch import UBatch

        self._lock: Callable[[], Any] = _native_lock(system)
        self._gate, self._inside = self._lock(), self._lock()
        self._gate.acquire()
        self._inside.acquire()
        self._plugged = False
        backend: Any = system.world
        self._batcher: Any = UBatch(max_size, 0.01, handler=self._run, backend=backend)
        self._items = list(range(calls))

    def __enter__(self) -> _Held:
        """Start, and have one call take the worker."""
        self._batcher.start()
        self._plug = self._batcher.submit(-1)
        while not self._inside.acquire(False):
            _breathe()
        return self

    def __exit__(self, *_: Any) -> None:
        self._batcher.stop()

    def _run(self, items: list[int]) -> list[int]:
        if not self._plugged:
            self._plugged = True
            self._inside.release()
            self._gate.acquire()
        return items


class Greenlets(_Held):
    """A greenlet per call, in ``ubatch()``."""

    def __init__(self, system: System, max_size: int, calls: int) -> None:
        super().__init__(system, max_size, calls)
        self._crowd = Crowd(self._batcher.ubatch, self._items)

    def join(self) -> None:
        self._crowd.join()

    def settle(self) -> None:
        self._gate.release()
        self._crowd.settle()


class Futures(_Held):
    """One caller, with a future per call."""

    def __init__(self, system: System, max_size: int, calls: int) -> None:
        super().__init__(system, max_size, calls)
        self._everyone: list[Any] = [None] * calls

    def join(self) -> None:
        submit, everyone = self._batcher.submit, self._everyone
        for place, item in enumerate(self._items):
            everyone[place] = submit(item)

    def settle(self) -> None:
        self._gate.release()
        for item, future in zip(self._items, self._everyone):
            if future.result() != item:
                raise ValueError("a caller got the answer of another")


def _breathe() -> None:
    """Wait a little, for a native thread to get on."""
    import time

    time.sleep(0.0005)  # gevent's, where it is patched


def _native_lock(system: System) -> Callable[[], Any]:
    if system.patched:
        from gevent.monkey import get_original

        allocate: Callable[[], Any] = get_original("_thread", "allocate_lock")
        return allocate
    from _thread import allocate_lock

    return allocate_lock
