"""Which processes does a server have, and what are they like?

Those of a trial are known by their environment, whoever their parents are by now.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import psutil

from tests.chaos.journal import HOME
from tests.children import ROOT, environment

PROGRAMS = {"model": "from ubatch.model import", "server": "from ubatch.cli import"}
"""What the command lines of the library's own processes say."""


class Figures(NamedTuple):
    """What one process has."""

    rss: int
    fds: int
    threads: int


class Look(NamedTuple):
    """What there is beside the workers, at one moment."""

    models: dict[int, Figures]
    servers: dict[int, Figures]
    strays: int
    """Processes that nobody wants any more: orphans, and those nobody waited for."""


def children_of(pid: int, what: str) -> list[int]:
    """Return the model processes of a process, or the model server of gunicorn's."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(pid).children()
        return sorted(each.pid for each in children if _runs(each, PROGRAMS[what]))
    return []


def look(home: str, master: int, workers: list[int]) -> Look:
    """Look at all the processes of a trial."""
    servers = children_of(master, "server")
    models = [pid for of in (*workers, *servers) for pid in children_of(of, "model")]
    ours = {each.pid: each for each in of_trial(home)}
    orphans = sum(
        pid != master and each.ppid() not in ours for pid, each in ours.items()
    )
    dead = sum(
        each.status() == psutil.STATUS_ZOMBIE
        for parent in (*workers, *servers)
        for each in psutil.Process(parent).children()
    )
    figures = _figures(models), _figures(servers)
    return Look(*figures, orphans + dead)


def of_trial(home: str) -> Iterator[psutil.Process]:
    """Return the processes that were started for a trial, and run."""
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if each.environ().get(HOME) == home:
                yield each


def status(socket: str) -> dict[str, Any]:
    """Return what a model server tells of itself; nothing if there is none."""
    command = [sys.executable, "-m", "ubatch", "status", socket]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    return json.loads(done.stdout) if done.returncode == 0 else {}


def _runs(each: psutil.Process, program: str) -> bool:
    with suppress(psutil.Error):
        return any(program in word for word in each.cmdline())
    return False


def _figures(pids: list[int]) -> dict[int, Figures]:
    found = {pid: psutil.Process(pid) for pid in pids}
    return {
        pid: Figures(each.memory_info().rss, each.num_fds(), each.num_threads())
        for pid, each in found.items()
    }
