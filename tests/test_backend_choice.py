"""Which backend does ``auto`` choose, wherever it may be asked?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.children import FileGate, Server, gunicorn, once, pywsgi, run

pytestmark = once

PROBE = "tests.apps.probe:app"

UNDER_A_HUB = "gevent", "the first caller is a greenlet under a hub"
NO_GEVENT = "thread", "gevent is not imported"
NO_HUB = "thread", "gevent is imported, but neither patches threading nor runs here"
PATCHED = "gevent", "threading is monkey-patched"

SERVERS = {
    "gevent": (["-k", "gevent"], UNDER_A_HUB),
    "gevent, preload": (["-k", "gevent", "-w", "2", "--preload"], UNDER_A_HUB),
    "gevent_pywsgi": (["-k", "gevent_pywsgi"], UNDER_A_HUB),
    "gevent_pywsgi, preload": (["-k", "gevent_pywsgi", "--preload"], UNDER_A_HUB),
    "gthread": (["-k", "gthread", "--threads", "32"], NO_GEVENT),
    "gthread, preload": (
        ["-k", "gthread", "--threads", "32", "-w", "2", "--preload"],
        NO_GEVENT,
    ),
}


@pytest.mark.server
@pytest.mark.parametrize("name", SERVERS)
def test_gunicorn_workers_choose_by_themselves(name: str, tmp_path: Path) -> None:
    """In a gunicorn worker the first call finds what the worker's kind is."""
    options, (backend, why) = SERVERS[name]
    workers = 2 if "-w" in options else 1
    with FileGate(tmp_path / "gate") as gate, gunicorn(
        tmp_path / "log", PROBE, *options, GATE=gate.path
    ) as server:
        for seen in _joined(server, gate, workers).values():
            _check(seen, backend, why)


@pytest.mark.server
@pytest.mark.parametrize("patch", [True, False])
def test_pywsgi_is_gevent_patched_or_not(patch: bool, tmp_path: Path) -> None:
    """Under gevent.pywsgi callers are greenlets, even if nothing is patched."""
    with FileGate(tmp_path / "gate") as gate, pywsgi(
        tmp_path / "log", PROBE, patch=patch, GATE=gate.path
    ) as server:
        (seen,) = _joined(server, gate, 1).values()
        _check(seen, *UNDER_A_HUB)


@pytest.mark.server
def test_a_sync_worker_has_threads_and_no_gevent(tmp_path: Path) -> None:
    """In a sync worker calls come one by one, and each is answered at once."""
    with gunicorn(tmp_path / "log", PROBE, "-k", "sync") as server:
        answers = [asked.result() for asked in server.ask(_paths(5))]
        assert [(200, n * n) for n in range(5)] == [
            (answer.status, answer.body["result"]) for answer in answers
        ]
        seen = server.get("/seen").body
    assert 5 == seen["batches"] == seen["results"]
    _check(seen, *NO_GEVENT)


@pytest.mark.server
def test_an_app_may_patch_before_the_fork(tmp_path: Path) -> None:
    """An app that patches by itself and is preloaded is like any other."""
    options = "-k", "gevent", "-w", "2", "--preload"
    with FileGate(tmp_path / "gate") as gate, gunicorn(
        tmp_path / "log", PROBE, *options, GATE=gate.path, PATCH="1"
    ) as server:
        for seen in _joined(server, gate, 2).values():
            _check(seen, *UNDER_A_HUB)


PATCH = "from gevent import monkey; monkey.patch_all()"
PATCH_BUT_THREADS = "from gevent import monkey; monkey.patch_all(thread=False)"
PATCH_SOCKETS = "from gevent import monkey; monkey.patch_socket()"

# What runs before the batcher is made and after it, who calls it, what comes of it.
PROCESSES = {
    "no gevent": ([], [], "threads", NO_GEVENT),
    "no gevent, one caller": ([], [], "main", NO_GEVENT),
    "gevent imported": (["import gevent.monkey"], [], "threads", NO_HUB),
    "gevent imported late": ([], ["import gevent"], "threads", NO_HUB),
    "gevent imported, one caller": (["import gevent"], [], "main", NO_HUB),
    "a hub, unused": (["import gevent; gevent.get_hub()"], [], "threads", NO_HUB),
    "threads not patched": ([PATCH_BUT_THREADS], [], "threads", NO_HUB),
    "only sockets patched": ([PATCH_SOCKETS], [], "threads", NO_HUB),
    "greenlets, unpatched": (["import gevent"], [], "greenlets", UNDER_A_HUB),
    "greenlets, no threads": ([PATCH_BUT_THREADS], [], "greenlets", UNDER_A_HUB),
    "patched": ([PATCH], [], "threads", UNDER_A_HUB),
    "imported, then patched": (["import ubatch", PATCH], [], "threads", UNDER_A_HUB),
    "made, then patched": ([], [PATCH], "threads", UNDER_A_HUB),
    "patched, one caller": ([PATCH], [], "main", PATCHED),
    "made, then patched, one caller": ([], [PATCH], "main", PATCHED),
}


