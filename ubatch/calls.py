"""How does one ask a batcher for results?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, Literal, TypeVar, overload

from ubatch.future import Future

T = TypeVar("T")
S = TypeVar("S")

Deadline = float | None


class Calls(Generic[T, S]):
    """The three ways to call; each passes on the options of whoever is called."""

    _deadline: Deadline

    @overload
    def ubatch(self, item: T, /, *args: Any, **kwargs: Any) -> S: ...

    @overload
    def ubatch(self, **kwargs: Any) -> S: ...

    def ubatch(self, *args: Any, **kwargs: Any) -> S:
        """Ask for one result, and wait for it.

        Blocks this caller, but not the hub; safe from any greenlet and any native
        thread. A call made before start() waits for it.

        Args:
            *args: The item, and further arguments: the handler gets one list for
                each. Calls that differ in number or names share no batch.
            **kwargs: More of them, by name.

        Raises:
            QueueFull: *max_pending* calls are waiting already.
            DeadlineExceeded: The *deadline* passed.
            Stopped: stop() has begun.
            BadBatchOutput: The handler's return does not answer its calls.
            HandlerExit: The handler ended with something like SystemExit.
            BackendError: Nothing can run the batch here.
            UBatchError: A handler asked for what cannot come before it returns.
            Exception: What the handler raised, in a copy for this call.
        """
        result: S = self._call(args, kwargs, self._deadline)
        return result

    @overload
    def submit(self, item: T, /, *args: Any, **kwargs: Any) -> Future[S]: ...

    @overload
    def submit(self, **kwargs: Any) -> Future[S]: ...

    def submit(self, *args: Any, **kwargs: Any) -> Future[S]:
        """Put one call into the open batch, and return at once.

        Safe from any greenlet and any native thread.

        Raises:
            QueueFull: *max_pending* calls are waiting already.
            Stopped: stop() has begun.
        """
        return self._submit(args, kwargs, self._deadline)

    @overload
    def map(
        self, items: Iterable[T], *, return_exceptions: Literal[False] = False
    ) -> list[S]: ...

    @overload
    def map(
        self, items: Iterable[T], *, return_exceptions: bool
    ) -> list[S | Exception]: ...

    def map(
        self, items: Iterable[T], *, return_exceptions: bool = False
    ) -> list[S] | list[S | Exception]:
        """Ask for one result per item, and wait for them all.

        Blocks this caller, but not the hub; safe from any greenlet and any native
        thread.

        Args:
            items: One item per call.
            return_exceptions: Put errors in the list, instead of raising the first.

        Returns:
            The results, in the order of the items.

        Raises:
            QueueFull: They do not all fit beside those that wait; those that were
                put in are given up.
            Exception: As ubatch(), for the first item that failed.
        """
        return self._map(items, return_exceptions, self._deadline)

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: Deadline
    ) -> Any:
        raise NotImplementedError

    def _submit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: Deadline
    ) -> Future[Any]:
        raise NotImplementedError

    def _map(
        self, items: Iterable[Any], return_exceptions: bool, deadline: Deadline
    ) -> list[Any]:
        raise NotImplementedError


class View(Calls[T, S]):
    """A batcher seen through other options; made by with_options()."""

    def __init__(self, batcher: Calls[T, S], deadline: Deadline) -> None:
        self._batcher = batcher
        self._deadline = deadline

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: Deadline
    ) -> Any:
        return self._batcher._call(args, kwargs, deadline)

    def _submit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: Deadline
    ) -> Future[Any]:
        return self._batcher._submit(args, kwargs, deadline)

    def _map(
        self, items: Iterable[Any], return_exceptions: bool, deadline: Deadline
    ) -> list[Any]:
        return self._batcher._map(items, return_exceptions, deadline)
