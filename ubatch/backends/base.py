"""The seam: what a collector asks of greenlets or of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from ubatch.batch import Caller, Told
    from ubatch.deadlines import Alarm
    from ubatch.executors import Executor, ExecutorOption
    from ubatch.future import Future

P = ParamSpec("P")
R = TypeVar("R")


class Latch(Protocol):
    """An event that happens once; any number may wait."""

    def set(self) -> object:
        """Let everybody go, now and from now on. Does not block."""

    def wait(self, timeout: float | None = None) -> object:
        """Wait for set(), *timeout* seconds at most; return whether it came."""


class Wake(Protocol):
    """An event for one waiter, that is forgotten as soon as it is noticed."""

    def set(self) -> object:
        """Wake the waiter, or else its next wait. Does not block."""

    def wait(self, timeout: float | None = None) -> object:
        """Wait for a set() since the last wait, *timeout* seconds at most."""


class Backend(Protocol):
    """Greenlets or native threads, for one collector."""

    name: str
    settled_turns: int
    """How many quiet turns in a row mean that arrivals have settled."""

    def lock(self) -> AbstractContextManager[Any]:
        """Return what guards the collector's state; re-entrant, never held long."""

    def mutex(self) -> AbstractContextManager[Any]:
        """Return a lock that strands may wait for as long as it takes."""

    def guarded(
        self, fn: Callable[P, R], lock: AbstractContextManager[Any]
    ) -> Callable[P, R]:
        """Return *fn*, made to run under a lock() of this backend."""

    def caller(self) -> Caller | None:
        """Return who is calling, as one that can be parked; None if it has to wait
        for a future: it is foreign, or equal to another.

        Raises:
            BackendError: The caller's wait would stall others.
        """

    def park(self, caller: Caller) -> Told:
        """Wait to be told, as *caller*.

        Raises:
            BackendError: Somebody else resumed the caller.
        """

    def tell(self, told: Iterable[Told], gone: Set[Caller]) -> None:
        """Resume parked callers, each with what it is told, unless it is *gone*.

        Does not block, nor wait for them.
        """

    def latch_here(self) -> Latch:
        """Return a latch that fits whoever asks; set() where state is touched.

        Raises:
            BackendError: Its wait would stall others.
        """

    def wake(self) -> Wake:
        """Return a wake."""

    def alarm(self, ring: Callable[[], object]) -> Alarm:
        """Return an alarm that calls *ring*, which neither blocks nor raises."""

    def turn(self, wake: Wake) -> None:
        """Let all run who are ready, once; a set *wake* may cut it short."""

    def breathe(self) -> None:
        """Let those run who wait for this strand to go on; cheaper than a turn."""

    def spawn(
        self, work: Callable[[], None], ended: Callable[[BaseException | None], None]
    ) -> None:
        """Start a strand; call *ended* with what escaped it, if anything did.

        Raises:
            RuntimeError: It could not be started; *ended* is not called.
        """

    def defer(self, fn: Callable[[], object]) -> None:
        """Run *fn*, which may block, outside the strands. Does not wait for it.

        Does not raise: where no thread is to be had it runs later.
        """

    def close(self) -> None:
        """Let go of what was made for defer()."""

    def cannot_wait(self, lock: AbstractContextManager[Any]) -> bool:
        """Tell whether whoever asks would wait for himself.

        Since his thread holds *lock*, of this backend, or he is what runs all others.
        """

    def again(self) -> Backend:
        """Return a backend of this kind, on the same hub if there is one."""

    def wait_for(
        self, fd: int, write: bool = False, timeout: float | None = None
    ) -> bool:
        """Wait until a file can be read, or written; False after *timeout* seconds.

        Raises:
            OSError: The waiter was copied by a fork, and the file is the parent's.
        """

    def wait_idly(self, fd: int) -> bool:
        """The same, for what may never happen: it keeps no loop from ending."""

    def is_foreign(self) -> bool:
        """Tell whether the caller is where the state may not be touched."""

    def in_owner(self, fn: Callable[[], Any]) -> Any:
        """Run *fn*, which does not block, where the state may be touched."""

    def soon(self, fn: Callable[[], object]) -> None:
        """Like in_owner, but do not wait for it; nothing if it is gone."""

    def alive(self) -> bool:
        """Tell whether strands can still run."""

    def future(self) -> Future[Any]:
        """Return a future for one call."""

    def executor(self, option: ExecutorOption, workers: int) -> Executor:
        """Return what runs the handler."""
