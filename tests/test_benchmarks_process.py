"""Does the benchmark `process` run, and judge right?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from tests.children import PATIENCE, ROOT, environment, once, run

pytestmark = once

BENCHMARKS = ROOT / "examples" / "benchmarks"
IMPORTS = {"PYTHONPATH": f"{ROOT}:{BENCHMARKS}"}

# Shares of a core: server, queued, busy, handler, generator; then what the model
# process uses, and for how long it has no core, and the same of the model server.
LOADS = {
    "HTTP cannot send more": ((0.97, 0.0, 0.6, 0.5, 0.1, 0.55), "HTTP"),
    "the model cannot answer more": ((0.6, 0.0, 0.95, 0.9, 0.1, 0.96), "handler"),
    "both at their limit": ((0.9, 0.0, 0.9, 0.8, 0.1, 0.88), "HTTP"),
    "it passes on no more": (
        (0.5, 0.0, 0.5, 0.4, 0.1, 0.5, 0.0, 0.9, 0.0),
        "model server",
    ),
    "a handler that waits": ((0.1, 0.0, 0.95, 0.02, 0.1, 0.05), "handler"),
    "nobody asks": ((0.1, 0.0, 0.2, 0.2, 0.1, 0.2), "waiting"),
    "the server has no core": ((0.6, 0.3, 0.5, 0.4, 0.1, 0.5), "cores"),
    "the model has no core": ((0.6, 0.0, 0.9, 0.6, 0.1, 0.6, 0.3), "cores"),
    "wrk cannot ask faster": ((0.9, 0.0, 0.9, 0.8, 0.9, 0.9), "generator"),
}


@pytest.mark.parametrize("load, expected", LOADS.values(), ids=LOADS)
def test_what_binds_is_told_where_the_handler_has_a_process(
    load: tuple[float, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model uses is not the server's: each has a core, or lacks one."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from serve_rules import Load, binding

    assert binding(Load(*load)) == expected


def test_what_a_model_process_uses_is_told_apart() -> None:
    """It is per call, times calls per second, as what the server uses is."""

    def work_out() -> Any:
        from serve_server import Usage, figures, load_of

        answer = {"answered": 100, "seconds": 1.0}
        waits = dict.fromkeys(("p50", "p90", "p99", "max"), 0.1)
        did = {"batches": 20, "calls": 200, "seconds": 1.0, "cpu_seconds": 0.8}
        model = {"model": Usage(1.2, 1.2, 0.2)}
        found = figures({**answer, **waits}, did, Usage(0.8, 0.6, 0.0), 0.1, model)
        return found, load_of(found).model_cpu

    found, model_cpu = run(work_out, env=IMPORTS)

    assert found["server_cpu"] == pytest.approx(0.4)
    assert found["model_cpu"] == model_cpu == pytest.approx(0.6)
    assert found["model_queued"] == pytest.approx(0.1)


def test_notes_of_all_processes_are_added_up(tmp_path: Path) -> None:
    """What handlers note is read while they run, from every process that has one."""

    def write_and_read(home: str) -> Any:
        import os
        from pathlib import Path

        os.environ["BENCH_HOME"] = home
        import serve_notes

        notes = serve_notes.Notes()
        notes.add(3, 0.5, 0.25)
        notes.add(1, 0.5, 0.25)
        folder = Path(home, "notes")
        os.link(folder / str(os.getpid()), folder / "1")
        return serve_notes.read(folder), len(serve_notes.pids(folder))

    found, processes = run(write_and_read, str(tmp_path), env=IMPORTS)

    assert processes == 2
    assert found == {"batches": 4, "calls": 8, "seconds": 2.0, "cpu_seconds": 1.0}


def test_aims_are_judged_by_the_slower_of_greenlets_and_threads() -> None:
    """Ratios are ours over theirs or theirs over ours, so that less is better."""

    def judge() -> Any:
        from process_report import aims
        from results import Result

        def cell(system: str, metrics: dict[str, float], **keys: Any) -> Any:
            summed = {name: {"median": value} for name, value in metrics.items()}
            return {"system": system, **keys, "metrics": summed}

        server = {"part": "server", "connections": 64, "route": "/predict"}
        trip = {"part": "trip", "payload": "16 rows"}
        bursts = {"part": "workers", "load": "bursts of 20", "workers": 2}
        cells = [
            cell("ubatch-0.0.2:gevent", {"requests_per_second": 50.0}, **server),
            cell("ours-process:gevent", {"requests_per_second": 100.0}, **server),
            cell("ours-process:gevent", {"added_seconds": 1e-4}, **trip),
            cell("ours-process:thread", {"added_seconds": 3e-4}, **trip),
            cell("ours:gevent:threadpool", {"mean_batch": 10.0}, **bursts),
            cell("ours-server:gevent", {"mean_batch": 20.0}, **bursts),
        ]
        found = aims(Result({"cells": cells}))
        return {aim.text: (aim.measured, aim.verdict) for aim in found}

    found = run(judge, env=IMPORTS)

    rate = found["64 connections: 0.0.2's requests/s over process"]
    assert rate == [0.5, "met"] or rate == (0.5, "met")
    assert found["ours-process, 16 rows: added"][0] == pytest.approx(300)
    assert found["ours-server, 16 rows: added"][1] == "not measured"
    assert found["bursts of 20: mean batch, in each worker over one for all"][0] == 0.5


@pytest.mark.server
@pytest.mark.timeout(200)
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no model processes here")
def test_process_measures_processes_and_servers(tmp_path: Path) -> None:
    """A try-out of ours ends with all tables, and no cell fails."""
    if which("wrk") is None:
        pytest.skip("wrk is not installed")
    ended = subprocess.run(
        [
            *(sys.executable, BENCHMARKS / "process.py", "--quick", "--repeats", "1"),
            *("--systems", "ours-process:gevent,ours-server:gevent"),
            *("--results", tmp_path),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )

    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "process.json").read_text())
    assert [cell for cell in result["cells"] if "failed" in cell] == []
    medians = [
        (cell["system"], cell["part"], {k: v["median"] for k, v in found.items()})
        for cell in result["cells"]
        if (found := cell["metrics"])
    ]
    for system, part, found in medians:
        if part == "server":
            assert found["mean_batch"] > 1
            assert ("model_cpu" in found) == system.startswith("ours-")
            assert ("model_server_cpu" in found) == system.startswith("ours-server")
        if part == "memory":
            assert found["all"] >= found["server"] > 0
    table = (tmp_path / "TABLES.rst").read_text()
    for text in "ours-process", "64 pictures back", "one for all", "heartbeat":
        assert text in table
