"""Is what makes no sense refused where it is written?"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.fakes import Recorder
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
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(option: str, value: Any) -> None:
    """TypeError names the option and the value."""
    options: dict[str, Any] = {"max_size": 1, "timeout": 0.0, option: value}
    with pytest.raises(TypeError, match=option):
        UBatch(**options)


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


def test_a_view_refuses_a_senseless_deadline() -> None:
    """with_options() checks as the constructor does."""
    with pytest.raises(ValueError, match="deadline"):
        UBatch(1, 0.0, handler=Recorder()).with_options(deadline=-1)
