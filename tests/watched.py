"""Who asked a batcher for something, and what did they get?

Each of the watched knows from the model whether it should have ended, and how.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.apps.held import Answer, Item
from tests.ends import CANCELLED, Boom, Call, End, Way
from tests.fakes import Caller, Gate, HubGate
from tests.model import Batch, Life, Model
from ubatch import Future
from ubatch.nesting import running_batch

if TYPE_CHECKING:
    from tests.bridge import Link


def arguments(shape: str, item: Item) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call."""
    named = {"named": {"mode": item.number}, "only": {"item": item}}
    first = {"only": (), "two": (item, item.number)}
    return first.get(shape, (item,)), named.get(shape, {})


class Held:
    """A handler that has its batch, and waits to be told how to end."""

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gate: Gate | HubGate,
        link: Link | None = None,
    ) -> None:
        self.gate = gate
        self.link = link  # to the process that runs it, if it is another one
        self.way: Way = "results"
        self.picked: set[int] = set()
        self.batch: Batch  # as soon as the model knows of it
        self.real = running_batch.get()
        items = args[0] if args else kwargs["item"]
        self.numbers = [item.number for item in items]
        self.shape = "one" if args else "only"
        if len(args) == 2 or "mode" in kwargs:
            beside = args[1] if len(args) == 2 else kwargs["mode"]
            assert self.numbers == beside, "arguments of different calls"
            self.shape = "two" if len(args) == 2 else "named"

    def end(self) -> Any:
        if self.way == "raise":
            raise Boom(*self.numbers)
        if self.way == "exit":
            raise SystemExit("all")
        if self.way == "none":
            return None
        numbers = self.numbers[:-1] if self.way == "short" else list(self.numbers)
        if self.way == "long":
            numbers.append(-1)
        if self.way == "some":
            return tuple(
                Boom(number) if place in self.picked else Answer(number)
                for place, number in enumerate(numbers)
            )
        return [Answer(number) for number in numbers]


class Watched:
    """Somebody who asked for one call's result, and how that should end."""

    killable: Caller | None = None

    def __init__(self, call: Call, caller: Caller) -> None:
        self.call = call
        self.caller: Any = caller
        self.left: type[BaseException] | None = None
        self.killable = caller

    def __repr__(self) -> str:
        caller = self.caller and (
            self.caller.ended,
            self.caller.value,
            self.caller.error,
        )
        seen = {name: value for name, value in vars(self).items() if name != "caller"}
        return f"<{type(self).__name__} {seen}, caller: {caller}>"

    def is_due(self) -> bool:
        return self.left is not None or self.call.end is not None

    def has_ended(self) -> bool:
        return self.caller.ended

    def leave(self, model: Model, kind: type[BaseException]) -> None:
        """Take note that the caller was thrown out."""
        self.left = kind
        model.finish(self.call, CANCELLED)

    def check(self) -> None:
        if self.left is not None:
            assert type(self.caller.error) is self.left, repr(self.caller.error)
            return
        assert self.call.end is not None
        check_end(self.call, self.call.end, self.caller.value, self.caller.error)


class Waiter(Watched):
    """Somebody who waits for a future; if it leaves, the call goes on."""

    def leave(self, model: Model, kind: type[BaseException]) -> None:
        self.left = kind


class Promised(Watched):
    """A future that nobody need wait for."""

    def __init__(self, call: Call, future: Future[Any], told: Counter[int]) -> None:
        self.call = call
        self.caller: Any = None
        self.future = future
        self._told = told
        number = call.number
        future.add_done_callback(lambda _: told.update([number]))

    def is_due(self) -> bool:
        return self.call.end is not None

    def has_ended(self) -> bool:
        return self.future.done() and self._told[self.call.number] > 0

    def check(self) -> None:
        assert self.call.end is not None
        assert self._told[self.call.number] == 1, "its callback ran twice"
        assert self.future.cancelled() == (self.call.end is CANCELLED)
        value = error = None
        try:
            value = self.future.result(0)
        except BaseException as raised:
            error = raised
        check_end(self.call, self.call.end, value, error)


class Mapped(Watched):
    """Somebody who called map()."""

    def __init__(self, calls: list[Call], caller: Caller, keep: bool) -> None:
        self.calls = calls
        self.caller = self.killable = caller
        self.left = None
        self._keep = keep  # errors, as return_exceptions does

    def failed(self) -> Call | None:
        """Return the call whose error map() raises, if it got to it."""
        for call in () if self._keep else self.calls:
            if call.end is None:
                return None
            if call.end.error is not None:
                return call
        return None

    def is_due(self) -> bool:
        if self.left is not None or self.failed() is not None:
            return True
        return all(call.end is not None for call in self.calls)

    def leave(self, model: Model, kind: type[BaseException]) -> None:
        self.left = kind
        self.give_up(model)

    def give_up(self, model: Model) -> None:
        """Cancel those that wait; what runs, runs on."""
        for call in self.calls:
            batch = call.batch
            if call.end is None and (batch is None or batch in batch.life.waiting):
                model.give_up(call)

    def check(self) -> None:
        error, failed = self.caller.error, self.failed()
        if self.left is not None:
            assert type(error) is self.left, repr(error)
        elif failed is not None and failed.end is not None:
            check_end(failed, failed.end, None, error)
        else:
            assert error is None, repr(error)
            for call, value in zip(self.calls, self.caller.value, strict=True):
                assert call.end is not None
                if call.end.error is None:
                    check_end(call, call.end, value, None)
                else:
                    check_end(call, call.end, None, value)


class Stopping(Watched):
    """Somebody who called stop()."""

    def __init__(self, life: Life | None, caller: Caller) -> None:
        self.life = life
        self.caller = self.killable = caller
        self.left = None

    def is_due(self) -> bool:
        return self.left is not None or self.life is None or self.life.has_ended()

    def leave(self, model: Model, kind: type[BaseException]) -> None:
        self.left = kind

    def check(self) -> None:
        wanted = self.left or type(None)
        assert type(self.caller.error) is wanted, repr(self.caller.error)


def check_end(call: Call, end: End, value: Any, error: Any) -> None:
    """Check that a call ended as it should: its own result, or the right error."""
    if end.error is None:
        assert error is None, f"{call} got {error!r}"
        assert type(value) is Answer, f"{call} got {value!r}"
        assert value.number == call.number, f"{call} got the answer of {value.number}"
        return
    assert type(error) is end.error, f"{call} got {error!r}, {value!r}"
    assert end.args in (None, error.args), f"{call} got {error!r}"
