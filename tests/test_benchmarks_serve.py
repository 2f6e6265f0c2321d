"""Do the benchmarks `stall` and `serve`, and the demonstration, run and judge right?"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from tests.children import PATIENCE, ROOT, environment, once, run

pytestmark = once

BENCHMARKS = ROOT / "examples" / "benchmarks"
IMPORTS = {"PYTHONPATH": f"{ROOT}:{BENCHMARKS}"}


def _run(
    name: str, *options: str | Path, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / name, *options],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("name", ["stall.py", "serve.py", "demo.py"])
def test_each_program_says_what_it_does(name: str) -> None:
    """``--help`` works without wrk and without an environment of others."""
    ended = _run(name, "--help", PATH="")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage: ")
    assert "?" in ended.stdout  # the question that it answers


# The rule of what binds. Shares of a core: server, queued, busy, handler, generator.

LOADS = {
    "one call after the other": ((1.0, 0.0, 0.94, 0.94, 0.01), "handler"),
    "a handler that waits": ((0.1, 0.0, 0.95, 0.02, 0.01), "handler"),
    "it polls": ((0.5, 0.0, 0.45, 0.45, 0.01), "waiting"),
    "nobody asks": ((0.0, 0.0, 0.0, 0.0, 0.0), "waiting"),
    "no core to be had": ((0.6, 0.4, 0.3, 0.2, 0.01), "cores"),
    "no model": ((1.0, 0.0, 0.0, 0.0, 0.07), "HTTP"),
    "a cheap model inline": ((0.98, 0.0, 0.06, 0.06, 0.06), "HTTP"),
    "a cheap model that waits for the GIL": ((0.95, 0.0, 0.4, 0.07, 0.06), "HTTP"),
    "two that fight": ((0.98, 0.0, 0.7, 0.4, 0.05), "GIL"),
    "sixty threads that fight": ((0.95, 0.3, 11.6, 0.9, 0.01), "GIL"),
    "inline": ((1.0, 0.0, 0.36, 0.36, 0.04), "turns"),
    "both at once, and HTTP is the slower": ((1.5, 0.0, 0.6, 0.6, 0.1), "HTTP"),
    "both at once, and the model is the slower": (
        (1.4, 0.0, 0.92, 0.9, 0.1),
        "handler",
    ),
    "wrk cannot ask faster": ((1.0, 0.0, 0.3, 0.3, 0.95), "generator"),
}


@pytest.mark.parametrize("load, expected", LOADS.values(), ids=LOADS)
def test_what_binds_is_told_from_the_shares(
    load: tuple[float, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of load, in made-up numbers, has its word."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from serve_rules import Load, binding

    assert binding(Load(*load)) == expected


def test_no_rate_is_better_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower of HTTP and handler binds; with one GIL their times add up."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from serve_rules import best_rate, best_rate_in_turns

    assert best_rate(1000.0, 64, 0.01) == 1000.0
    assert best_rate(10_000.0, 64, 0.01) == 6400.0
    assert best_rate_in_turns(1000.0, 10, 0.01) == pytest.approx(500.0)


def test_figures_are_per_call_times_calls_per_second() -> None:
    """What the server does after wrk has ended does not make it look busier."""

    def work_out() -> Any:
        from serve_server import Usage, figures

        answer = {"answered": 100, "seconds": 1.0}
        waits = dict.fromkeys(("p50", "p90", "p99", "max"), 0.1)
        # 160 calls: 60 of them were not waited for.
        did = {"batches": 16, "calls": 160, "seconds": 0.8, "cpu_seconds": 0.4}
        return figures({**answer, **waits}, did, Usage(1.6, 0.8, 0.0), 0.1)

    found = run(work_out, env=IMPORTS)

    assert (found["requests_per_second"], found["mean_batch"]) == (100, 10)
    assert found["handler_seconds"] == pytest.approx(0.05)
    assert found["handler_busy"] == pytest.approx(0.5)
    assert found["server_cpu"] == pytest.approx(1.0)


# The programs.


def test_stall_measures_a_handler_that_sleeps() -> None:
    """Both probes are measured beside a batcher that is kept busy."""

    def measure() -> Any:
        from gevent import monkey

        monkey.patch_all()
        from stall import POOL, measure
        from systems import SYSTEMS

        cell = {"handler": "sleep", "switch_interval": 0.005}
        return measure(SYSTEMS[POOL], cell, {"seconds": 0.2})

    found = run(measure, env=IMPORTS)

    assert found["handler_seconds"] >= 0.05
    for probe in "beat", "ping":
        quantiles = [found[f"{probe}_{name}"] for name in ("p50", "p90", "p99", "max")]
        assert quantiles == sorted(quantiles)


@pytest.mark.server
def test_serve_measures_a_server(tmp_path: Path) -> None:
    """A try-out of ours ends with a table of every cell and leaves no server."""
    if which("wrk") is None:
        pytest.skip("wrk is not installed")
    ended = _run(
        *("serve.py", "--quick", "--repeats", "1"),
        *("--systems", "ours:gevent:threadpool", "--results", tmp_path),
    )

    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "serve.json").read_text())
    for cell in result["cells"]:
        assert "failed" not in cell
        assert cell["metrics"]["mean_batch"]["median"] > 1
    assert "ours:threadpool" in (tmp_path / "TABLES.rst").read_text()


def test_serve_tells_who_lacks_wrk_to_install_it() -> None:
    """Without wrk it ends with one line that says what to do."""
    ended = _run("serve.py", "--quick", PATH="")

    assert ended.returncode == 1
    assert ended.stderr == (
        "serve needs wrk, which is not here; install it: apt install wrk\n"
    )


@pytest.mark.server
def test_the_demonstration_shows_fewer_calls_and_more_answers() -> None:
    """Batched, the model is called less often than it is asked; the table says so."""
    ended = _run("demo.py", "--only-ours", "--seconds", "0.3", "--users", "8")

    assert ended.returncode == 0, ended.stderr
    row = re.compile(r"(one call per request|ubatch, this one) .* (\d+) +\d+ ms$", re.M)
    calls = {way: int(number) for way, number in row.findall(ended.stdout)}

    assert calls["one call per request"] == 100
    assert calls["ubatch, this one"] < 100
    assert "times as many requests" in ended.stdout


@pytest.mark.server
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="not Linux")
def test_ctrl_c_ends_the_demonstration_and_its_servers() -> None:
    """It says that it was stopped, without a traceback, and nothing is left."""
    mark = f"DEMO={os.getpid()}-{id(object())}"
    demo = subprocess.Popen(
        [sys.executable, BENCHMARKS / "demo.py", "--only-ours"],
        env=environment(**dict([mark.split("=")])),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _until(lambda: any("demo_driver" in command for command in _marked(mark)))
        assert any("gunicorn" in command for command in _marked(mark))
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=PATIENCE)
    finally:
        demo.kill()
        demo.wait()

    assert (demo.returncode, errors) == (130, "\nstopped; nothing is left running\n")
    _until(lambda: not _marked(mark))


def _marked(mark: str) -> list[str]:
    """Return the command lines of the processes with *mark* in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().decode())
        except OSError:
            pass  # it has ended, or is not ours
    return found


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
