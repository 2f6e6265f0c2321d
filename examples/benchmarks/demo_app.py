"""How are the calls of the digits' model counted, whichever ubatch is installed?

The application is ``examples/digits``, unchanged; it is imported as ``app`` from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from servers import HERE

sys.path.insert(0, str(HERE.parent / "digits"))


def fill_in() -> None:
    """Give ubatch 0.0.2 the names that the application wants, and it has not."""
    import ubatch

    if hasattr(ubatch, "QueueFull"):
        return
    ancestor = ubatch.ubatch_decorator
    flask = ModuleType("ubatch.flask")
    flask.init_app = lambda app: None  # type: ignore[attr-defined]
    sys.modules["ubatch.flask"] = ubatch.flask = flask  # type: ignore[assignment]
    ubatch.ServerExecutor = None  # type: ignore

    def ubatch_decorator(max_size: int, timeout: float, **newer: Any) -> Any:
        return ancestor(max_size, timeout)

    ubatch.ubatch_decorator = ubatch_decorator  # type: ignore[assignment]


class Counted:
    """The model, and how often it was called."""

    def __init__(self, read: Callable[[list[np.ndarray]], np.ndarray]) -> None:
        self._read = read
        self.calls = 0

    def __call__(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Ask the model."""
        self.calls += 1
        return self._read(pictures)


fill_in()
import app as digits  # noqa: E402

app = digits.app
digits.read = read = Counted(digits.read)


@app.get("/calls")
def calls() -> dict[str, int]:
    return {"calls": read.calls}
