"""Can the benchmarks be run, and do they tell of what failed?

What they measure is not looked at: that would be a test of the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.children import PATIENCE, ROOT, environment, once

pytestmark = once

BENCHMARKS = ROOT / "examples" / "benchmarks"
PROGRAMS = sorted(
    path.name
    for path in BENCHMARKS.glob("*.py")
    if "BENCHMARK = Benchmark(" in path.read_text()
)
FIELDS = {
    *("benchmark", "date", "versions", "machine", "load", "seconds", "repeats"),
    *("quick", "parameters", "missing", "cells"),
}

BROKEN = """
import threading

from registry import Benchmark


def measure(system, cell, parameters):
    if cell["how"] == "raises":
        raise ValueError("no good")
    if cell["how"] == "dies":
        raise SystemExit("gone")
    if cell["how"] == "hangs":
        threading.Event().wait()
    return {"figure": 1.0}


BENCHMARK = Benchmark(
    name="broken",
    question="What fails?",
    systems=("floor",),
    cells=lambda system, parameters: [{"how": h} for h in parameters["how"]],
    measure=measure,
    table=lambda result: "",
    plot=lambda result, figure: None,
)
"""
"""A benchmark of which cells fail, in each of the ways there are."""

MEASURE = """
import dataclasses
import json
import sys
from pathlib import Path

import environments
from broken import BENCHMARK
from measure import measure
from systems import SYSTEMS

environments.FOLDER = Path(sys.argv[1])
absent = environments.Environment("absent", ("./no-such-package",), "absent")
good = SYSTEMS["floor:call"]
bad = dataclasses.replace(good, name="rival:call", environment=absent)
cells, repeats, systems, limit = json.loads(sys.argv[2])
wanted = dataclasses.replace(BENCHMARK, full={"how": cells}, limit=limit)
print(json.dumps(measure(wanted, [good, bad][:systems], repeats).data))
"""

LINGERS = ["linger:now", "linger:settle", "linger:full", "linger:adaptive"]
LINGER = """
import dataclasses
import json
import sys

from linger import BENCHMARK
from measure import measure
from systems import selected

