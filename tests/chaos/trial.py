"""How is one trial run?

First all the faults; then a rest, and load again without those faults that end
processes, so that what one has grown by can be seen at the rest after it. Then gunicorn
is told to end, and nothing may be left of it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.chaos.client import Request
from tests.chaos.faults import Planned, Trouble, schedule
from tests.chaos.journal import HOME, Journal
from tests.chaos.ledger import Ledger
from tests.chaos.losses import orphans
from tests.chaos.plan import ALARM, KIND, socket_of
from tests.chaos.processes import look, of_trial, status
from tests.chaos.report import Rest, Row, rows
from tests.children import PATIENCE, ROOT, Server, environment

STORMY = 0.6
"""The share of the time in which processes are ended."""

IDLE = {"GEVENT_THREADPOOL_IDLE_TASK_TIMEOUT": "1"}
"""gevent ends a thread of the hub's pool after so many seconds; 5 by default."""

REST = 2.0
"""Seconds without a call after which a worker is at rest, and such threads are gone."""

GONE = 2.0
"""Seconds after gunicorn's end in which what was beside its workers is gone."""

Tell = Callable[[float], object]


class Result(NamedTuple):
    """What came of a trial."""

    rows: list[Row]
    guilty: list[str]


class Trial:
    """One server, and everything that befalls it."""

    def __init__(
        self, home: Path, kind: str, seed: int, rate: float, tell: Tell
    ) -> None:
        self._home = home
        self._kind = kind
        self._env = {HOME: str(home), KIND: kind, **IDLE}
        self._seed = seed
        self._rate = rate
        self._began = time.monotonic()
        self._tell = tell
        (home / "journal").unlink(missing_ok=True)
        self._journal = Journal(home)
        self._requests: list[Request] = []

    def run(self, seconds: float) -> Result:
        """Run it all; it takes some seconds more."""
        log = self._home / "log"
        alarm = f"{seconds + 5 * PATIENCE:.0f}"
        with Server(_gunicorn, log, **{ALARM: alarm}, **self._env) as server:
            trouble = Trouble(server, self._journal)
            self._until(lambda: len(trouble.up()) == 2)
            stormy = seconds * STORMY
            plan = list(schedule(f"{self._seed}", stormy))
            self._load(server, "storm", stormy, plan, trouble)
            before = self._rest(server, trouble)
            self._load(server, "calm", seconds - stormy, [], trouble)
            after = self._rest(server, trouble)
            trouble.end()
            server.signal(signal.SIGTERM)
            server.end()
            left = self._left()
        self._journal.close()
        journal, losses, kills = self._journal, trouble.losses, trouble.kills()
        runs = journal.runs.values()
        ledger = Ledger(self._requests, journal.begun, kills, runs, losses)
        hung = ledger.batches.hung(journal.pulses)
        bad = orphans(ledger.batches, losses, kills, journal.begun)
        rests = before, after
        return Result(
            rows(self._kind, ledger, trouble, hung, bad, rests, left), ledger.guilty()
        )

    def _load(
        self,
        server: Server,
        phase: str,
        seconds: float,
        plan: list[Planned],
        trouble: Trouble,
    ) -> None:
        """Have requests sent for so many seconds, and meanwhile make the faults."""
        path = self._home / phase
        command = [server.port, f"{self._seed}-{phase}", seconds, self._rate]
        command += [int(phase == "calm"), path]
        began, coming = time.monotonic(), list(plan)
        with subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.load", *map(str, command)],
            cwd=ROOT,
            env=environment(),
        ) as load:
            try:
                while load.poll() is None:
                    now = time.monotonic() - began
                    if now < seconds and coming and now >= coming[0].at:
                        if trouble.make(coming[0]):
                            del coming[0]
                    assert now < seconds + PATIENCE, "the load does not end"
                    self._journal.read()
                    self._tell(time.monotonic() - self._began)
                    time.sleep(0.05)
            finally:
                load.kill()
        assert load.returncode == 0, "the load failed"
        self._requests += map(_request, path.read_text().splitlines())

    def _rest(self, server: Server, trouble: Trouble) -> Rest:
        """Wait until nothing is done; return what there is then."""
        self._until(lambda: len(trouble.up()) == 2)
        quiet = time.monotonic()
        end = quiet + PATIENCE / 4
        while time.monotonic() < min(quiet + REST, end):
            self._tell(time.monotonic() - self._began)
            time.sleep(0.05)
            last = [self._journal.pulses[pid][-1] for pid in trouble.up()]
            if any(each["left"] or each["at_work"] or each["stuck"] for each in last):
                quiet = time.monotonic()
        home = f"{self._home}"
        seen = look(home, server.pid, trouble.up())
        return Rest(last, status(socket_of(home)), seen)

    def _left(self) -> int:
        """Return how many processes are left once gunicorn has ended."""
        end = time.monotonic() + GONE
        while left := len(list(of_trial(f"{self._home}"))):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        return left

    def _until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < deadline, "two workers never came up"
            self._tell(time.monotonic() - self._began)
            time.sleep(0.05)


def _gunicorn(listener: int) -> list[str]:
    command = [sys.executable, "-m", "gunicorn", "tests.chaos.app:app"]
    return [*command, "-b", f"fd://{listener}", "-c", f"{ROOT}/tests/chaos/conf.py"]


def _request(line: str) -> Request:
    return Request(**json.loads(line))
