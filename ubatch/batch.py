"""One batch: its calls, their places, its outcome."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from ubatch.errors import BadBatchOutput, BadBatchOutputSize, Failure, HandlerExit

if TYPE_CHECKING:
    from ubatch.collector import Collector
    from ubatch.future import Future

Shape = tuple[int, tuple[str, ...]]
"""How many positional arguments a call has, and the names of the others."""

Handler = Callable[..., Any]

ONE_ITEM: Shape = (1, ())


Caller = Hashable
"""Whom to tell how a call ended: a greenlet, a thread that is parked, a Future."""

Told = tuple[Caller, Any]
"""Whom, and what: an answer, or a Failure."""


class Job(NamedTuple):
    """What a handler is given; can be pickled if that can."""

    handler: Handler
    size: int
    """Calls."""
    args: list[list[Any]]
    """One list of the calls' for each of their positional arguments."""
    kwargs: dict[str, list[Any]]
    """The same for each by name."""

    def part(self, start: int, stop: int) -> Job:
        """Return some of its calls, in lists of their own."""
        return Job(
            self.handler,
            stop - start,
            [column[start:stop] for column in self.args],
            {name: column[start:stop] for name, column in self.kwargs.items()},
        )

    def pick(self, calls: Sequence[int]) -> Job:
        """The same for any of them."""
        return Job(
            self.handler,
            len(calls),
            [[column[call] for call in calls] for column in self.args],
            {
                name: [column[call] for call in calls]
                for name, column in self.kwargs.items()
            },
        )


