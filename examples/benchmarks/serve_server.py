"""How is a server of `serve` started, driven by wrk, and measured?

Runs in the environment of one system: imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import serve_notes
from serve_rules import Load
from servers import HERE, PATIENCE, Gunicorn

INSTALL = "serve needs wrk, which is not here; install it: apt install wrk"
WORKERS = {
    "gevent": ["-k", "gevent"],
    "gthread": ["-k", "gthread", "--threads", "64"],
}


class Config(NamedTuple):
    """Which server: what serve_app.py reads from the environment, and gunicorn's."""

    model: str
    batcher: str
    """A name of serve_app.BATCHERS; with ``"ubatch"`` it is whichever ubatch this
    environment holds."""
    options: tuple[tuple[str, Any], ...] = ()
    worker: str = "gevent"
    workers: int = 1


class Usage(NamedTuple):
    """What some processes have used so far, and the first thread of each."""

    cpu: float
    first_cpu: float
    first_queued: float

    def since(self, before: Usage) -> Usage:
        """Return what was used meanwhile."""
        return Usage(*(now - then for now, then in zip(self, before)))


class Server(Gunicorn):
    """A gunicorn of serve_app.py."""

    def __init__(self, config: Config) -> None:
        self.config = config
        env = {
            **os.environ,
            "BENCH_MODEL": config.model,
            "BENCH_BATCHER": config.batcher,
            "BENCH_OPTIONS": json.dumps(dict(config.options)),
        }
        options = [*WORKERS[config.worker], "-c", str(HERE / "serve_conf.py")]
        super().__init__("serve_app:app", options, env, workers=config.workers)
        self._bodies = Path(self.home.name, "bodies")
        self._notes = Path(self.home.name, "notes")
        self._pids: set[int] = set()  # of the workers
        try:
            self._check_answers()
        except BaseException:
            self.close()
            raise

    def drive(self, path: str, connections: int, seconds: int) -> dict[str, float]:
        """Have wrk keep so many connections busy; return what was measured."""
        before, used = self.settled(), self._usage()
        answer, generator_cpu = self._wrk(path, connections, seconds)
        wrong = {k: answer[k] for k in ("refused", "broken", "timeouts") if answer[k]}
        if wrong:
            raise RuntimeError(f"{wrong} of {answer['answered']}; {self.last_words()}")
        after, used_then = self.settled(), self._usage()
        did = {key: after[key] - before[key] for key in after}
        spent = {who: used_then[who].since(used[who]) for who in used}
        return figures(answer, did, spent.pop("server"), generator_cpu, spent)

    def processes(self) -> dict[str, set[int]]:
        """Return who is there, once each worker has been asked something.

        ``server``: gunicorn's workers. ``model``: the model process, if the handler has
        one. ``model_server``: what it belongs to, if that is no worker.
        """
        model = serve_notes.pids(self._notes) - self._pids
        above = {_parent(pid) for pid in model} - self._pids
        found = {"server": self._pids, "model": model, "model_server": above}
        return {who: pids for who, pids in found.items() if pids}

    def settled(self) -> dict[str, float]:
        """Return what the handlers have noted, once nothing is left to be done."""
        before = serve_notes.read(self._notes)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(0.03)
            after = serve_notes.read(self._notes)
            if after["calls"] == before["calls"]:
                return after
            before = after
        raise RuntimeError(f"still at work after {PATIENCE:.0f} s")

    def _check_answers(self) -> None:
        """Ask for each picture alone, then 16 at a time: the digits are the same.

        Warms up, too. Returns when all workers have been seen.
        """
        self._bodies.write_text("".join(f"{body}\n" for body in bodies()))
        alone = [self._digit(body) for body in bodies()]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(self._digit, bodies()))
        wrong = sum(a != b for a, b in zip(answers, alone, strict=True))
        if wrong:
            raise RuntimeError(f"{wrong} of {len(answers)} got another's answer")
        deadline = time.monotonic() + PATIENCE
        while len(self._pids) < self.config.workers:
            if time.monotonic() > deadline:
                raise RuntimeError(f"workers are missing; {self.last_words()}")
            self._pids.add(self.ask("/pid")["pid"])

    def _digit(self, body: str) -> int:
        digit: int = self.ask("/predict", body)["digit"]
        return digit

    def _wrk(
        self, path: str, connections: int, seconds: int
    ) -> tuple[dict[str, Any], float]:
        """Return the line that serve.lua prints, and wrk's share of a core."""
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout=30s"]
        command += [f"-s{HERE / 'serve.lua'}", f"http://127.0.0.1:{self.port}{path}"]
        before = _cpu_of_children()
        ended = subprocess.run(
            [*command, "--", str(self._bodies)],
            capture_output=True,
            text=True,
            timeout=seconds + PATIENCE,
        )
        if ended.returncode or not ended.stdout.endswith("}\n"):
            raise RuntimeError(f"wrk: {ended.stderr.strip() or ended.stdout.strip()}")
        answer = json.loads(ended.stdout.splitlines()[-1])
        return answer, (_cpu_of_children() - before) / answer["seconds"]

    def _usage(self) -> dict[str, Usage]:
        return {who: _usage_of(pids) for who, pids in self.processes().items()}


