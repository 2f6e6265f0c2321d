"""Is what makes no sense refused where it is written?"""

from __future__ import annotations

import functools
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from numpy import arange, float64

from tests.children import once, run
from tests.fakes import Gated, Recorder, World
from ubatch import UBatch, ubatch_decorator

NAN = float("nan")
INF = float("inf")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_size", 0),
        ("max_size", -1),
        ("timeout", -0.1),
        ("timeout", NAN),
        ("timeout", INF),
        ("workers", 2**31 - 1),
        ("workers", 0),
        ("workers", -3),
        ("max_pending", 0),
        ("deadline", 0),
        ("deadline", -1),
        ("deadline", NAN),
        ("linger", "forever"),
        ("backend", "asyncio"),
        ("executor", "processpool"),
    ],
)
def test_a_senseless_value_is_refused_at_construction(option: str, value: Any) -> None:
    """ValueError names the option, the value and what would do."""
    options: dict[str, Any] = {"max_size": 1, "timeout": 0.0, option: value}
    for make in (UBatch, ubatch_decorator):
        with pytest.raises(ValueError, match=f"{option}.*") as caught:
            make(**options)(Recorder())
        assert repr(value) in str(caught.value) or "more than 0" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_size", "many"),
        ("max_size", 1.5),
        ("timeout", "soon"),
        ("timeout", None),
        ("workers", None),
        ("deadline", "later"),
        ("executor", object()),
        ("executor", None),
        ("name", 3),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(option: str, value: Any) -> None:
    """TypeError names the option and the value."""
    options: dict[str, Any] = {"max_size": 1, "timeout": 0.0, option: value}
    with pytest.raises(TypeError, match=option):
        UBatch(**options)


class Hostile:
    """What raises an error of its own whatever is done with it."""

    def _refuse(self, *_: Any) -> Any:
        raise LookupError("hostile")

    __repr__ = __index__ = __float__ = __eq__ = __bool__ = _refuse  # type: ignore


@pytest.mark.parametrize(
    "option",
    ["max_size", "timeout", "workers", "linger", "backend", "executor", "max_pending"]
    + ["deadline", "name"],
)
@pytest.mark.parametrize(
    "value",
    [Hostile(), -(10**5000), arange(3), "x" * 10**6],
    ids=["hostile", "huge", "array", "long"],
)
def test_a_value_that_cannot_be_shown_is_refused_all_the_same(
    option: str, value: Any
) -> None:
    """The error is of the option, not of the value; and no longer than can be read."""
    if option == "name" and isinstance(value, str):
        return
    options: dict[str, Any] = {"max_size": 1, "timeout": 0.0, option: value}
    with pytest.raises((TypeError, ValueError), match=f"^{option}") as caught:
        UBatch(**options)
    assert len(str(caught.value)) < 500


async def coroutine(items: list[int]) -> list[int]:
    return items


async def generator(items: list[int]) -> Any:
    yield items


class Asynchronous:
    async def __call__(self, items: list[int]) -> list[int]:
        return items

    async def method(self, items: list[int]) -> list[int]:
        return items


@pytest.mark.parametrize(
    "handler",
    [
        coroutine,
        generator,
        Asynchronous(),
        Asynchronous().method,
        functools.partial(coroutine),
    ],
)
def test_a_coroutine_function_is_refused_with_the_way_out(handler: Any) -> None:
    """Nothing here awaits; the error says what to pass instead."""
    with pytest.raises(TypeError, match="plain function"):
        UBatch(1, 0.0, handler=handler)
    with pytest.raises(TypeError, match="plain function"):
        UBatch(1, 0.0).set_handler(handler)
    with pytest.raises(TypeError, match="plain function"):
        ubatch_decorator(1, 0.0)(handler)


@pytest.mark.parametrize("handler", [3, "predict", [1]])
def test_a_handler_that_cannot_be_called_is_refused(handler: Any) -> None:
    """TypeError shows what was passed."""
    with pytest.raises(TypeError, match="takes lists"):
        UBatch(1, 0.0, handler=handler)
    with pytest.raises(TypeError, match="takes lists"):
        UBatch(1, 0.0).set_handler(None)  # type: ignore[arg-type]


def test_stop_refuses_a_senseless_timeout() -> None:
    """stop(timeout=NaN) is an error, not a wait for ever."""
    ub = UBatch(1, 0.0, handler=Recorder())
    with pytest.raises(ValueError, match="timeout"):
        ub.stop(NAN)


@pytest.mark.parametrize("timeout", [Fraction(30), Decimal(30), float64(30)])
def test_stop_takes_seconds_of_any_kind(world: World, timeout: Any) -> None:
    """What is a number of seconds elsewhere is one here."""
    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend).start()
    future = ub.submit(1)
    world.until(lambda: handler.batches)
    stopping = world.spawn(ub.stop, timeout)
    world.until(lambda: "stopping" in repr(ub))
    handler.gate.open()
    stopping.result()
    assert "1" == future.result(30)


def test_a_view_refuses_a_senseless_deadline() -> None:
    """with_options() checks as the constructor does."""
    with pytest.raises(ValueError, match="deadline"):
        UBatch(1, 0.0, handler=Recorder()).with_options(deadline=-1)


def wait_for_ages(backend: str) -> list[int]:
    """Have times that no clock counts to, wherever one may be given."""
    from typing import Any

    from ubatch import UBatch

    chosen: Any = backend
    ages = 10.0**300
    ub: UBatch[int, int] = UBatch(
        2, ages, handler=list, backend=chosen, linger="full", deadline=ages,
        handler_timeout=ages,
    ).start()  # fmt: skip
    first = ub.with_options(deadline=ages).submit(1)
    found = [ub.ubatch(2), first.result(timeout=ages)]
    ub.stop(timeout=ages)
    return found


def wait_for_a_moment(backend: str) -> list[bool]:
    """Have times that are too short for a clock, wherever one may be given."""
    import logging
    from contextlib import suppress
    from typing import Any

    from ubatch import UBatch, UBatchError

    logging.disable()  # whether they are met, and who hears of it, is not the question
    chosen: Any = backend
    moment = 1e-5
    ub: UBatch[int, int] = UBatch(
        3, 60.0, handler=list, backend=chosen, linger="full", handler_timeout=moment
    ).start()
    calls = [ub.with_options(deadline=moment).submit(1), ub.submit(2)]
    for call in calls:
        with suppress(UBatchError, TimeoutError):
            call.result(timeout=moment)
    ub.stop(timeout=moment)
    return [call.done() for call in calls]


ON_EVERY_LOOP = pytest.mark.parametrize(
    "backend, loop",
    [("gevent", "libev-cext"), ("gevent", "libuv-cffi"), ("thread", "libev-cext")],
)


@once
@ON_EVERY_LOOP
def test_a_time_may_be_longer_than_a_clock_counts(backend: str, loop: str) -> None:
    """It means for ever, on every loop; it used to end in an error of libuv's."""
    assert [2, 1] == run(wait_for_ages, backend, env={"GEVENT_LOOP": loop})


@once
@ON_EVERY_LOOP
def test_a_time_may_be_shorter_than_a_clock_tells(backend: str, loop: str) -> None:
    """It is waited for as briefly as may be; libuv used to warn of stop(timeout)."""
    assert [True, True] == run(wait_for_a_moment, backend, env={"GEVENT_LOOP": loop})