class Batch:
    """The calls that will be run together, in order of arrival.

    A call is known by its caller, since one that is parked waits for nothing else.
    A caller that leaves takes its item out, so an abandoned call costs nothing.

    Owner: all of it changes only under the collector's lock.
    Invariant: a caller leaves ``calls`` once: by leaving, by expiring or by
    ``settle``. Whom one of the last two takes out is told, unless it is ``gone``.
    """

    __slots__ = (
        "collector",
        "shape",
        "calls",
        "gone",
        "running",
        "settled",
        "deadlines",
        "soonest",
        "limit",
        "futures",
        "blocked_on",
        "handler",
        "opened",
        "began",
        "joined",
        "arrived",
        "quiet_turns",
        "size",
        "inputs",
        "_arrived_seen",
        "_callers",
    )

    def __init__(
        self, collector: Collector, shape: Shape, handler: Handler | None, now: float
    ) -> None:
        self.collector = collector
        self.shape = shape
        self.calls: dict[Caller, Any] = {}  # the item of each
        self.gone: set[Caller] = set()  # who left between its end and hearing of it
        self.running = False
        self.settled = False
        # When a call must have its answer, and how many seconds that was.
        self.deadlines: dict[Caller, tuple[float, float]] = {}
        self.soonest = inf  # none of them is earlier, nor is the limit
        self.limit = inf  # when its handler has run too long
        self.futures: set[Future[Any]] = set()  # the callers that are not parked
        self.blocked_on: Batch | None = None  # what its handler waits for, if it does
        self.handler = handler  # it, and all it needs, lives until this is settled
        self.opened = now
        self.began = now  # when it was closed
        self.joined = 0  # calls until then, in all batches
        self.arrived = 0.0  # times of arrival, less times of leaving, summed
        self.quiet_turns = 0
        self.size = 0  # calls that the handler gets
        self.inputs: tuple[list[Any], dict[str, list[Any]]] = [], {}  # its arguments
        self._arrived_seen = 0.0
        self._callers: list[Caller] = []

    def wanted(self) -> bool:
        """Tell whether anybody still waits for an answer; from any thread."""
        return bool(self.calls)

    def queued(self, now: float) -> float:
        """Return the seconds that its calls have waited until now or till they left."""
        return len(self.calls) * now - self.arrived

    def observe_turn(self) -> None:
        """Count one more turn that brought nothing, or begin again."""
        if self.arrived == self._arrived_seen:
            self.quiet_turns += 1
        else:
            self._arrived_seen = self.arrived
            self.quiet_turns = 0

    def begin(self, now: float, joined: int) -> None:
        """Freeze what the handler gets; who leaves from now on runs for nothing."""
        self.running = True
        self.began = now
        self.joined = joined
        self.size = len(self.calls)
        self._callers = list(self.calls)
        items = list(self.calls.values())
        if self.shape == ONE_ITEM:
            self.inputs = [items], {}
            return
        count, names = self.shape
        self.inputs = (
            [[args[i] for args, _ in items] for i in range(count)],
            {name: [kwargs[name] for _, kwargs in items] for name in names},
        )

    def job(self) -> Job | None:
        """Return what is to be run, and with what; None if it was given up meanwhile.

        Safe from any thread, without the lock.
        """
        # Race (given_up): 1. a worker reads one of the two; 2. stop() loses patience,
        #       and settle() lets both go; 3. the worker reads the other. settle()
        #       begins with the handler, and this ends with it: whoever finds it has
        #       what it is to be given.
        inputs = self.inputs
        handler = self.handler
        return None if handler is None else Job(handler, self.size, *inputs)

    def call_of(self, caller: Caller) -> int:
        """Return which of the calls that were frozen is a caller's."""
        return self._callers.index(caller)

    def still_wanted(self, calls: Sequence[int]) -> list[int]:
        """Return those of some calls that somebody waits for; from any thread."""
        waiting, callers = self.calls, self._callers
        if not callers:  # it is settled
            return []
        return [call for call in calls if callers[call] in waiting]

    def seconds_left(
        self, calls: Sequence[int], now: float
    ) -> list[float | None] | None:
        """Return what some calls have left until their deadlines, if any has one."""
        deadlines, callers = self.deadlines, self._callers
        if not deadlines or not callers:  # or it is settled
            return None
        found = [deadlines.get(callers[call]) for call in calls]
        return [None if each is None else each[0] - now for each in found]

    def answer(self, answers: list[tuple[int, Any]]) -> list[Told]:
        """Take some answers in before the others; return what to tell whom."""
        told = [(self._callers[call], answer) for call, answer in answers]
        told = [one for one in told if one[0] in self.calls]
        for caller, _ in told:
            del self.calls[caller]
            self.deadlines.pop(caller, None)
        return told

    def leave(self, caller: Caller, now: float) -> None:
        """Take a call out: its caller has left, or its time is up."""
        del self.calls[caller]
        self.deadlines.pop(caller, None)
        if not self.running:
            self.arrived -= now

    def settle(self, answers: list[Any] | None, failure: Failure | None) -> list[Told]:
        """Take the outcome in; return what to tell whom, in order of arrival."""
        if answers is None:
            told: list[Told] = [(caller, failure) for caller in self.calls]
        else:
            told = list(zip(self._callers, answers, strict=True))
            if len(self.calls) != self.size:
                told = [one for one in told if one[0] in self.calls]
        self.settled = True
        self.handler = None  # first: see job()
        self.calls = {}  # nobody keeps the items alive any longer
        self.deadlines = {}
        self.inputs = [], {}
        self._callers = []
        return told


def shape_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shape:
    """Return what two calls must have in common to share a batch."""
    if not args and not kwargs:
        raise TypeError("a call needs at least one argument: the item to be answered")
    return len(args), tuple(sorted(kwargs))


def answer(job: Job) -> list[Any]:
    """Call the handler; return one answer per call.

    Runs where the handler runs: on a worker, or in another process.

    Raises:
        BadBatchOutput: What came back cannot be matched to the calls.
        HandlerExit: The handler ended with something that is not an Exception.
    """
    try:
        return _one_per_call(job.handler(*job.args, **job.kwargs), job.size)
    except Exception:
        raise
    except BaseException as error:
        raise HandlerExit(
            f"the handler ended with {error!r}, which is not an Exception; "
            "raise an Exception to fail a batch"
        ) from error


def failures_apart(answers: list[Any]) -> tuple[list[Any], list[Failure]]:
    """Wrap each exception among the answers in a Failure; return those besides.

    Looks at types alone: what a handler returns may be a proxy, whose attributes
    run somebody's code.
    """
    kinds = {kind for kind in set(map(type, answers)) if issubclass(kind, Exception)}
    if not kinds:
        return answers, []
    wrapped = [Failure(one) if type(one) in kinds else one for one in answers]
    return wrapped, [one for one in wrapped if type(one) is Failure]


def _one_per_call(outputs: Any, size: int) -> list[Any]:
    if type(outputs) is list and len(outputs) == size:
        return outputs[:]  # it may be the handler's own, to be used again
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
