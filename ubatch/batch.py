"""One batch: its calls, their places, its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from math import inf, nextafter
from typing import TYPE_CHECKING, Any, NamedTuple

from ubatch.errors import (
    BadBatchOutput,
    BadBatchOutputSize,
    DeadlineExceeded,
    Failure,
    HandlerExit,
)

if TYPE_CHECKING:
    from ubatch.backends.base import Latch
    from ubatch.collector import Collector
    from ubatch.future import Future

Shape = tuple[int, tuple[str, ...]]
"""How many positional arguments a call has, and the names of the others."""

Handler = Callable[..., Any]

ONE_ITEM: Shape = (1, ())


class Ends(NamedTuple):
    """How many calls of a batch ended how."""

    results: int
    failures: int


class Batch:
    """The calls that will be run together, in order of arrival.

    A call's *ticket* is the time of its arrival, made unique in its batch; it is
    the key of the call's item while somebody waits for it, then of its result.
    A caller that leaves takes its item out, so an abandoned call costs nothing.

    Owner: ``calls``, ``deadlines``, ``futures`` and the outcome change only under
    the collector's lock.
    Invariant: a ticket leaves ``calls`` once: by leaving, by expiring or by
    ``settle``. After ``settled`` nothing changes but ``results``, where each
    caller takes its own away.
    """

    __slots__ = (
        "collector",
        "shape",
        "calls",
        "latch",
        "running",
        "settled",
        "results",
        "failure",
        "expired",
        "deadlines",
        "futures",
        "blocked_on",
        "handler",
        "quiet_turns",
        "size",
        "inputs",
        "_newest",
        "_newest_seen",
        "_tickets",
    )

    def __init__(
        self, collector: Collector, shape: Shape, latch: Latch, handler: Handler | None
    ) -> None:
        self.collector = collector
        self.shape = shape
        self.calls: dict[float, Any] = {}
        self.latch = latch  # set once: when the batch is settled
        self.running = False
        self.settled = False
        self.results: dict[float, Any] = {}
        self.failure: Failure | None = None
        self.expired: dict[float, DeadlineExceeded] = {}
        self.deadlines: dict[float, float] = {}  # when a call must have its answer
        self.futures: dict[float, Future[Any]] = {}
        self.blocked_on: Batch | None = None  # what its handler waits for, if it does
        self.handler = handler  # it, and all it needs, lives until this is settled
        self.quiet_turns = 0
        self.size = 0  # calls that the handler gets
        self.inputs: tuple[list[Any], dict[str, list[Any]]] = [], {}  # its arguments
        self._newest = self._newest_seen = 0.0
        self._tickets: list[float] = []

    def add(self, item: Any, now: float) -> float:
        """Put a call in; return its ticket."""
        # Two calls may arrive between two ticks of the clock.
        ticket = now if now > self._newest else nextafter(self._newest, inf)
        self.calls[ticket] = item
        self._newest = ticket
        return ticket

    @property
    def oldest(self) -> float:
        """When the first of the calls still here arrived."""
        oldest: float = next(iter(self.calls))
        return oldest

    def observe_turn(self) -> None:
        """Count one more turn that brought nothing, or begin again."""
        if self._newest == self._newest_seen:
            self.quiet_turns += 1
        else:
            self._newest_seen = self._newest
            self.quiet_turns = 0

    def begin(self) -> None:
        """Freeze what the handler gets; who leaves from now on runs for nothing."""
        self.running = True
        self.size = len(self.calls)
        self._tickets = list(self.calls)
        items = list(self.calls.values())
        if self.shape == ONE_ITEM:
            self.inputs = [items], {}
            return
        count, names = self.shape
        self.inputs = (
            [[args[i] for args, _ in items] for i in range(count)],
            {name: [kwargs[name] for _, kwargs in items] for name in names},
        )

    def leave(self, ticket: float) -> None:
        """Take a call out: its caller has left, or its time is up."""
        del self.calls[ticket]
        self.deadlines.pop(ticket, None)

    def expire(self, ticket: float) -> DeadlineExceeded:
        """Take a call out whose deadline has passed; return its error."""
        deadline = self.deadlines[ticket] - ticket
        self.leave(ticket)
        error = DeadlineExceeded(
            f"{self.collector.name}: no result within the call's deadline of "
            f"{deadline:g} seconds"
        )
        self.expired[ticket] = error
        return error

    def settle(self, answers: list[Any] | None, failure: Failure | None) -> Ends:
        """Take the outcome in; return how the calls that are still here ended."""
        here = failed = len(self.calls)
        self.failure = failure
        if answers is not None:
            self.results = dict(zip(self._tickets, answers, strict=True))
            failed = 0
            if Failure in set(map(type, answers)):  # else not one look at each
                failed = sum(type(self.results[t]) is Failure for t in self.calls)
        self.settled = True
        self.calls.clear()  # nobody keeps the items alive any longer
        self._tickets = []
        self.inputs = [], {}
        self.handler = None
        return Ends(here - failed, failed)

    def end_of(self, ticket: float) -> tuple[Any, Failure | None]:
        """Return one call's own result, or its failure; once, when it has ended."""
        if self.failure is not None:
            return None, self.failure
        result = self.results.pop(ticket)
        return (None, result) if type(result) is Failure else (result, None)

    def take(self, ticket: float) -> Any:
        """Return one call's own result, or raise its own error; once."""
        if ticket in self.expired:
            raise self.expired.pop(ticket)
        result, failure = self.end_of(ticket)
        if failure is not None:
            raise failure.own()
        return result


