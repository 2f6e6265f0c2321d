"""Where do workers write what has to outlive them?

One file, to which each appends whole lines: what is written stays, even after
``kill -9``. Times are those of ``time.monotonic()``, the same in all processes.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

HOME = "CHAOS_HOME"
"""The variable of the environment that names the folder of a trial."""


class Begun(NamedTuple):
    """Which worker took a request up, and when."""

    pid: int
    at: float


@dataclass(slots=True)
class Run:
    """One run of a handler."""

    pid: int
    batcher: str
    names: list[str]
    """Of the requests that it was to answer."""
    began: float
    ended: float = inf
    """Never, if its process was gone before that."""
    parent: int = 0
    """Of that process: in a model process, the one that wants the answers."""


class Journal:
    """The file, for whoever writes to it and for the one who reads."""

    def __init__(self, home: str | Path) -> None:
        flags = os.O_CREAT | os.O_RDWR | os.O_APPEND
        self._file = os.open(Path(home, "journal"), flags, 0o600)
        self._read = 0
        self._rest = b""
        self.begun: dict[str, Begun] = {}
        """Who took each request up."""
        self.runs: dict[tuple[int, int], Run] = {}
        """What handlers did: by process, and by number; in order."""
        self.pulses: dict[int, list[dict[str, Any]]] = {}
        """What each worker told of itself, in order."""

    def write(self, **entry: Any) -> None:
        """Note something of this process."""
        line = json.dumps({"pid": os.getpid(), "at": time.monotonic(), **entry})
        os.write(self._file, f"{line}\n".encode())

    def read(self) -> None:
        """Take in what has been written since."""
        while new := os.pread(self._file, 1 << 20, self._read):
            self._read += len(new)
            *lines, self._rest = (self._rest + new).split(b"\n")
            for line in lines:
                self._take_in(json.loads(line))

    def _take_in(self, entry: dict[str, Any]) -> None:
        pid, at = entry["pid"], entry["at"]
        if "begun" in entry:
            self.begun[entry["begun"]] = Begun(pid, at)
        elif "run" in entry:
            run = Run(pid, *(entry[key] for key in ("batcher", "names")), at)
            run.parent = entry["parent"]
            self.runs[pid, entry["run"]] = run
        elif "ran" in entry:
            self.runs[pid, entry["ran"]].ended = at
        else:
            self.pulses.setdefault(pid, []).append(entry)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)
