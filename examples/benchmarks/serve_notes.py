"""What is noted of the batches of a server, and how is it read?

Each process that has a handler notes them in a file of its own below BENCH_HOME, which
the benchmark reads. Needs the standard library alone: it runs in every system's
environment.
"""

from __future__ import annotations

import mmap
import os
from itertools import count
from pathlib import Path
from struct import Struct

NOTE = Struct("<Qdd")
"""Calls of a batch, seconds, CPU seconds."""
MOST_NOTES = 1 << 17


class Notes:
    """A file in memory, one of each process, to which batches are added.

    To take a number and to write there are atomic, whichever threads do it. It asks no
    lock under gevent, and gives the GIL away nowhere.
    """

    def __init__(self) -> None:
        folder = Path(os.environ["BENCH_HOME"], "notes")
        folder.mkdir(exist_ok=True)
        with Path(folder, str(os.getpid())).open("w+b") as file:
            file.truncate(MOST_NOTES * NOTE.size)
            self._memory = mmap.mmap(file.fileno(), 0)
        self._numbers = count()

    def add(self, calls: int, seconds: float, cpu_seconds: float) -> None:
        """Note one batch."""
        where = next(self._numbers) * NOTE.size
        NOTE.pack_into(self._memory, where, calls, seconds, cpu_seconds)


def read(folder: Path) -> dict[str, float]:
    """Return the sums over all processes: batches, calls, seconds, CPU seconds."""
    found = {"batches": 0.0, "calls": 0.0, "seconds": 0.0, "cpu_seconds": 0.0}
    for path in folder.iterdir():
        for calls, seconds, cpu_seconds in NOTE.iter_unpack(path.read_bytes()):
            if not calls:
                break
            found["batches"] += 1
            found["calls"] += calls
            found["seconds"] += seconds
            found["cpu_seconds"] += cpu_seconds
    return found


def pids(folder: Path) -> set[int]:
    """Return the processes that have a handler."""
    return {int(path.name) for path in folder.iterdir()}