def shape_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shape:
    """Return what two calls must have in common to share a batch."""
    if not args and not kwargs:
        raise TypeError("a call needs at least one argument: the item to be answered")
    return len(args), tuple(sorted(kwargs))


def answer(
    handler: Handler, size: int, args: list[Any], kwargs: dict[str, Any]
) -> list[Any]:
    """Call the handler; return one answer per call.

    Runs where the handler runs: on a worker, or in another process.

    Raises:
        BadBatchOutput: What came back cannot be matched to the calls.
        HandlerExit: The handler ended with something that is not an Exception.
    """
    try:
        return _one_per_call(handler(*args, **kwargs), size)
    except Exception:
        raise
    except BaseException as error:
        raise HandlerExit(
            f"the handler ended with {error!r}, which is not an Exception; "
            "raise an Exception to fail a batch"
        ) from error


def failures_apart(answers: list[Any]) -> list[Any]:
    """Return the answers with each exception among them wrapped in a Failure.

    Looks at types alone: what a handler returns may be a proxy, whose attributes
    run somebody's code.
    """
    kinds = {kind for kind in set(map(type, answers)) if issubclass(kind, Exception)}
    if not kinds:
        return answers
    return [Failure(one) if type(one) in kinds else one for one in answers]


def _one_per_call(outputs: Any, size: int) -> list[Any]:
    wanted = "return a sequence with one result per call, such as a list or an array"
    kind = type(outputs).__name__
    if isinstance(outputs, (str, bytes, bytearray, Mapping, set, frozenset)):
        raise BadBatchOutput(f"the handler returned a {kind}; {wanted}")
    if hasattr(outputs, "iloc") and getattr(outputs, "ndim", 1) != 1:
        raise BadBatchOutput(f"the handler returned a {kind}, a table; {wanted}")
    if hasattr(outputs, "cr_await"):
        outputs.close()  # or Python warns that it was never awaited
    try:
        returned = len(outputs)
    except TypeError:
        raise BadBatchOutput(
            f"the handler returned {_named(outputs)}, which has no length; {wanted}"
        ) from None
    if returned != size:
        raise BadBatchOutputSize(size, returned)
    return _exactly(outputs, size)


def _exactly(outputs: Iterable[Any], size: int) -> list[Any]:
    answers = list(islice(outputs, size + 1))
    if len(answers) != size:  # its length and its iteration disagree
        raise BadBatchOutputSize(size, len(answers))
    return answers


def _named(outputs: Any) -> str:
    return "None" if outputs is None else f"a {type(outputs).__name__}"