def choose(before: list[str], after: list[str], callers: str) -> dict[str, Any]:
    """Make a batcher among some statements, have it called, tell what it chose."""
    import logging
    import sys

    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    logging.getLogger("ubatch").addHandler(Lines())
    logging.getLogger("ubatch").setLevel(logging.INFO)
    for statement in before:
        exec(statement)

    from ubatch import UBatch

    batches: list[list[int]] = []

    def handler(numbers: list[int]) -> list[int]:
        batches.append(numbers)
        return [number * number for number in numbers]

    count = 1 if callers == "main" else 20
    # A batch closes when it is full, and not before: they must all be in it.
    ub = UBatch(count, 3600.0, handler=handler, linger="full").start()
    assert ub.backend is None
    for statement in after:
        exec(statement)

    results: list[int] = []

    def call(number: int) -> None:
        results.append(ub.ubatch(number))

    if callers == "main":
        call(0)
    elif callers == "threads":
        from threading import Thread

        threads = [Thread(target=call, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        import gevent

        gevent.joinall([gevent.spawn(call, number) for number in range(count)])
    assert sorted(results) == [number * number for number in range(count)]
    return {
        "backend": ub.backend,
        "lines": lines,
        "gevent": "gevent" in sys.modules,
        "handled": [len(batch) for batch in batches],
    }


@pytest.mark.parametrize("name", PROCESSES)
def test_every_kind_of_process_gets_what_suits_it(name: str) -> None:
    """The first caller decides: greenlets or patched threads make it gevent."""
    before, after, callers, (backend, why) = PROCESSES[name]
    seen = run(choose, before, after, callers)
    _check(seen, backend, why)
    assert [1 if callers == "main" else 20] == seen["handled"]
    assert seen["gevent"] == (why != NO_GEVENT[1])  # nobody imported it to look


def test_the_environment_overrides_auto() -> None:
    """UBATCH_BACKEND decides where nobody else has, and the log says so."""
    for wanted in "thread", "gevent":
        seen = run(choose, [], [], "main", env={"UBATCH_BACKEND": wanted})
        _check(seen, wanted, "UBATCH_BACKEND says so")


def insist(statement: str, name: str) -> dict[str, Any]:
    """Call a batcher whose backend is *name*; tell what it was or how it failed."""
    exec(statement)
    from ubatch import BackendError, UBatch

    ub = UBatch(4, 0.01, handler=list, backend=name).start()  # type: ignore
    errors = []
    for _ in range(2):  # an error is no reason to hang the next time
        for call in ub.ubatch, ub.submit, lambda item: ub.map([item]):
            try:
                call(1)
            except BackendError as error:
                errors.append(str(error))
    ub.stop()
    return {"errors": errors, "backend": ub.backend}


def test_the_environment_overrides_nothing_but_auto() -> None:
    """A backend that the program names stays, whatever UBATCH_BACKEND says."""
    for mine, theirs in ("gevent", "thread"), ("thread", "gevent"):
        seen = run(insist, "pass", mine, env={"UBATCH_BACKEND": theirs})
        assert {"errors": [], "backend": mine} == seen


@pytest.mark.parametrize("by", ["name", "environment"])
def test_threads_are_refused_where_they_are_greenlets(by: str) -> None:
    """Backend "thread" in a patched process is an error with a remedy, at once."""
    name, env = (
        ("thread", {}) if by == "name" else ("auto", {"UBATCH_BACKEND": "thread"})
    )
    seen = run(insist, PATCH, name, env=env)
    assert seen["backend"] is None
    assert 6 == len(seen["errors"])
    for error in seen["errors"]:
        assert "native threads" in error
        assert "use backend='gevent' or 'auto'" in error


def test_the_environment_may_not_talk_nonsense() -> None:
    """A backend that does not exist is named, with those that do."""
    seen = run(insist, "pass", "auto", env={"UBATCH_BACKEND": "asyncio"})
    assert 6 == len(seen["errors"])
    expected = (
        "UBATCH_BACKEND='asyncio' names no backend; use one of auto, gevent, thread"
    )
    assert {expected} == set(seen["errors"])


def _joined(server: Server, gate: FileGate, workers: int) -> dict[int, dict[str, Any]]:
    """Have calls wait together, then be answered; return what each worker saw."""
    seen: dict[int, dict[str, Any]] = {}

    def look() -> bool:
        answer = server.get("/seen")
        assert answer.status == 200, answer
        seen[answer.body["pid"]] = answer.body
        return len(seen) == workers

    server.until(look)  # every worker is up
    asked = server.ask(_paths(24))
    server.until(lambda: look() and 24 == sum(s["waiting"] for s in seen.values()))
    gate.open()
    answers = [each.result() for each in asked]
    assert [(200, n * n) for n in range(24)] == [
        (answer.status, answer.body.get("result")) for answer in answers
    ]
    pids = {answer.body["pid"] for answer in answers}
    server.until(lambda: look() and not any(s["waiting"] for s in seen.values()))
    assert set(seen) >= pids
    for pid in pids:
        # The first batch was held, and the second grew until it was through.
        assert 1 <= seen[pid]["batches"] <= 2
    return {pid: seen[pid] for pid in pids}


def _check(seen: dict[str, Any], backend: str, why: str) -> None:
    """Check the choice, and that it is in the log once."""
    assert backend == seen["backend"]
    chosen = [line for line in seen["lines"] if "backend" in line]
    assert 1 == len(chosen), seen["lines"]
    assert chosen[0].startswith("INFO ")
    assert f": backend {backend} ({why}), executor threadpool, workers 1" in chosen[0]


def _paths(count: int) -> list[str]:
    return [f"/square?n={number}" for number in range(count)]
