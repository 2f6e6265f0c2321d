"""Small real parts for tests: callers, gates and handlers that tell what they saw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import gevent
from gevent.event import Event

from ubatch.backends.native import allocate_lock, start_thread

PATIENCE = 20.0
"""Seconds after which a test gives up on what should have happened long ago."""


class Gate:
    """Holds whoever comes, on any thread, until it is opened."""

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()

    def open(self) -> None:
        self._lock.release()

    def is_shut(self) -> bool:
        return self._lock.locked()

    def wait(self) -> None:
        assert self._lock.acquire(timeout=PATIENCE), "nobody opened the gate"
        self._lock.release()


class HubGate:
    """Holds greenlets until it is opened."""

    def __init__(self) -> None:
        self._event = Event()

    def open(self) -> None:
        self._event.set()

    def wait(self) -> None:
        assert self._event.wait(PATIENCE), "nobody opened the gate"


class Recorder:
    """A handler that remembers its batches and answers with a function of each."""

    def __init__(self, answer: Callable[[Any], Any] = str) -> None:
        self.batches: list[list[Any]] = []
        self._answer = answer

    def __call__(self, items: list[Any]) -> Sequence[Any]:
        self.batches.append(list(items))
        return [self._answer(item) for item in items]


class Gated(Recorder):
    """A handler that stops at a gate after it has noted its batch."""

    def __init__(
        self, gate: Gate | HubGate, answer: Callable[[Any], Any] = str
    ) -> None:
        super().__init__(answer)
        self.gate = gate

    def __call__(self, items: list[Any]) -> Sequence[Any]:
        self.batches.append(list(items))
        self.gate.wait()
        return [self._answer(item) for item in items]


class Caller:
    """One caller, a greenlet or a thread, and how its call ended."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self._call = call
        self._args = args

    def run(self) -> None:
        try:
            self.value = self._call(*self._args)
        except BaseException as error:
            self.error = error
        finally:
            self.ended = True
            del self._call, self._args

    def result(self) -> Any:
        """Wait for the end; return the value, or raise the error."""
        self.join()
        assert self.ended, "the caller never ended"
        if self.error is not None:
            raise self.error
        return self.value

    def join(self) -> None:
        raise NotImplementedError


class GreenletCaller(Caller):
    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        super().__init__(call, *args)
        self.greenlet = gevent.spawn(self.run)

    def join(self) -> None:
        self.greenlet.join(PATIENCE)


class ThreadCaller(Caller):
    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        super().__init__(call, *args)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def join(self) -> None:
        self.thread.join(PATIENCE)


class NativeCaller(Caller):
    """A native thread, even where threading is patched; join() blocks natively."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        super().__init__(call, *args)
        self._gate = Gate()
        start_thread(self._run)

    def _run(self) -> None:
        self.run()
        self._gate.open()

    def join(self) -> None:
        self._gate.wait()


class World:
    """What differs between the backends, for a test that runs on both."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    @property
    def is_gevent(self) -> bool:
        return bool(self.backend == "gevent")

    def spawn(self, call: Callable[..., Any], *args: Any) -> Caller:
        """Start one caller."""
        return (GreenletCaller if self.is_gevent else ThreadCaller)(call, *args)

    def gate(self, executor: Any = "threadpool") -> Gate | HubGate:
        """Return a gate that suits a handler under that executor."""
        inline = self.is_gevent and executor == "inline"
        return HubGate() if inline else Gate()

    def until(self, happened: Callable[[], Any]) -> None:
        """Wait until something can be seen to have happened."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < deadline, "it never happened"
            gevent.sleep(0.001) if self.is_gevent else time.sleep(0.001)
