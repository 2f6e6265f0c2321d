"""How is a server of `serve` started, driven by wrk, and measured?

Runs in the environment of one system: imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

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
    """``"none"`` or ``"ubatch"``: whichever ubatch this environment holds."""
    options: tuple[tuple[str, Any], ...] = ()
    worker: str = "gevent"


class Usage(NamedTuple):
    """What the process has used so far."""

    cpu: float
    first_cpu: float
    first_queued: float


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
        super().__init__("serve_app:app", options, env)
        self._bodies = Path(self.home.name, "bodies")
        try:
            self._check_answers()
        except BaseException:
            self.close()
            raise

    def drive(self, path: str, connections: int, seconds: int) -> dict[str, float]:
        """Have wrk keep so many connections busy; return what was measured."""
        before, used = self._settled(), self._usage()
        answer, generator_cpu = self._wrk(path, connections, seconds)
        wrong = {k: answer[k] for k in ("refused", "broken", "timeouts") if answer[k]}
        if wrong:
            raise RuntimeError(f"{wrong} of {answer['answered']}; {self.last_words()}")
        after = self._settled()
        spent = [b - a for a, b in zip(used, self._usage())]
        did = {key: after[key] - before[key] for key in COUNTED}
        return figures(answer, did, Usage(*spent), generator_cpu)

    def _check_answers(self) -> None:
        """Ask for 32 pictures, 16 at a time: each gets its own digit. Warms up, too."""
        pictures = self.ask("/pictures")
        self._bodies.write_text("".join(f"{p['body']}\n" for p in pictures))
        with ThreadPoolExecutor(16) as pool:
            bodies = [picture["body"] for picture in pictures]
            answers = list(pool.map(lambda body: self.ask("/predict", body), bodies))
        wrong = sum(a["digit"] != p["digit"] for a, p in zip(answers, pictures))
        if wrong:
            raise RuntimeError(f"{wrong} of {len(answers)} got another's answer")

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

    def _settled(self) -> dict[str, Any]:
        """Return the counters once nothing is left to be done."""
        before: dict[str, Any] = self.ask("/stats")
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(0.03)
            after: dict[str, Any] = self.ask("/stats")
            if after["calls"] == before["calls"]:
                self._pid = after["pid"]
                return after
            before = after
        raise RuntimeError(f"still at work after {PATIENCE:.0f} s")

    def _usage(self) -> Usage:
        tasks = Path(f"/proc/{self._pid}/task")
        spent = {int(task.name): _schedstat(task) for task in tasks.iterdir()}
        return Usage(sum(cpu for cpu, _ in spent.values()), *spent[self._pid])


COUNTED = ("batches", "calls", "seconds", "cpu_seconds")


def figures(
    answer: Mapping[str, float],
    did: Mapping[str, float],
    used: Usage,
    generator_cpu: float,
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
    }


def load_of(metrics: Mapping[str, float]) -> Load:
    """Return what the rule of what binds wants to know."""
    return Load(**{key: metrics[key] for key in Load._fields})


def has_wrk() -> bool:
    """Tell whether the load generator is installed."""
    return shutil.which("wrk") is not None


def _schedstat(task: Path) -> tuple[float, float]:
    """Seconds that a thread had a core, and that it was ready and had none."""
    cpu, queued, _ = (task / "schedstat").read_text().split()
    return int(cpu) / 1e9, int(queued) / 1e9


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
