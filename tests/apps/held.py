"""What a model process is told to run whose every run ends as the test says.

It imports next to nothing: many such processes are started.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from typing import Any


class Item:
    """What a call asks about."""

    def __init__(self, number: int) -> None:
        self.number = number


class Answer:
    """What it gets; its own if the number is the same."""

    def __init__(self, number: int) -> None:
        self.number = number


def held(address: bytes, test: int) -> Callable[..., Any]:
    """Ask the test what to return or raise: it has the other end of a socket.

    Args:
        test: Its process; others, forks of it, have their answers at once.
    """
    if os.getppid() != test:
        return lambda items: [Answer(item.number) for item in items]
    return connected(address)


def connected(address: bytes) -> Callable[..., Any]:
    """Do the same in any process."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    stream = connection.makefile("rwb")
    assert stream.read(1), "the test has not taken note of this process"

    def handler(*args: Any, **kwargs: Any) -> Any:
        pickle.dump((args, kwargs), stream)
        stream.flush()
        error, value = pickle.load(stream)
        if error is not None:
            raise error
        return value

    return handler
