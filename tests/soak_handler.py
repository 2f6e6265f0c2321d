"""What does the handler of the soak do? Model processes import this too."""

from __future__ import annotations

import os
import time

BRIEF = 0.0005
"""Seconds that a batch takes."""

LIMIT, HANG = 0.2, 0.3
"""The handler's limit in seconds, and how long it hangs when it does."""

LEAK = "SOAK_LEAK"
"""The variable of the environment that is set if it is to leak."""


class Failed(Exception):
    """What a call that fails gets, and nobody else."""


class Handler:
    """Answers, fails and hangs, as the items say."""

    def __init__(self) -> None:
        self._leaked: list[str] | None = [] if os.environ.get(LEAK) else None

    def __call__(self, items: list[str]) -> list[str | Failed]:
        if self._leaked is not None:
            self._leaked += [50 * item for item in items]
        hangs = any(item.startswith("hang") for item in items)
        time.sleep(HANG if hangs else BRIEF)
        if any(item.startswith("spoil") for item in items):
            raise Failed("the batch")
        return [
            Failed(item) if item.startswith("fail") else item.upper() for item in items
        ]
