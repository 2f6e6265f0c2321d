"""Does every request get its answer while gunicorn stops, reloads and loses workers?"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.children import (
    Answer,
    Client,
    FileGate,
    Server,
    gunicorn,
    gunicorn_drops_nothing,
    once,
    run,
)

pytestmark = [once, pytest.mark.server]

PROBE = "tests.apps.probe:app"
GEVENT = "-k", "gevent"
OUR_LINE = re.compile(r"^\[[-: +\d]+\] \[\d+\] \[(INFO|WARNING|ERROR)\] ")


@pytest.mark.parametrize("kind", ["gevent", "gevent_pywsgi", "gthread"])
def test_term_answers_those_who_wait(kind: str, tmp_path: Path) -> None:
    """After SIGTERM the 50 requests that were waiting get their answers."""
    options = "-k", kind, "--threads", "64"
    with FileGate(tmp_path / "gate") as gate, gunicorn(
        tmp_path / "log", PROBE, *options, GATE=gate.path
    ) as server:
        asked = server.ask(f"/square?n={n}" for n in range(50))
        server.until(lambda: server.get("/seen").body["waiting"] == 50)
        server.signal(signal.SIGTERM)
        server.until(lambda: "Handling signal: term" in server.log)
        assert not any(each.done() for each in asked)
        gate.open()
        answers = [each.result() for each in asked]
        assert 0 == server.end()
    assert [(200, n * n) for n in range(50)] == [
        (answer.status, answer.body["result"]) for answer in answers
    ]


def test_term_answers_those_who_wait_after_the_listener_is_gone(tmp_path: Path) -> None:
    """A batch may also begin when the worker has stopped to accept connections."""
    with FileGate(tmp_path / "gate") as gate, gunicorn(
        tmp_path / "log", PROBE, *GEVENT, GATE=gate.path
    ) as server:
        asked = server.ask(f"/square?n={n}" for n in range(50))
        server.until(lambda: server.get("/seen").body["waiting"] == 50)
        server.signal(signal.SIGTERM)
        server.until(lambda: not _listens(server.port))
        gate.open()
        answers = [each.result() for each in asked]
        assert 0 == server.end()
    assert {200} == {answer.status for answer in answers}


@gunicorn_drops_nothing
@pytest.mark.parametrize("keep_alive", [False, True])
def test_hup_fails_no_request(keep_alive: bool, tmp_path: Path) -> None:
    """While SIGHUP replaces the workers under load, every request is answered."""
    with gunicorn(tmp_path / "log", PROBE, *GEVENT) as server:
        with _load(server, keep_alive=keep_alive) as seen:
            server.until(lambda: len(seen.pids) == 1)
            (old,) = seen.pids
            server.signal(signal.SIGHUP)
            server.until(lambda: set(seen.pids) - {old} and not _alive(old))
            before = len(seen.answers)
            server.until(lambda: len(seen.answers) >= before + 100)
    assert not seen.failures()


@gunicorn_drops_nothing
def test_recycling_workers_fails_no_request(tmp_path: Path) -> None:
    """With max_requests, workers come and go, and every request is answered."""
    options = *GEVENT, "-w", "2", "--max-requests", "100"
    with gunicorn(tmp_path / "log", PROBE, *options) as server:
        with _load(server, keep_alive=False) as seen:
            server.until(lambda: len(seen.pids) >= 6)
    assert not seen.failures()


def test_a_killed_worker_takes_nothing_with_it(tmp_path: Path) -> None:
    """After kill -9 of one worker the other goes on, and another takes its place."""
    with gunicorn(tmp_path / "log", PROBE, *GEVENT, "-w", "2") as server:
        with _load(server, keep_alive=False) as seen:
            server.until(lambda: len(seen.pids) == 2)
            dead, other = seen.pids
            os.kill(dead, signal.SIGKILL)
            server.until(lambda: not _alive(dead))
            before = seen.pids[other]
            server.until(lambda: seen.pids[other] > before)
            server.until(lambda: len(seen.pids) == 3)
        # Only those that the dead one had may have failed.
        assert len(seen.failures()) <= CLIENTS
        answers = [each.result() for each in server.ask(_squares(20))]
    assert {200} == {answer.status for answer in answers}


def test_exit_in_a_handler_does_not_stop_the_worker(tmp_path: Path) -> None:
    """SystemExit in a handler on the pool is an error like others, logged once."""
    log = tmp_path / "ubatch.log"
    with gunicorn(tmp_path / "log", PROBE, *GEVENT, UBATCH_LOG=str(log)) as server:
        before = server.get("/seen").body["pid"]
        answer = server.get("/square?n=exit")
        assert (500, "HandlerExit") == (answer.status, answer.body["error"])
        answers = [each.result() for each in server.ask(_squares(20))]
        assert {before} == {answer.body["pid"] for answer in answers}
        noise = [line for line in server.log.splitlines() if not OUR_LINE.match(line)]
        errors = [line for line in server.get("/seen").body["lines"] if "ERROR" in line]
    assert not noise
    assert ["ERROR squares: a batch of 1 calls failed: HandlerExit"] == errors
    assert 1 == log.read_text().count("squares: a batch of 1 calls failed: HandlerExit")


@pytest.mark.parametrize("conf", ["conf", "hooked"])
def test_a_worker_that_a_handler_blocks_is_replaced(conf: str, tmp_path: Path) -> None:
    """gunicorn ends a worker whose inline handler holds the hub, and starts another."""
    options = *GEVENT, "--timeout", "1"
    with FileGate(tmp_path / "gate") as gate, gunicorn(
        tmp_path / "log", PROBE, *options, conf=conf, EXECUTOR="inline", BLOCK=gate.path
    ) as server:
        before = server.get("/square?n=2").body["pid"]
        (blocked,) = server.ask(["/square?n=block"])
        server.until(lambda: not _alive(before))
        answer = blocked.result()
        assert answer.status in (0, 500), answer  # cut off, or told why
        after = server.get("/square?n=3")
        # It did not swallow the abort, to live on with what had blocked it.
        server.until(lambda: f"(pid:{before}) exited with code 1" in server.log)
    assert (200, 9) == (after.status, after.body["result"])
    assert before != after.body["pid"]


@pytest.mark.parametrize("preload", [[], ["--preload"]])
def test_the_flask_example_of_0_0_2_runs(preload: list[str], tmp_path: Path) -> None:
    """What ubatch 0.0.2's README shows for gunicorn works, also preloaded."""
    options = *GEVENT, "-w", "2", *preload
    with gunicorn(tmp_path / "log", "tests.apps.readme:app", *options) as server:
        asked = server.ask(f"/predict?input={n},1,2" for n in range(100))
        answers = [each.result() for each in asked]
    assert [(200, [n + 3.0]) for n in range(100)] == [
        (answer.status, answer.body["prediction"]) for answer in answers
    ]


