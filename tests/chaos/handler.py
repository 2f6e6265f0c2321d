"""What do the handlers do? Model processes import this too, and so no Flask."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from tests.chaos.journal import HOME, Journal
from tests.chaos.plan import BATCHERS, HANG, answer_to

Handler = Callable[["list[Item]"], Any]


class Item(NamedTuple):
    """What one request asks."""

    name: str
    data: str
    fault: str


class Poisoned(Exception):
    """The handler cannot run with this item."""

    def __init__(self, of: str) -> None:
        super().__init__(of)
        self.of = of


class Refused(Poisoned):
    """The handler answers one item with this."""


journal = Journal(os.environ[HOME])
at_work: list[None] = []
"""One entry per run of a handler here, even if nobody waits for that any more."""
numbers = count()


def handler_of(batcher: str) -> Handler:
    """Return the handler of a batcher."""
    return partial(_handle, batcher)


def process() -> Handler:
    """Make the handler of this route, in a model process of a worker's."""
    return handler_of("process")


def server() -> Handler:
    """Make that of this one, in a model process of the model server's."""
    return handler_of("server")


def _handle(batcher: str, items: list[Item]) -> Any:
    """Answer a batch, in whichever way the worst of it wants."""
    number, names = next(numbers), [item.name for item in items]
    at_work.append(None)
    journal.write(run=number, batcher=batcher, names=names, parent=os.getppid())
    try:
        return _answer(items, BATCHERS[batcher].takes)
    finally:
        journal.write(ran=number)
        at_work.pop()


def _answer(items: list[Item], takes: float) -> Any:
    faults = {item.fault for item in items}
    if "hang" in faults:
        time.sleep(HANG)
    if "busy" in faults:
        _keep_the_interpreter(0.05)
    if "exit" in faults:
        raise SystemExit(3)
    time.sleep(takes)
    for item in items:
        if item.fault == "poison":
            raise Poisoned(item.name)
    if "none" in faults:
        return None
    answers = [
        Refused(name) if fault == "own" else answer_to(name, data)
        for name, data, fault in items
    ]
    return answers[1:] if "short" in faults else answers


def _keep_the_interpreter(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
