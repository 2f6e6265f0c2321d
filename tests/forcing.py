"""How does something happen just before another thing does?"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def before(
    function: Callable[..., Any], line: str, act: Callable[[], object]
) -> Iterator[None]:
    """Have *act* run once, before *function* runs its *line* in this thread."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    numbers = [
        number
        for number, text in enumerate(lines, first)
        if text.strip().startswith(line)
    ]
    assert 1 == len(numbers), f"{line!r} is there {len(numbers)} times"
    acted: list[bool] = []

    def in_function(frame: Any, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lineno == numbers[0] and not acted:
            acted.append(True)
            act()
        return in_function

    def anywhere(frame: Any, event: str, _: Any) -> Any:
        return in_function if frame.f_code is function.__code__ else None

    outside = sys.gettrace()
    sys.settrace(anywhere)
    try:
        yield
    finally:
        sys.settrace(outside)
    assert acted, f"{line!r} was never reached"


class Struck(Exception):
    """What the handler of a signal raises, wherever that strikes."""


def strike() -> None:
    """Have that happen here."""
    raise Struck
