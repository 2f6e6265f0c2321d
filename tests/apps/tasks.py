"""A Celery app whose tasks batch; broker and results are files below FOLDER."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery

from ubatch import UBatch

TOGETHER = 24
"""Calls in a batch. It closes when it is full, and not before."""

folder = Path(os.environ["FOLDER"])
for name in "messages", "results":
    (folder / name).mkdir(exist_ok=True)

app = Celery(
    "tasks",
    broker="filesystem://",
    backend=f"file://{folder / 'results'}",
    broker_transport_options={
        "data_folder_in": str(folder / "messages"),
        "data_folder_out": str(folder / "messages"),
        "control_folder": str(folder / "control"),
    },
)

handled: list[int] = []


def squares(numbers: list[int]) -> list[int]:
    """Answer a batch."""
    handled.append(len(numbers))
    return [number * number for number in numbers]


ub: UBatch[int, int] = UBatch(TOGETHER, 3600.0, handler=squares, linger="full")
ub.start()


@app.task  # type: ignore[untyped-decorator]
def square(number: int) -> int:
    """Answer as one of a batch."""
    return ub.ubatch(number)


@app.task  # type: ignore[untyped-decorator]
def seen() -> dict[str, Any]:
    """Tell what this worker has seen so far."""
    return {"pid": os.getpid(), "handled": handled, "backend": ub.backend}