def readme_examples() -> Any:
    """Run the two thread examples of ubatch 0.0.2's README."""
    import threading

    from ubatch import UBatch, ubatch_decorator

    class Squared:
        def in_batch(self, data_inputs: list[int]) -> list[int]:
            return [x**2 for x in data_inputs]

    squared = Squared()

    squared_batch: UBatch[int, int] = UBatch(max_size=100, timeout=0.02)
    squared_batch.set_handler(handler=squared.in_batch)
    squared_batch.start()

    printed: list[list[int]] = []

    @ubatch_decorator(max_size=5, timeout=0.01)
    def squared_5(a: list[int]) -> list[int]:
        printed.append(a)
        return [x**2 for x in a]

    inputs = list(range(10))

    # Run squared as usual
    assert squared_5(inputs) == [x**2 for x in inputs]
    assert printed.pop() == inputs

    found: list[tuple[int, int, int]] = []

    def thread_function(number: int) -> None:
        result = squared_batch.ubatch(number)
        found.append((number, result, squared_5.ubatch(number)))

    threads = []
    for i in inputs:
        t = threading.Thread(target=thread_function, args=(i,))
        threads.append(t)
        t.start()

    for t in threads:
        t.join()
    return sorted(found), sorted(sum(printed, [])), max(map(len, printed))


def test_the_thread_examples_of_0_0_2_run() -> None:
    """What ubatch 0.0.2's README shows for threads works."""
    found, printed, largest = run(readme_examples)
    assert [[n, n * n, n * n] for n in range(10)] == found
    assert list(range(10)) == printed
    assert largest <= 5


CLIENTS = 8


class _Seen:
    """What the load brought back."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.pids: Counter[int] = Counter()
        self.enough = False

    def add(self, answer: Answer) -> None:
        self.answers.append(answer)
        if answer.status == 200:
            self.pids[answer.body["pid"]] += 1

    def failures(self) -> dict[Any, int]:
        """Return what went wrong, and how often."""
        return Counter(
            f"{answer.status} {answer.body}"
            for answer in self.answers
            if answer.status != 200
        )


@contextmanager
def _load(server: Server, *, keep_alive: bool) -> Iterator[_Seen]:
    """Keep some clients asking, one request after another each."""
    seen = _Seen()

    def ask_with(get: Callable[[str], Answer], first: int) -> None:
        number = first
        while not seen.enough:
            answer = get(f"/square?n={number}")
            assert answer.status != 200 or answer.body["result"] == number * number
            seen.add(answer)
            number += CLIENTS

    def client(first: int) -> None:
        if not keep_alive:
            ask_with(server.get, first)
            return
        with Client(server.port) as connection:
            ask_with(connection.get, first)

    clients = [server.run(client, number) for number in range(CLIENTS)]
    try:
        yield seen
    finally:
        seen.enough = True
        for each in clients:
            each.result()


def _squares(count: int) -> list[str]:
    return [f"/square?n={number}" for number in range(count)]


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
