"""The decorator: a function that takes a list, and batches besides."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from types import MethodType
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    Protocol,
    TypedDict,
    TypeVar,
    overload,
)

from ubatch import options
from ubatch.backends import BackendName
from ubatch.calls import View
from ubatch.executors import Elsewhere, ExecutorOption
from ubatch.future import Future
from ubatch.isolation import OnError
from ubatch.policy import Linger
from ubatch.stats import Stats
from ubatch.ubatch import Outputs, UBatch

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R", covariant=True)


class Batched(Generic[T, R]):
    """A function that takes a list, whose ``ubatch`` takes one item.

    Called, it is the function it was. On a class it is a method, and each instance
    batches alone.
    """

    _elsewhere = False  # its handler is in another process

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._arguments = arguments  # of UBatch, but the handler
        # Itself as the handler, which a process pool can be sent by name.
        handler: Any = self
        self._elsewhere = isinstance(arguments.get("executor"), Elsewhere)
        if self._elsewhere:
            handler, name = None, arguments.get("name") or function.__qualname__
            arguments = {**arguments, "name": name}
        self._batcher: UBatch[T, Any] = UBatch(handler=handler, **arguments).start()
        self._instances: dict[int, tuple[weakref.ref[Any], UBatch[T, Any]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        """Call the function as it was written: with lists, at once.

        Where its handler is in another process, that answers what is in the lists.
        """
        if self._elsewhere:
            return self._ask(args, kwargs)  # type: ignore[no-any-return]
        outputs: R = self._function(*args, **kwargs)
        return outputs

    def _ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names, columns = list(kwargs), [*args, *kwargs.values()]
        calls = [
            self._batcher.submit(
                *row[: len(args)], **dict(zip(names, row[len(args) :]))
            )
            for row in zip(*columns, strict=True)
        ]
        return [call.result() for call in calls]

    @overload
    def ubatch(
        self: Batched[T, Outputs[S]], item: T, /, *args: Any, **kwargs: Any
    ) -> S: ...

    @overload
    def ubatch(self: Batched[T, Outputs[S]], **kwargs: Any) -> S: ...

    def ubatch(self: Batched[T, Outputs[S]], *args: Any, **kwargs: Any) -> S:
        """Ask for one result, as UBatch.ubatch()."""
        result: S = self._batcher.ubatch(*args, **kwargs)
        return result

    @overload
    def submit(
        self: Batched[T, Outputs[S]], item: T, /, *args: Any, **kwargs: Any
    ) -> Future[S]: ...

    @overload
    def submit(self: Batched[T, Outputs[S]], **kwargs: Any) -> Future[S]: ...

    def submit(self: Batched[T, Outputs[S]], *args: Any, **kwargs: Any) -> Future[S]:
        """Put one call in, as UBatch.submit()."""
        return self._batcher.submit(*args, **kwargs)

    @overload
    def map(
        self: Batched[T, Outputs[S]],
        items: Iterable[T],
        *,
        return_exceptions: Literal[False] = False,
    ) -> list[S]: ...

    @overload
    def map(
        self: Batched[T, Outputs[S]], items: Iterable[T], *, return_exceptions: bool
    ) -> list[S | Exception]: ...

    def map(
        self: Batched[T, Outputs[S]],
        items: Iterable[T],
        *,
        return_exceptions: bool = False,
    ) -> list[S] | list[S | Exception]:
        """Ask for one result per item, as UBatch.map()."""
        return self._batcher.map(items, return_exceptions=return_exceptions)

    def with_options(
        self: Batched[T, Outputs[S]], *, deadline: float | None
    ) -> View[T, S]:
        """Return a view with other options, as UBatch.with_options()."""
        return self._batcher.with_options(deadline=deadline)

    def stats(self) -> Stats:
        """Return what was counted so far, as UBatch.stats()."""
        return self._batcher.stats()

    def start(self) -> None:
        """Accept calls again after stop(); decoration has started it once."""
        self._batcher.start()

    def stop(self, timeout: float | None = None) -> None:
        """Refuse new calls and end, as UBatch.stop()."""
        self._batcher.stop(timeout)

    def __set_name__(self, owner: type, name: str) -> None:
        if self._elsewhere:
            raise TypeError(
                f"{owner.__qualname__}.{name} would be a method, and its handler is in "
                "another process, which has no instance of the class; decorate a "
                "function, or wrap it in staticmethod()"
            )

    def __get__(self, instance: object, owner: type | None = None) -> Batched[T, R]:
        """Return the method of one instance, with that instance's batcher."""
        if instance is None:
            return self
        bound: Batched[T, R] = object.__new__(Batched)
        functools.update_wrapper(bound, self._function)
        bound._function = MethodType(self._function, instance)
        bound._batcher = self._batcher_of(instance)
        return bound

    def _batcher_of(self, instance: object) -> UBatch[T, Any]:
        """Return the batcher of one instance, without keeping the instance alive.

        Beside the instance, not in it: in its ``__dict__`` it would be pickled and
        copied with it. By identity: an instance need not be hashable.
        """
        key = id(instance)
        known = self._instances.get(key)
        if known is not None:
            return known[1]
        instances = self._instances
        # Race (one_batcher): 1. two threads ask for a new instance's batcher; 2. both
        #       make one. The dict takes one of the two; the other has started nothing.
        alive = weakref.ref(instance, lambda _: instances.pop(key, None))
        batcher = _MethodBatcher(self._function, alive, self._arguments).start()
        return instances.setdefault(key, (alive, batcher))[1]

    def __reduce__(self) -> str:
        return self._function.__qualname__  # by name, as functions are pickled

    def __repr__(self) -> str:
        return f"<batched {self._function!r}>"


