"""What have the handlers of a server noted? Reads what ``serve_model.Notes`` writes.

Needs the standard library alone: it runs in every system's environment.
"""

from __future__ import annotations

from pathlib import Path
from struct import Struct

NOTE = Struct("<Qdd")


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
