"""A module that only model processes import, and errors and results of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class OutOfMemory(RuntimeError):
    """An error that the process that asks has never heard of."""


def factory() -> Callable[..., Any]:
    """Answer with the process; fail as told."""

    def handler(items: list[str]) -> list[Any]:
        if "all" in items:
            raise OutOfMemory("no room for all")
        return [OutOfMemory("no room") if x == "one" else os.getpid() for x in items]

    return handler
