"""Does gunicorn keep a model server running beside its workers?"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.children import (
    KILLED,
    ROOT,
    Program,
    Server,
    environment,
    gunicorn,
    once,
)
from ubatch.gunicorn import serve

pytestmark = [once, pytest.mark.server]
FACTORY = "tests.apps.beside:make"


class Beside:
    """A gunicorn of two workers, and the model server beside it."""

    def __init__(self, server: Server, socket: Path) -> None:
        self.server = server
        self.socket = socket

    def ask(self, number: int) -> Any:
        """Have a worker answer one request."""
        answer = self.server.get(f"/double?n={number}")
        assert answer.status == 200, answer
        assert answer.body["answer"] == 2 * number
        return answer.body

    def status(self) -> dict[str, Any]:
        """Return what ``ubatch status`` tells."""
        command = [sys.executable, "-m", "ubatch", "status", str(self.socket)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    @property
    def pids(self) -> list[int]:
        """Return all model servers and model processes that there have been."""
        started = re.findall(r"model (?:server|process) (\d+) ", self.server.log)
        return sorted({int(pid) for pid in started})

    def until_gone(self) -> None:
        """Wait until none of them is left."""
        deadline = time.monotonic() + 20.0
        while left := [pid for pid in self.pids if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)


@contextmanager
def beside(home: Path, *options: str, log: str = "log", **env: str) -> Iterator[Beside]:
    """Serve the app with its model beside it."""
    socket = home / "run" / "model.sock"
    more = {"conf": "beside_conf", "SOCKET": str(socket), **env}
    options = ("-k", "gevent", "-w", "2", *options)
    with gunicorn(home / log, "tests.apps.beside:app", *options, **more) as server:
        yield Beside(server, socket)


def test_all_workers_have_one_model(tmp_path: Path) -> None:
    """What both workers ask is answered by one process, which neither of them is."""
    with beside(tmp_path) as running:
        answers = []
        while len({answer["worker"] for answer in answers}) < 2:
            answers.append(running.ask(len(answers)))
        (model,) = {answer["model"] for answer in answers}
        status = running.status()

        assert model not in {answer["worker"] for answer in answers}
        assert [model] == [each["pid"] for each in status["models"]]
        assert status["factory"] == FACTORY
        assert status["calls_total"] == len(answers)


def test_nobody_is_warned_of_batches_that_the_server_makes(tmp_path: Path) -> None:
    """What one worker can have under way is not what fills the server's batches."""
    with beside(tmp_path) as running:
        running.ask(1)

        assert "can never fill a batch" not in running.server.log


def test_a_model_server_that_is_killed_is_started_again(tmp_path: Path) -> None:
    """After kill -9 of the server, later requests are answered by another."""
    with beside(tmp_path) as running:
        running.ask(1)
        first = running.status()["pid"]
        os.kill(first, signal.SIGKILL)
        told = re.compile(f"the model server {first} {KILLED}; starting another")
        running.server.until(lambda: told.search(running.server.log))
        running.ask(2)

        assert running.status()["pid"] != first


def test_a_model_has_none_of_the_workers_sockets(tmp_path: Path) -> None:
    """Or nobody could listen there while it lives; gunicorn's are inheritable."""
    with beside(tmp_path) as running:
        running.ask(1)
        first = running.status()["pid"]
        os.kill(first, signal.SIGKILL)  # the next one is started by a master that has
        running.server.until(lambda: f"the model server {first} " in running.server.log)
        model = running.ask(2)["model"]
        for pid in (running.status()["pid"], model):
            assert [] == psutil.Process(pid).net_connections(kind="tcp")


def test_modules_are_found_where_gunicorn_finds_them(tmp_path: Path) -> None:
    """Its pythonpath is the model's, too."""
    folder = tmp_path / "folder"
    folder.mkdir()
    factory = (
        "def make():\n    return lambda items: [(2 * item, 0) for item in items]\n"
    )
    (folder / "found_there.py").write_text(factory)
    options = "--pythonpath", str(folder)
    with beside(tmp_path, *options, FACTORY="found_there:make") as running:
        assert 0 == running.ask(1)["model"]