loads = {"closed": [], "poisson": [], "burst": [], **json.loads(sys.argv[1])}
quick = dataclasses.replace(BENCHMARK, quick={**BENCHMARK.quick, **loads})
result = measure(quick, selected(quick.systems), 1, quick=True)
print(json.dumps([result.data, quick.table(result)]))
"""
"""A quick run of some loads."""


@pytest.mark.parametrize("program", ["", *PROGRAMS])
def test_every_program_tells_how_it_is_used(program: str) -> None:
    """``--help`` of each benchmark, and of all together, says what it measures."""
    ended = _run(BENCHMARKS / program, "--help")

    assert (ended.returncode, ended.stderr) == (0, "")
    for name in [program] if program else PROGRAMS:
        assert f"  {name.removesuffix('.py')} " in ended.stdout


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["nothing"], "no benchmark 'nothing'; there are cost, "),
        (["cost", "--systems", "nobody"], "no system 'nobody'; there are ours:gevent"),
    ],
    ids=["benchmark", "system"],
)
def test_a_wrong_name_is_answered_with_the_right_ones(
    wrong: list[str], message: str
) -> None:
    """A name that is not known ends the program with one line that lists them."""
    ended = _run(BENCHMARKS, *wrong)

    assert ended.returncode == 1
    assert ended.stderr.startswith(message)
    assert len(ended.stderr.splitlines()) == 1


def test_a_quick_run_leaves_a_result_a_table_and_a_plot(tmp_path: Path) -> None:
    """What is measured is written with its conditions, and reported twice alike."""
    chosen = ["--systems", "ours,floor", "--results", str(tmp_path)]
    ended = _run(BENCHMARKS, "cost", "--quick", "--repeats", "1", *chosen)
    assert ended.returncode == 0, ended.stderr

    result = json.loads((tmp_path / "cost.json").read_text())
    assert set(result) == FIELDS
    assert {"python", "gevent", "greenlet", "ours"} <= set(result["versions"])
    assert {"ours:gevent:inline", "floor:waiter"} <= {
        cell["system"] for cell in result["cells"]
    }
    for cell in result["cells"]:
        assert "failed" not in cell
        for figures in cell["metrics"].values():
            assert figures["values"] == [figures["median"]]
            assert figures["min"] <= figures["median"] <= figures["max"]

    table, plot = tmp_path / "TABLES.rst", tmp_path / "cost.svg"
    assert table.read_text() in ended.stdout
    assert "ours:gevent:inline" in table.read_text()
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    before = table.read_bytes(), plot.read_bytes()
    again = f"import report, pathlib; report.report(pathlib.Path({str(tmp_path)!r}))"
    _python(again)
    assert before == (table.read_bytes(), plot.read_bytes())


def test_what_fails_is_named_with_its_reason_and_ends_nothing(tmp_path: Path) -> None:
    """A cell that raises fails alone; a child that dies fails what it had not told."""
    hows = ["works", "raises", "works too", "dies", "lost"]
    cells = {cell["how"]: cell for cell in _broken(tmp_path, hows, repeats=2)["cells"]}

    for how in "works", "works too":
        assert cells[how]["metrics"]["figure"]["values"] == [1.0, 1.0]
        assert "failed" not in cells[how]
    assert cells["raises"]["failed"] == "ValueError: no good"
    assert cells["dies"]["failed"] == cells["lost"]["failed"] == "SystemExit: gone"
    assert all(cells[how]["failures"] == 2 for how in ("raises", "dies", "lost"))
    assert not any(cells[how]["metrics"] for how in ("raises", "dies", "lost"))


def test_a_child_that_hangs_is_ended_and_what_it_told_is_kept(tmp_path: Path) -> None:
    """After its time limit a child is killed; its cell says so."""
    works, hangs = _broken(tmp_path, ["works", "hangs"], limit=2.0)["cells"]

    assert works["metrics"]["figure"]["values"] == [1.0]
    assert hangs["failed"] == "not done within 2 s"


def test_what_cannot_be_installed_is_missing_with_its_reason(tmp_path: Path) -> None:
    """A rival that pip refuses has no cells, and the others are measured."""
    result = _broken(tmp_path, ["works"], systems=2)

    assert [cell["system"] for cell in result["cells"]] == ["floor:call"]
    assert list(result["missing"]) == ["rival:call"]
    assert "no-such-package" in result["missing"]["rival:call"]


def test_every_linger_is_compared_with_the_others() -> None:
    """A closed loop is measured for the four lingers, and the default judged."""
    result, text = _linger(closed=[["threadpool", 2, 8, 0]])

    assert [cell["system"] for cell in result["cells"]] == LINGERS
    for cell in result["cells"]:
        assert "failed" not in cell
        assert 1 <= cell["metrics"]["mean_batch"]["median"] <= 8
        assert cell["metrics"]["p50_ms"]["median"] >= 2
    assert "2 ms, 8 clients, work 0 us" in text


@pytest.mark.server
def test_bursts_are_answered_by_every_linger() -> None:
    """A burst reaches gunicorn's workers, and its batches are told apart."""
    result, text = _linger(burst=[[2, 2]])

    for cell in result["cells"]:
        assert "failed" not in cell
        figures = {name: seen["median"] for name, seen in cell["metrics"].items()}
        assert 1 <= figures["calls_per_share"] <= figures["calls_per_burst"] <= 20
        assert figures["mean_batch"] * figures["calls_per_burst"] == pytest.approx(20)
    assert "2 ms, -w 2" in text


def _linger(**loads: list[Any]) -> tuple[dict[str, Any], str]:
    """Measure some loads of the benchmark of lingers; return result and tables."""
    found: dict[str, Any]
    found, text = json.loads(_python(LINGER, json.dumps(loads)))
    return found, text


def _broken(
    home: Path, cells: list[str], repeats: int = 1, systems: int = 1, limit: float = 30
) -> dict[str, Any]:
    """Measure the benchmark that fails; return its result."""
    (home / "broken.py").write_text(BROKEN)
    options = json.dumps([cells, repeats, systems, limit])
    found: dict[str, Any] = json.loads(_python(MEASURE, home, options, path=str(home)))
    return found


def _python(source: str, *args: str | Path, path: str = "") -> str:
    """Run Python code beside the benchmarks; return what it printed."""
    variables = {"PYTHONPATH": f"{BENCHMARKS}:{path}"}
    ended = subprocess.run(
        [sys.executable, "-c", source, *args],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def _run(program: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a program, and wait for its end."""
    return subprocess.run(
        [sys.executable, program, *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
