"""Do uWSGI and Celery, on greenlets, join what they are asked into batches?"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.children import Command, FileGate, Server, once, run

APP = "tests.apps.flask_probe:app"
CALLS = 24


def program(name: str) -> str:
    """Return the path of a program that is installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where a server is not installed."""
    return pytest.mark.skipif(
        not Path(program(name)).exists(),
        reason=f"{name} is not installed; make venv-servers does it",
    )


pytestmark = [once, pytest.mark.server]


@needs("uwsgi")
@pytest.mark.parametrize("patch", [False, True])
def test_requests_of_uwsgi_share_batches(patch: bool, tmp_path: Path) -> None:
    """Under uwsgi --gevent, patched or not, a batch runs beside the other requests."""
    options = ["--gevent-monkey-patch"] if patch else []
    with FileGate(tmp_path / "gate") as gate, uwsgi(
        tmp_path / "log", *options, GATE=gate.path
    ) as server:
        asked = server.ask(f"/square?n={n}" for n in range(CALLS))
        # The handler is held, and the hub answers these.
        server.until(lambda: server.get("/seen").body["waiting"] == CALLS)
        assert not any(each.done() for each in asked)
        gate.open()
        answers = [each.result() for each in asked]
        seen = server.get("/seen").body
        server.signal(signal.SIGTERM)
        assert 0 == server.end()
    assert [(200, n * n) for n in range(CALLS)] == [
        (answer.status, answer.body["result"]) for answer in answers
    ]
    assert {seen["pid"]} == {answer.body["pid"] for answer in answers}
    # The first batch was held, and the second grew until it was through.
    assert CALLS == sum(seen["handled"]) and len(seen["handled"]) <= 2
    assert "gevent" == seen["backend"]


@needs("uwsgi")
def test_term_lets_uwsgi_answer_those_who_wait(tmp_path: Path) -> None:
    """With SIGTERM made graceful, what waited is answered before uWSGI ends."""
    graceful = "--hook-master-start", "unix_signal:15 gracefully_kill_them_all"
    with FileGate(tmp_path / "gate") as gate, uwsgi(
        tmp_path / "log", *graceful, GATE=gate.path
    ) as server:
        asked = server.ask(f"/square?n={n}" for n in range(CALLS))
        server.until(lambda: server.get("/seen").body["waiting"] == CALLS)
        server.signal(signal.SIGTERM)
        server.until(lambda: "Gracefully killing worker" in server.log)
        gate.open()
        answers = [each.result() for each in asked]
        assert 0 == server.end()
    assert [(200, n * n) for n in range(CALLS)] == [
        (answer.status, answer.body["result"]) for answer in answers
    ]


def ask_celery() -> Any:
    """Send tasks, and one to look into the worker; return all answers."""
    from celery import group

    from tests.apps.tasks import TOGETHER, seen, square

    answers = group(square.s(n) for n in range(TOGETHER))().get(timeout=50)
    return answers, seen.delay().get(timeout=50)


@needs("celery")
def test_tasks_of_celery_share_batches(tmp_path: Path) -> None:
    """Under celery -P gevent as many tasks as a batch needs are in it together."""
    command = [program("celery"), "-A", "tests.apps.tasks", "worker"]
    command += ["-P", "gevent", "-c", "50", "--loglevel", "INFO"]
    folder = {"FOLDER": str(tmp_path)}
    with Command(command, tmp_path / "log", **folder) as worker:
        answers, seen = run(ask_celery, env=folder)
        worker.signal(signal.SIGTERM)
        assert 0 == worker.end()
    assert [n * n for n in range(CALLS)] == answers
    assert [CALLS] == seen["handled"]
    assert "gevent" == seen["backend"]


def uwsgi(log: Path, *options: str, **env: str) -> Server:
    """Return a uWSGI server with one worker, which is to be entered."""

    def command(listener: int) -> list[str]:
        served = ["--http-socket", f"fd://{listener}", "--module", APP]
        kind = ["--master", "--gevent", "50", "--die-on-term", "--need-app"]
        home = ["--virtualenv", sys.prefix, "--pythonpath", "."]
        return [program("uwsgi"), *served, *kind, *home, *options]

    return Server(command, log, **env)