def test_a_model_server_does_not_move(tmp_path: Path) -> None:
    """Reloading says so; and what there is ends with gunicorn."""
    with beside(tmp_path) as running:
        running.ask(1)
        Path(f"{running.socket}.moved").touch()
        running.server.signal(signal.SIGHUP)
        running.server.until(lambda: "restart gunicorn for that" in running.server.log)
        running.server.signal(signal.SIGTERM)
        running.server.end()
        running.until_gone()


def begin_badly(path: str) -> list[Any]:
    """Start a model server without a file to be had, and then reload it at once."""
    import os
    import resource
    import time

    import psutil

    from ubatch.address import is_taken
    from ubatch.sidecar import Sidecar

    children = psutil.Process().children
    sidecar = Sidecar(path, ["tests.apps.beside:make"])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files - 1, limits[1]))
    sidecar.start()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    found: list[Any] = [len(children())]
    while sidecar._pid is None:
        sidecar.tend()
        time.sleep(0.01)
    sidecar.reload()
    (first,) = children()
    while not is_taken(path):
        sidecar.tend()
        time.sleep(0.01)
    found.append(children() == [first])
    sidecar.stop(10.0)
    return [*found, len(children())]


def test_a_bad_beginning_leaves_one_model_server_or_none(tmp_path: Path) -> None:
    """One that cannot be watched is ended; one that is not yet up takes a reload."""
    folder = tmp_path / "run"
    ended = Program(begin_badly, str(folder / "model.sock")).end()
    assert 0 == ended.returncode, ended
    assert [0, True, 0] == json.loads(ended.stdout), ended


def test_of_two_masters_the_second_serves_when_the_first_ends(tmp_path: Path) -> None:
    """As after USR2: no request fails, whoever its model is asked from."""
    with beside(tmp_path) as first, beside(tmp_path, log="second") as second:
        first.ask(1)
        second.server.until(lambda: "ours waits until it ends" in second.server.log)
        model = second.ask(2)["model"]
        first.server.signal(signal.SIGTERM)
        first.server.end()
        assert second.ask(3)["model"] != model
        assert 1 == second.server.log.count("another model server listens")


def test_sighup_loads_the_model_anew(tmp_path: Path) -> None:
    """Reloading gunicorn reloads the model, in the same server."""
    with beside(tmp_path) as running:
        old = running.ask(1)["model"]
        server = running.status()["pid"]
        running.server.signal(signal.SIGHUP)
        deadline = time.monotonic() + 30.0
        while running.ask(2)["model"] == old:
            assert time.monotonic() < deadline, running.server.log

        assert running.status()["pid"] == server


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_nothing_is_left_when_gunicorn_has_ended(tmp_path: Path, number: str) -> None:
    """However the master ends, the model server and its processes end too."""
    with beside(tmp_path) as running:
        running.ask(1)
        running.server.signal(getattr(signal, number))
        running.server.end()
        running.until_gone()

        assert not running.socket.exists()


def test_the_master_imports_nothing_of_the_model(tmp_path: Path) -> None:
    """serve() starts the factory's module elsewhere: the workers stay small."""
    code = (
        "import sys\n"
        "from ubatch.gunicorn import serve\n"
        f"serve({FACTORY!r}, socket={str(tmp_path / 'm')!r})\n"
        "print('tests.apps.beside' in sys.modules, 'gevent' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_size": 0}, "max_size"),
        ({"timeout": -1.0}, "timeout"),
        ({"processes": 0}, "processes"),
        ({"linger": "never"}, "linger"),
        ({"max_pending": 0}, "max_pending"),
        ({"deadline": 0}, "deadline"),
        ({"on_error": "ignore"}, "on_error"),
        ({"retry": 1}, "retry"),
        ({"socket": "x" * 200}, "too long"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(
    options: dict[str, Any], named: str
) -> None:
    """They are refused where gunicorn.conf.py is read, not when the server starts."""
    with pytest.raises((TypeError, ValueError), match=named):
        serve(FACTORY, **{"socket": "model.sock", **options})
