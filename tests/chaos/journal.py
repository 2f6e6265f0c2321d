"""Where do workers write what has to outlive them?

One file, to which each appends whole lines: what is written stays, even after
``kill -9``. Times are those of ``time.monotonic()``, the same in all processes.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

HOME = "CHAOS_HOME"
"""The variable of the environment that names the folder of a trial."""


class Begun(NamedTuple):
    """Which worker took a request up, and when."""

    pid: int
    at: float


class Journal:
    """The file, for whoever writes to it and for the one who reads."""

    def __init__(self, home: str | Path) -> None:
        flags = os.O_CREAT | os.O_RDWR | os.O_APPEND
        self._file = os.open(Path(home, "journal"), flags, 0o600)
        self._read = 0
        self._rest = b""
        self.begun: dict[str, Begun] = {}
        """Who took each request up."""
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
                entry = json.loads(line)
                if "begun" in entry:
                    self.begun[entry["begun"]] = Begun(entry["pid"], entry["at"])
                else:
                    self.pulses.setdefault(entry["pid"], []).append(entry)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)
