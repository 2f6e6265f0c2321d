"""Where do the handlers of the soak run, and what is there?

In the ``worker``'s own threads, in a model ``process`` of its own, or in one of a
model ``server``'s.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.processes import children_of
from tests.soak_handler import LIMIT, Handler
from ubatch import ProcessExecutor, UBatch
from ubatch.backends import BackendName

FACTORY = "tests.soak_handler:Handler"
WORKERS = 2
ROBUST: dict[str, Any] = {"on_error": "isolate", "handler_timeout": LIMIT}

PATIENCE = 60.0

Soaked = UBatch[str, Any]


class Place:
    """In the threads of this process."""

    slower = 1.0
    """How much less often handlers hang here, and a batcher is made for one call."""

    strands = 0
    """How many may have a batch at once, if that is more than there are workers."""

    def __init__(self) -> None:
        self._handler = Handler()

    def make(self, kind: BackendName, size: int, wait: float, **more: Any) -> Soaked:
        """Return a batcher, started."""
        return UBatch(
            *(size, wait), handler=self._handler, backend=kind, **more
        ).start()

    def soaked(self, kind: BackendName) -> Soaked:
        """Return the one that is called on and on."""
        return self.make(kind, 32, 0.005, workers=WORKERS, name="soak", **ROBUST)

    def brief(self, kind: BackendName) -> Soaked:
        """Return one that is made for a single call."""
        return self.make(kind, 4, 0.0, name="brief")

    def kill(self) -> bool:
        """Kill a model process: the youngest, so that the oldest can grow."""
        return False

    def ready(self) -> bool:
        """Tell whether there are as many processes as there should be."""
        return True

    def count(self) -> dict[str, float]:
        """Return what there is beside this process."""
        return {}


class ProcessPlace(Place):
    """In model processes of this one."""

    slower = 0.1

    def __init__(self) -> None:
        self._owner = os.getpid()

    def make(self, kind: BackendName, size: int, wait: float, **more: Any) -> Soaked:
        executor = ProcessExecutor(FACTORY, more.pop("workers", 1))
        return UBatch(*(size, wait), executor=executor, backend=kind, **more).start()

    def kill(self) -> bool:
        models = self._models()
        if len(models) == WORKERS:
            models[-1].kill()
        return len(models) == WORKERS

    def ready(self) -> bool:
        return len(self._models()) == WORKERS

    def count(self) -> dict[str, float]:
        models = self._models()
        return {
            "models": len(models),
            "model_rss": max(each.memory_info().rss for each in models),
            "model_fds": max(each.num_fds() for each in models),
        }

    def _models(self) -> list[psutil.Process]:
        """Return them, the oldest first."""
        models = map(psutil.Process, children_of(self._owner, "model"))
        return sorted(models, key=psutil.Process.create_time)


class ServerPlace(ProcessPlace):
    """In those of a model server."""

    strands = 64

    def __init__(self, socket: Path, server: int) -> None:
        self._address = f"unix:{socket}"
        self._owner = server

    def make(self, kind: BackendName, size: int, wait: float, **more: Any) -> Soaked:
        return UBatch.connect(self._address, backend=kind, name=more["name"])

    def count(self) -> dict[str, float]:
        server = psutil.Process(self._owner)
        return {
            **super().count(),
            "server_rss": server.memory_info().rss,
            "server_fds": server.num_fds(),
            "server_threads": server.num_threads(),
        }


@contextmanager
def place(name: str) -> Iterator[Place]:
    """Make one, and let it go."""
    if name == "worker":
        yield Place()
    elif name == "process":
        yield ProcessPlace()
    else:
        with tempfile.TemporaryDirectory(prefix="soak-") as home:
            socket = Path(home, "run", "model.sock")
            with _server(socket) as server:
                yield ServerPlace(socket, server)


@contextmanager
def _server(socket: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "ubatch", "serve", FACTORY, "--socket", socket]
    command += ["--with-parent", f"{os.getpid()}", "--max-size", "32"]
    command += ["--timeout", "0.005", "--processes", f"{WORKERS}"]
    command += ["--on-error", "isolate", "--handler-timeout", f"{LIMIT}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + PATIENCE
            while len(children_of(server.pid, "model")) < WORKERS:
                assert time.monotonic() < end and server.poll() is None
                time.sleep(0.05)
            yield server.pid
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()
