"""How is a gunicorn started on a free port, asked, and ended for sure?

Needs the standard library alone: it runs in every system's environment.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
PATIENCE = 60.0
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


class Gunicorn:
    """One gunicorn, on a port of its own."""

    def __init__(
        self,
        app: str,
        options: Sequence[str],
        env: Mapping[str, str],
        python: str = sys.executable,
        *,
        workers: int = 1,
        own_group: bool = False,
    ) -> None:
        """Start it.

        Args:
            app: As gunicorn wants it: ``module:name``, where the module is beside this.
            options: More of gunicorn's command line.
            env: The environment, to which BENCH_HOME is added: a folder of its own.
            python: The interpreter whose gunicorn is meant.
            workers: How many worker processes.
            own_group: Keep the terminal's Ctrl-C from it, for who ends it himself.
        """
        self.home = tempfile.TemporaryDirectory(prefix="ubatch-")
        self._log = Path(self.home.name, "log")
        # The socket listens before gunicorn starts: nobody can take the port, and no
        # request comes too early.
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = listener.getsockname()[1]
        command = [python, "-m", "gunicorn", app, "-w", str(workers)]
        command += ["-b", f"fd://{listener.fileno()}", "--log-level", "warning"]
        with listener, self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--pythonpath", str(HERE), *options],
                cwd=HERE,
                env={**env, **ONE_THREAD, "BENCH_HOME": self.home.name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=own_group,
            )

    def __enter__(self) -> Gunicorn:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server; what it still works at is lost."""
        pids = [self._process.pid]
        try:
            children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children")
            pids += map(int, children.read_text().split())
        except OSError:
            pass  # it is gone, or this is not Linux: a worker misses its master soon
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.wait()
        self.home.cleanup()

    def ask(self, path: str, body: str | None = None) -> Any:
        """Send one request on a connection of its own; return what was answered.

        Raises:
            RuntimeError: The answer is not 200, or there is none.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            connection.request("GET" if body is None else "POST", path, body, headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"{path}: {error!r}; {self.last_words()}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status}; {self.last_words()}")
        return json.loads(answer)

    def last_words(self) -> str:
        """Return the last line of its log."""
        lines = self._log.read_text().strip().splitlines()
        return lines[-1] if lines else "its log is empty"
