"""What does a batcher leave behind, in this process and in the log?"""

from __future__ import annotations

import gc
import logging
import os

import psutil


class Log(logging.Handler):
    """What the log says of strands that died or are stuck; it goes nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()
        logging.getLogger("ubatch").handlers = [self]

    def clear(self) -> None:
        self.deaths: list[str] = []
        self.stuck = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "died" in record.msg:
            self.deaths.append(record.getMessage())
        if "the handler has run for" in record.msg:
            self.stuck += 1


def objects(*kinds: type) -> list[str]:
    """Return what is left, by name: a list of the things would keep them alive."""
    gc.collect()
    return [repr(one) for one in gc.get_objects() if isinstance(one, kinds)]


def processes() -> set[int]:
    """Return the processes that this one has started, also dead ones."""
    return {child.pid for child in psutil.Process().children()}


def open_files() -> set[str]:
    """Return the open files of this process, where one can see them."""
    try:
        return set(os.listdir("/proc/self/fd"))
    except FileNotFoundError:
        return set()
