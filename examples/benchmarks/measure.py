"""How is a benchmark run? Every system once per repeat, each in a child process.

The order is rotated from repeat to repeat, so that no system always follows the same
one, or always runs when the machine is warm. A child that fails or takes too long makes
its cells failed, with the reason; a system that cannot be installed is missing. Neither
ends the run.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from environments import Missing, last_line, python_for, variables
from registry import Benchmark
from results import Result
from systems import System

CHILD = Path(__file__).resolve().with_name("child.py")


@dataclass
class Seen:
    """What the children have told so far."""

    values: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def note(self, key: str, found: dict[str, Any]) -> None:
        """Add one cell of one repeat."""
        if "failed" in found:
            self.failed.setdefault(key, []).append(found["failed"])
        for name, value in found.get("metrics", {}).items():
            self.values.setdefault(key, {}).setdefault(name, []).append(value)


def measure(
    benchmark: Benchmark, systems: Sequence[System], repeats: int, quick: bool = False
) -> Result:
    """Run a benchmark and return its result. Takes minutes."""
    repeats = min(repeats, benchmark.most_repeats)
    parameters = {**benchmark.full, **(benchmark.quick if quick else {})}
    started, load_before, seen = time.time(), os.getloadavg(), Seen()
    pythons, missing = _pythons(benchmark, systems)
    able = [system for system in systems if system.name in pythons]
    turns = [system for n in range(repeats) for system in _rotated(able, n)]
    with tqdm(turns, desc=benchmark.name, unit="run", disable=None) as bar:
        for system in bar:
            bar.set_postfix_str(system.name)
            _run(benchmark, system, pythons[system.name], parameters, seen)
    data = {
        "benchmark": benchmark.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "versions": _merged(seen.versions),
        "machine": machine(),
        "load": {"before": load_before, "after": os.getloadavg()},
        "seconds": round(time.time() - started, 1),
        "repeats": repeats,
        "quick": quick,
        "parameters": parameters,
        "missing": missing,
        "cells": [
            {"system": system.name, **cell, **_summary(_key(system, cell), seen)}
            for system in able
            for cell in benchmark.cells(system, parameters)
        ],
    }
    return Result(data)


def machine() -> dict[str, Any]:
    """Describe where this runs, without its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def _pythons(
    benchmark: Benchmark, systems: Iterable[System]
) -> tuple[dict[str, str], dict[str, str]]:
    pythons, missing = {}, {}
    for system in systems:
        try:
            found = python_for(system.environment, benchmark.requirements)
            pythons[system.name] = found
        except Missing as reason:
            missing[system.name] = str(reason)
            print(f"{system.name} is missing: {reason}", file=sys.stderr)
    return pythons, missing


def _rotated(systems: list[System], by: int) -> list[System]:
    by = by % len(systems) if systems else 0
    return systems[by:] + systems[:by]


def _run(
    benchmark: Benchmark, system: System, python: str, parameters: Any, seen: Seen
) -> None:
    """Run one child; note its cells, and as failed those that it did not tell."""
    command = [python, str(CHILD), benchmark.name, system.name, json.dumps(parameters)]
    lines, reason = _output(command, system, benchmark.limit)
    told = set()
    for line in lines:
        if "versions" in line:
            seen.versions[system.name] = line["versions"]
        else:
            key = _key(system, line["cell"])
            told.add(key)
            seen.note(key, line)
    for cell in benchmark.cells(system, parameters):
        key = _key(system, cell)
        if key not in told:
            seen.note(key, {"failed": reason or "told nothing"})


def _output(
    command: list[str], system: System, limit: float
) -> tuple[list[dict[str, Any]], str]:
    """Run a command; return its whole lines of JSON, and why it failed, or ""."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=variables(system.environment),
            start_new_session=True,
        )
        try:
            status = child.wait(limit)
            reason = ""
        except subprocess.TimeoutExpired:
            status, reason = None, f"not done within {limit:g} s"
        finally:
            _end(child)
        out.seek(0), err.seek(0)
        if status:
            reason = last_line(err.read()) or f"exit status {status}"
        whole = [line for line in out if line.endswith("\n")]
    return [json.loads(line) for line in whole], reason


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what the child started too."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def _key(system: System, cell: Any) -> str:
    return json.dumps([system.name, sorted(cell.items())])


def _summary(key: str, seen: Seen) -> dict[str, Any]:
    """Return a cell's figures, and the last reason of those repeats that failed."""
    summary: dict[str, Any] = {"metrics": {}}
    for name, values in seen.values.get(key, {}).items():
        known = [value for value in values if value is not None]
        summary["metrics"][name] = {
            "median": median(known) if known else None,
            "min": min(known, default=None),
            "max": max(known, default=None),
            "values": values,
        }
    if key in seen.failed:
        summary["failed"] = seen.failed[key][-1]
        summary["failures"] = len(seen.failed[key])
    return summary


def _merged(versions: dict[str, dict[str, str]]) -> dict[str, str]:
    """Ours, with the rivals' own by the names of their systems."""
    merged: dict[str, str] = {}
    for name, found in versions.items():
        kind = name.partition(":")[0]
        for package, version in found.items():
            if package in ("python", "gevent", "greenlet"):
                merged.setdefault(package, version)
            elif kind != "floor":
                ours = "ours" if kind.startswith(("ours-", "linger")) else kind
                merged[ours if package == "ubatch" else package] = version
    return merged
