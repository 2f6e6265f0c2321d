"""Do the hooks for gunicorn answer what waits, in time, and warn of bad settings?"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.children import FileGate, Server, gunicorn, once, run

pytestmark = [once, pytest.mark.server]

KINDS = ["gevent", "gevent_pywsgi", "gthread", "sync"]
each_kind = pytest.mark.parametrize("kind", KINDS)
# Its own server counts no requests: max_requests means nothing to gevent_pywsgi.
each_kind_but_pywsgi = pytest.mark.parametrize("kind", ["gevent", "gthread", "sync"])


class Forgetful:
    """A server whose requests submit calls and do not wait for them."""

    def __init__(self, home: Path, server: Server, gate: FileGate) -> None:
        self.server = server
        self.gate = gate
        self._home = home

    def submit(self, *numbers: int) -> int:
        """Have one call made by each of some requests; return the worker's pid."""
        pids = {self.server.get(f"/submit?n={number}").body for number in numbers}
        (pid,) = pids
        return int(pid)

    def until_leaving(self, pid: int) -> None:
        """Wait until a worker has served its requests and is about to end."""
        self.server.until(lambda: f"Worker exiting (pid: {pid})" in self.server.log)

    def ends(self, pid: int) -> dict[int, Any]:
        """Return what became of the calls in one worker, by their items."""
        record = (self._home / "record").read_text().splitlines()
        lines = [json.loads(line) for line in record]
        return {number: result for owner, number, result in lines if owner == pid}

    @property
    def lines(self) -> list[str]:
        """What the batchers have logged about their end."""
        log = (self._home / "ubatch.log").read_text().splitlines()
        return [line for line in log if "drained" in line]


@contextmanager
def forgetful(home: Path, kind: str, *options: str) -> Iterator[Forgetful]:
    """Serve the app that forgets, with the hooks."""
    (home / "record").touch()
    env = {"RECORD": str(home / "record"), "UBATCH_LOG": str(home / "ubatch.log")}
    if kind == "gthread":
        # gunicorn 27 hangs where SIGQUIT finds its main thread about to start another
        # thread: the pool's lock is taken. With one, that is over by the first answer.
        options = "--threads", "1", "--keep-alive", "0", *options
    options = "-k", kind, *options
    with FileGate(home / "gate") as gate, gunicorn(
        home / "log",
        "tests.apps.forget:app",
        *options,
        conf="hooked",
        GATE=gate.path,
        **env,
    ) as server:
        yield Forgetful(home, server, gate)


@each_kind
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_what_was_submitted_is_answered_before_the_end(
    kind: str, number: str, tmp_path: Path
) -> None:
    """After a signal to end, calls that nobody waits for run, and are told."""
    with forgetful(tmp_path, kind) as app:
        pid = app.submit(1, 2, 3)
        app.server.signal(signal.Signals[number])
        told = time.monotonic()
        app.until_leaving(pid)
        if number == "SIGINT" and time.monotonic() - told > 0.5:
            pytest.skip("this machine is too busy for a quick end, of a second")
        app.gate.open()
        assert 0 == app.server.end()
        assert {1: 4, 2: 8, 3: 12} == app.ends(pid)
        (line,) = app.lines
        assert re.search("held: drained for .* s: 3 calls answered, 0 left$", line)


@each_kind
def test_what_was_submitted_is_answered_before_a_reload(
    kind: str, tmp_path: Path
) -> None:
    """After SIGHUP the old worker answers its calls, while the new one serves."""
    with forgetful(tmp_path, kind) as app:
        old = app.submit(1, 2, 3)
        app.server.signal(signal.SIGHUP)
        app.until_leaving(old)
        new = app.submit(4)
        app.gate.open()
        app.server.until(lambda: {1: 4, 2: 8, 3: 12} == app.ends(old))
        app.server.until(lambda: {4: 16} == app.ends(new))
        assert old != new


@each_kind_but_pywsgi
def test_what_was_submitted_is_answered_by_a_worker_that_is_replaced(
    kind: str, tmp_path: Path
) -> None:
    """A worker that has served its max_requests answers its calls before it goes."""
    with forgetful(tmp_path, kind, "--max-requests", "4") as app:
        pid = app.submit(1, 2, 3)  # and one request has seen whether it is there
        app.until_leaving(pid)
        app.gate.open()
        app.server.until(lambda: {1: 4, 2: 8, 3: 12} == app.ends(pid))


@each_kind_but_pywsgi
def test_a_drain_ends_before_gunicorn_kills(kind: str, tmp_path: Path) -> None:
    """Where a handler hangs, its calls get Stopped, and the worker ends by itself."""
    with forgetful(tmp_path, kind, "--graceful-timeout", "3") as app:
        pid = app.submit(1, 2, 3)
        app.server.signal(signal.SIGTERM)
        assert 0 == app.server.end()
        assert "SIGKILL" not in app.server.log
        assert {1: "Stopped", 2: "Stopped", 3: "Stopped"} == app.ends(pid)
        (line,) = app.lines
        assert "0 calls answered, 3 left, which get Stopped" in line