@cache
def bodies() -> list[str]:
    """Return what is posted; a process that imports the model's things tells."""
    command = [sys.executable, str(HERE / "serve_model.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: list[str] = json.loads(said)
    return found


def figures(
    answer: Mapping[str, float],
    did: Mapping[str, float],
    used: Usage,
    generator_cpu: float,
    others: Mapping[str, Usage] = MappingProxyType({}),
) -> dict[str, float]:
    """Put together what wrk saw, what the handler counted and what the system billed.

    The server's figures cover a little more than wrk's seconds: the answers that wrk
    did not wait for. So they are taken per call, times wrk's calls per second.
    """
    rate = answer["answered"] / answer["seconds"]
    calls = did["calls"] or answer["answered"]  # /echo calls no handler
    batches = did["batches"] or 1
    return {
        "requests_per_second": rate,
        "answered": answer["answered"],
        **{key: answer[key] for key in ("p50", "p90", "p99", "max")},
        "mean_batch": did["calls"] / batches,
        "handler_seconds": did["seconds"] / batches,
        "handler_cpu_seconds": did["cpu_seconds"] / batches,
        "handler_busy": did["seconds"] / calls * rate,
        "handler_cpu": did["cpu_seconds"] / calls * rate,
        "server_cpu": used.cpu / calls * rate,
        "server_queued": used.first_queued / calls * rate,
        "hub_cpu": used.first_cpu / calls * rate,
        "generator_cpu": generator_cpu,
        **{f"{who}_cpu": each.cpu / calls * rate for who, each in others.items()},
        **{
            f"{who}_queued": each.first_queued / calls * rate
            for who, each in others.items()
        },
    }


def load_of(metrics: Mapping[str, float]) -> Load:
    """Return what the rule of what binds wants to know."""
    return Load(**{key: metrics[key] for key in Load._fields if key in metrics})


def has_wrk() -> bool:
    """Tell whether the load generator is installed."""
    return shutil.which("wrk") is not None


def _usage_of(pids: Iterable[int]) -> Usage:
    found = []
    for pid in pids:
        tasks = Path(f"/proc/{pid}/task")
        spent = {int(task.name): _schedstat(task) for task in tasks.iterdir()}
        found.append((sum(cpu for cpu, _ in spent.values()), *spent[pid]))
    return Usage(*map(sum, zip(*found)))


def _parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/stat").read_text()
    return int(status.rpartition(")")[2].split()[1])


def _schedstat(task: Path) -> tuple[float, float]:
    """Seconds that a thread had a core, and that it was ready and had none."""
    cpu, queued, _ = (task / "schedstat").read_text().split()
    return int(cpu) / 1e9, int(queued) / 1e9


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
