"""How does a test run something in a process of its own?

A *program* is a function that is run by itself in a fresh Python: it imports what it
needs, and what it returns (as JSON) comes back. A *server* listens on a free port of
127.0.0.1. Each is started in a process group, which is dead when its block ends.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import gevent
import pytest
from gevent import monkey

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0
"""Seconds after which a child is taken to hang."""

once = pytest.mark.skipif(
    monkey.is_module_patched("threading"),
    reason="runs in a child, which is the same on both legs; the plain one has run it",
)
"""Marks tests that need not run again in the patched leg."""


def not_on_libuv(reason: str) -> pytest.MarkDecorator:
    """Return a mark for what gevent on libuv, or a server there, cannot do."""
    libuv = gevent.config.loop.__module__.startswith("gevent.libuv")
    return pytest.mark.skipif(libuv, reason=f"on libuv {reason}")


gunicorn_drops_nothing = not_on_libuv(
    "a gunicorn worker that ends resets connections, of routes without ubatch too"
)
"""Marks tests that end workers under load, and count what is lost."""


START = """

if __name__ == "__main__":
    import json
    import signal
    import sys

    signal.alarm(600)  # whatever becomes of the test
    print(json.dumps({}(*json.loads(sys.argv[1]))))
"""

# Warnings are errors in programs too; that a fork copies no threads is known.
STRICT = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]


class Ended(NamedTuple):
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def value(self) -> Any:
        """What the program returned, if it ended well and said nothing else."""
        assert (self.returncode, self.stderr) == (0, ""), self
        return json.loads(self.stdout.splitlines()[-1])


class Program:
    """A program that runs beside the test."""

    def __init__(
        self, program: Callable[..., Any], *args: Any, env: dict[str, str] | None = None
    ) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="ubatch-")
        source = Path(self._home.name, f"{program.__name__}.py")
        source.write_text(
            "from __future__ import annotations\n\n\n"
            + textwrap.dedent(inspect.getsource(program))
            + START.format(program.__name__)
        )
        self._process = subprocess.Popen(
            [sys.executable, *STRICT, "-X", "faulthandler", source, json.dumps(args)],
            cwd=ROOT,
            env=environment(**env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Wait until it has ended; what it has started may go on."""
        self._process.wait(PATIENCE)

    def end(self, timeout: float = PATIENCE) -> Ended:
        """Wait for the end; a program that hangs is made to tell where it does."""
        try:
            stdout, stderr = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill_group(self._process, signal.SIGABRT)
            time.sleep(1.0)  # for the faulthandler
            _kill_group(self._process, signal.SIGKILL)
            stdout, stderr = self._process.communicate()
            pytest.fail(f"the child hung for {timeout} s:\n{stdout}\n{stderr}")
        finally:
            _kill_group(self._process, signal.SIGKILL)
            self._home.cleanup()
        return Ended(self._process.returncode, stdout, stderr)


def run(
    program: Callable[..., Any],
    *args: Any,
    env: dict[str, str] | None = None,
    timeout: float = PATIENCE,
) -> Any:
    """Run a program; return what it returned. It must end well and print nothing."""
    return Program(program, *args, env=env).end(timeout).value


class Answer(NamedTuple):
    """How a request ended: an HTTP status and a body, or 0 and what went wrong."""

    status: int
    body: Any


class Command:
    """A command that runs in a child until its block ends, with a log of its own."""

    def __init__(
        self, command: list[str], log: Path, *, fds: Sequence[int] = (), **env: str
    ) -> None:
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(**env),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=fds,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The main process."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What the command has printed so far."""
        return self._log.read_text()

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _kill_group(self._process, signal.SIGKILL)
        self._process.wait()
        if error is not None:
            print(self.log)

    def until(self, happened: Callable[[], Any]) -> None:
        """Wait until something can be seen to have happened."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self._process.poll() is None, f"the command ended:\n{self.log}"
            assert time.monotonic() < deadline, f"it never happened:\n{self.log}"
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send a signal to the main process."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        return self._process.wait(PATIENCE)


class Server(Command):
    """A server in a child, on a port of its own.

    It inherits a socket that listens already, so no request comes too early and
    nobody can take the port.
    """

    def __init__(
        self, command: Callable[[int], list[str]], log: Path, **env: str
    ) -> None:
        self._pool = ThreadPoolExecutor(128)  # starts threads as they are needed
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
            self.port: int = listener.getsockname()[1]
            fd = listener.fileno()
            super().__init__(command(fd), log, fds=[fd], **env)

    def __enter__(self) -> Server:
        try:
            answer = self.get("/")
            assert answer.status == 200, f"{answer}\n{self.log}"
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)  # first: it ends all requests
        self._pool.shutdown()

    def get(self, path: str) -> Answer:
        """Send one request on a new connection."""
        with Client(self.port) as client:
            return client.get(path)

    def ask(self, paths: Iterable[str]) -> list[Future[Answer]]:
        """Send requests at once, each on a new connection."""
        return [self._pool.submit(self.get, path) for path in paths]

    def run(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Have a thread of the test do something, which ends with the server."""
        return self._pool.submit(work, *args)


class Client:
    """One HTTP connection, kept open; it makes itself anew only if it is told to."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, path: str) -> Answer:
        """Send one request and read the answer."""
        try:
            self._connection.request("GET", path)
            response = self._connection.getresponse()
            body = response.read().decode()
        except (OSError, HTTPException) as error:
            return Answer(0, repr(error))
        if response.headers["Content-Type"] == "application/json":
            return Answer(response.status, json.loads(body))
        return Answer(response.status, body)


def gunicorn(
    log: Path, app: str, *options: str, conf: str = "conf", **env: str
) -> Server:
    """Return a gunicorn server of *app*, which is to be entered."""

    def command(listener: int) -> list[str]:
        program = [sys.executable, "-m", "gunicorn", app, *options]
        # Every gunicorn of this user would share one control socket.
        return [
            *program,
            "-b",
            f"fd://{listener}",
            "-c",
            f"{ROOT}/tests/apps/{conf}.py",
        ]

    return Server(command, log, **env)


def pywsgi(log: Path, app: str, *, patch: bool, **env: str) -> Server:
    """Return a ``gevent.pywsgi`` server of *app*, which is to be entered."""

    def command(listener: int) -> list[str]:
        program = [sys.executable, "-m", "tests.apps.serve", app, str(listener)]
        return [*program, "patch"] if patch else program

    return Server(command, log, **env)


class FileGate:
    """Holds whoever comes, natively and in any process, until it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        self._writer: int | None = None

    def open(self) -> None:
        """Let everybody through, now and from now on."""
        if self._writer is None:
            self._writer = os.open(self.path, os.O_RDWR)

    def __enter__(self) -> FileGate:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            os.close(self._writer)


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a child: ours, without what would change the result.

    GEVENT_LOOP stays: who sets it wants the whole suite on that loop. And so do
    PYTHONWARNINGS, which a test may set for a child and its children.
    """
    ours = ("UBATCH_", "GEVENT_", "GUNICORN_", "PYTHON", "WEB_CONCURRENCY", "GATE")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("GEVENT_LOOP", "PYTHONWARNINGS") or not name.startswith(ours)
    }
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **changes}


def _kill_group(process: subprocess.Popen[Any], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


KERNEL = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])


def fate(text: str) -> str:
    """Match what is said of the end of a process.

    Where gevent watches for the ends of children, as it does for one test of this
    process or other, it may be first to hear how one ended, and older kernels forget.
    """
    return text if KERNEL >= (6, 15) else f"({text}|has ended)"


KILLED = fate("was killed by SIGKILL")