class _MethodBatcher(UBatch[Any, Any]):
    """The batcher of one instance, which only a batch that waits keeps alive."""

    def __init__(
        self,
        function: Callable[..., Any],
        instance: weakref.ref[Any],
        arguments: dict[str, Any],
    ) -> None:
        super().__init__(handler=function, **arguments)
        self._instance = instance

    def _held(self) -> Callable[..., Any] | None:
        function, instance = super()._held(), self._instance()
        if function is None or instance is None:
            return None
        return MethodType(function, instance)


class BatchOptions(TypedDict, total=False):
    """The options of UBatch that the decorator takes too."""

    backend: BackendName
    executor: ExecutorOption
    workers: int
    linger: Linger
    max_pending: int | None
    deadline: float | None
    shed: bool
    on_error: OnError
    handler_timeout: float | None
    name: str | None


class Decorator(Protocol):
    """What ubatch_decorator() returns: infers the item and the result."""

    @overload
    def __call__(self, function: Callable[[list[T]], R], /) -> Batched[T, R]: ...

    @overload
    def __call__(self, function: Callable[..., R], /) -> Batched[Any, R]: ...


def ubatch_decorator(
    max_size: int, timeout: float, **chosen: Unpack[BatchOptions]
) -> Decorator:
    """Make a function that takes a list answer single items too, in batches.

    The function still takes a list when it is called. Its ``ubatch(item)``,
    ``submit(item)``, ``map(items)``, ``with_options()``, ``stats()`` and ``stop()``
    are those of a UBatch that is started already. A decorated method batches for
    each instance alone, and does not keep the instance alive.

    Args:
        max_size: Calls in a batch at most.
        timeout: Seconds that a call may linger for others at most.
        **chosen: The options of UBatch.

    Raises:
        ValueError: An option has a value that makes no sense.
        TypeError: An option is of the wrong kind, or the function is a coroutine
            function.
    """

    if "handler" in chosen:
        raise TypeError("the decorated function is the handler; leave handler= out")

    def decorate(function: Callable[..., Any]) -> Batched[Any, Any]:
        options.check_handler(function)
        return Batched(function, {"max_size": max_size, "timeout": timeout, **chosen})

    return decorate