@each_kind_but_pywsgi
def test_a_drain_is_no_reason_for_a_worker_timeout(kind: str, tmp_path: Path) -> None:
    """It also ends before the master misses the worker's signs of life."""
    options = "--timeout", "3", "--max-requests", "4"
    with forgetful(tmp_path, kind, *options) as app:
        pid = app.submit(1, 2, 3)
        app.server.until(lambda: len(app.ends(pid)) == 3)
        assert {"Stopped"} == set(app.ends(pid).values())
        assert 0 == app.server.get("/").status - 200
        assert "WORKER TIMEOUT" not in app.server.log


@pytest.mark.timing
@each_kind
def test_an_old_worker_drains_like_a_young_one(kind: str, tmp_path: Path) -> None:
    """What counts is its last sign of life, and the master goes on getting them."""
    with forgetful(tmp_path, kind, "--timeout", "3") as app:
        born = time.monotonic()
        app.server.until(lambda: time.monotonic() > born + 4)
        pid = app.submit(1, 2, 3)
        app.server.signal(signal.SIGTERM)
        app.until_leaving(pid)
        app.gate.open()
        assert 0 == app.server.end()
        assert {1: 4, 2: 8, 3: 12} == app.ends(pid)
        assert "WORKER TIMEOUT" not in app.server.log


@pytest.mark.timing
@each_kind_but_pywsgi
def test_a_quick_end_is_quick(kind: str, tmp_path: Path) -> None:
    """SIGINT does not wait for a handler that hangs, whatever graceful_timeout is."""
    with forgetful(tmp_path, kind, "--graceful-timeout", "40") as app:
        pid = app.submit(1)
        began = time.monotonic()
        app.server.signal(signal.SIGINT)
        assert 0 == app.server.end()
        assert {1: "Stopped"} == app.ends(pid)
        assert time.monotonic() - began < 10


def warnings(home: Path, *options: str, **env: str) -> list[str]:
    """Return what a worker says of its settings; the app's max_size is 64."""
    log = home / "ubatch.log"
    options = *options, "-w", "1"
    with gunicorn(
        home / "log",
        "tests.apps.probe:app",
        *options,
        conf="hooked",
        UBATCH_LOG=str(log),
        **env,
    ):
        said = log.read_text().splitlines() if log.exists() else []
    return [line for line in said if "backend" not in line]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("-k", "sync"), "a sync worker serves one request at a time"),
        (("-k", "gthread", "--threads", "8"), "threads=8"),
        (("-k", "gevent", "--worker-connections", "9"), "worker_connections=9"),
        (
            ("-k", "gthread", "--threads", "64", "--worker-connections", "9"),
            "worker_connections=9",
        ),
    ],
)
def test_a_batch_that_can_never_be_full_is_told(
    options: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    """One warning names the batcher, the numbers and what to change."""
    (line,) = warnings(tmp_path, *options)
    assert "squares: its requests can never fill a batch of max_size=64" in line
    assert why in line
    assert "; set " in line


@pytest.mark.parametrize(
    "options",
    [
        ("-k", "gevent"),
        ("-k", "gevent", "--worker-connections", "64"),
        ("-k", "gthread", "--threads", "64"),
        ("-k", "gevent", "--preload"),
    ],
)
def test_settings_that_can_fill_a_batch_are_not_warned_of(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    """As many requests as max_size are enough, and the defaults of gevent are."""
    assert [] == warnings(tmp_path, *options)


def test_a_call_in_the_master_is_warned_of(tmp_path: Path) -> None:
    """Warmed up before the fork; the worker says where to do that instead."""
    (line,) = warnings(tmp_path, "-k", "gevent", "--preload", WARM="1")
    assert "squares: was called in the master" in line
    assert "post_worker_init" in line


def test_a_call_in_the_worker_is_not_warned_of(tmp_path: Path) -> None:
    """Warmed up where the application is imported by the worker itself."""
    assert [] == warnings(tmp_path, "-k", "gevent", WARM="1")


def hooks_in_one_process() -> Any:
    """Call the hooks as gunicorn does where no test can bring it to it."""
    import logging
    import socket

    from gunicorn.config import Config
    from gunicorn.workers.ggevent import GeventWorker

    from ubatch import UBatch
    from ubatch.gunicorn import post_worker_init, worker_exit

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore
    logging.getLogger("ubatch.gunicorn").addHandler(handler)
    ub: UBatch[int, int] = UBatch(64, 0.0, handler=lambda numbers: numbers).start()
    cfg = Config()
    cfg.set("worker_connections", 32)
    with socket.socket() as one, socket.socket() as two:
        for sockets in ([one], [one, two]):
            worker = GeventWorker(1, 0, sockets, None, 30, cfg, None)
            post_worker_init(worker)
            said.append(f"for {len(sockets)} sockets")
            worker.pid = 2**22 + 1  # nobody's
            worker_exit(None, worker)
            worker.tmp.close()
    return said, ub.ubatch(1)


def test_each_socket_has_its_own_worker_connections() -> None:
    """A gevent worker that listens on two holds twice as many requests."""
    (warning, *rest), _ = run(hooks_in_one_process)
    assert "worker_connections=32" in warning
    assert ["for 1 sockets", "for 2 sockets"] == rest


def test_the_master_does_not_drain_for_a_worker_that_is_gone() -> None:
    """gunicorn calls worker_exit in the master too; its batchers go on."""
    _, answer = run(hooks_in_one_process)
    assert 1 == answer
