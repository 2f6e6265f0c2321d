"""Factories of handlers for a model server; each does as its calls say.

In the environment: GATE, a FIFO that "hold" waits for; LOADING, one that a factory
waits for; JOURNAL, a file for what reached the handler; VERSION, a file that has it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from tests.apps.models import TooLong, note_and_end, raise_too_long

Answer = dict[str, Any]


def obey() -> Callable[..., list[Any]]:
    """Return a handler that does what its items say, and tells of its batch."""
    _wait_at("LOADING")
    numbers = count()

    def handler(*args: list[Any], **kwargs: list[Any]) -> list[Any]:
        columns = [*args, *kwargs.values()]
        items = columns[0]
        _note(items)
        for item in items:
            _do(item)
        number = next(numbers)
        about = {"batch": number, "size": len(items), "pid": os.getpid()}
        named = {"args": len(args), "names": sorted(kwargs)}
        return [_answer(row, {**about, **named}) for row in zip(*columns)]

    return handler


def held() -> Callable[..., Any]:
    """Return a handler that asks the test at HELD how each batch ends."""
    from tests.apps.held import connected

    return connected(bytes.fromhex(os.environ["HELD"]))


def versioned() -> Callable[[list[Any]], list[Answer]]:
    """Return a handler that tells which version was there when it was loaded."""
    version = Path(os.environ["VERSION"]).read_text()
    if version == "broken":
        raise ValueError("this version is broken")

    def handler(items: list[Any]) -> list[Answer]:
        return [{"version": version, "item": item} for item in items]

    return handler


def broken() -> Any:
    """Return nothing: the model cannot be loaded."""
    raise LookupError("no such model")


class Mine(Exception):
    """An error with a constructor of its own, from a module of the model's."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def _do(item: Any) -> None:
    """Do to the batch what one of its items says."""
    what, *more = item if isinstance(item, (list, tuple)) else [item]
    if isinstance(what, str) and what == "hold":
        _wait_at("GATE")
    elif isinstance(what, str) and what == "raise":
        raise ValueError(*more)
    elif isinstance(what, str) and what == "raise too long":
        raise_too_long(*more)
    elif isinstance(what, str) and what == "last":
        note_and_end(os.devnull)
    elif isinstance(what, str) and what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif isinstance(what, str) and what == "sleep":
        time.sleep(*more)
    elif isinstance(what, str) and what == "die once":
        path = Path(*more)
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def _answer(row: tuple[Any, ...], about: Answer) -> Any:
    item = row[0]
    what, *more = item if isinstance(item, (list, tuple)) else [item]
    if isinstance(what, str) and what == "error":
        return Mine(*more)
    if isinstance(what, str) and what == "too long":
        return TooLong(*more)
    if isinstance(what, str) and what == "large":
        return bytes(*more)
    if isinstance(what, str) and what == "odd":
        return lambda: None
    return {**about, "row": list(row)}


def _wait_at(gate: str) -> None:
    if gate in os.environ:
        os.close(os.open(os.environ[gate], os.O_RDONLY))


def _note(items: list[Any]) -> None:
    if "JOURNAL" in os.environ:
        with open(os.environ["JOURNAL"], "a") as journal:
            print(json.dumps([repr(item)[:80] for item in items]), file=journal)
