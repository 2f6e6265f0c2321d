"""What befalls the server, and when? A seed says so; the same seed says the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from random import Random
from typing import NamedTuple

from tests.chaos.journal import Journal
from tests.chaos.losses import Loss, Losses
from tests.chaos.processes import children_of
from tests.children import Server

KINDS = ("hup", "term", "kill", "lose", "unserve", "memory")
"""SIGHUP for gunicorn; SIGTERM for a worker; ``kill -9`` of a worker, of a model
process, of the model server; 300 MB that somebody else takes."""

OFTEN = (*KINDS, "lose")
"""As often as each; a model process, which may have no batch, twice."""

EVERY = 1.6
"""Seconds between two, on average; one that ends a worker waits until two are up."""

SETTLED = 1.5
"""Seconds for which both have been up by then; on a busy machine they start slowly."""

ALIVE = 1.0
"""Seconds after its last pulse for which a worker is taken to be up."""

MEMORY = "held = bytearray(b'x') * 300_000_000; import time; time.sleep(1.0)"


class Planned(NamedTuple):
    """One fault to come."""

    at: float
    kind: str
    victim: int
    """Which of the processes that it may befall, if it is only one: any number."""


class Done(NamedTuple):
    """One fault that came."""

    at: float
    kind: str
    pids: list[int]
    """The processes that it ends."""


def schedule(seed: str, seconds: float) -> Iterator[Planned]:
    """Return what is to come, in a random order."""
    random = Random(seed)
    at = random.uniform(0.4, 0.8) * EVERY
    while True:
        for kind in random.sample(OFTEN, len(OFTEN)):
            if at >= seconds:
                return
            yield Planned(at, kind, random.randrange(100))
            at += random.uniform(0.5, 1.5) * EVERY


class Trouble:
    """Makes the faults."""

    def __init__(self, server: Server, journal: Journal) -> None:
        self._server = server
        self._journal = journal
        self._doomed: set[int] = set()
        self._eaters: list[subprocess.Popen[bytes]] = []
        self.done: list[Done] = []
        self.losses = Losses({}, {})

    def up(self) -> list[int]:
        """Return the workers that serve and have not been told to end."""
        self._journal.read()
        now = time.monotonic()
        pulses = self._journal.pulses.items()
        alive = {pid for pid, each in pulses if now - each[-1]["at"] < ALIVE}
        return sorted(alive - self._doomed)

    def make(self, planned: Planned) -> bool:
        """Make a fault; return False if it has to wait."""
        if planned.kind == "memory":
            self._eaters.append(subprocess.Popen([sys.executable, "-c", MEMORY]))
            self._note("memory", [])
            return True
        workers = self.up()
        if planned.kind == "lose":
            return self._lose(workers, planned.victim)
        if planned.kind == "unserve":
            return self._unserve()
        if len(workers) != 2 or not all(map(self._settled, workers)):
            return False
        one = workers[planned.victim % 2]
        victims = workers if planned.kind == "hup" else [one]
        self._doomed.update(victims)
        if planned.kind == "hup":
            self._note("hup", victims)
            self._server.signal(signal.SIGHUP)
        elif planned.kind == "term":
            self._note("term", victims)
            os.kill(one, signal.SIGTERM)
        else:
            models = children_of(one, "model")
            at = self._note("kill", victims)
            self.losses.models.update({pid: Loss(at, one) for pid in models})
            os.kill(one, signal.SIGKILL)
        return True

    def _settled(self, worker: int) -> bool:
        """Tell whether it has had time for those who waited at the door."""
        return time.monotonic() - self._journal.pulses[worker][0]["at"] > SETTLED

    def _lose(self, workers: list[int], victim: int) -> bool:
        """Kill a model process; two of three times one that has a batch."""
        owners = [*workers, *children_of(self._server.pid, "server")]
        models = {pid: of for of in owners for pid in children_of(of, "model")}
        if victim % 3:
            self._journal.read()  # to look took some time
            models = {pid: of for pid, of in models.items() if self._runs(pid)}
        if not models:
            return False
        pid = sorted(models)[victim // 3 % len(models)]
        at = self._note("lose", [pid])
        self.losses.models[pid] = Loss(at, models[pid])
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return True

    def _unserve(self) -> bool:
        """Kill the model server, once it has model processes that would be orphans."""
        for server in children_of(self._server.pid, "server"):
            if models := children_of(server, "model"):
                at = self._note("unserve", [server])
                self.losses.models.update({pid: Loss(at, server) for pid in models})
                self.losses.servers[server] = at
                os.kill(server, signal.SIGKILL)
                return True
        return False

    def _runs(self, pid: int) -> bool:
        last = [run for run in self._journal.runs.values() if run.pid == pid][-1:]
        return any(run.ended == inf for run in last)

    def _note(self, kind: str, pids: list[int]) -> float:
        """Note a fault before it happens: nobody can be lost to it any sooner."""
        at = time.monotonic()
        self.done.append(Done(at, kind, pids))
        return at

    def kills(self) -> dict[int, float]:
        """Return which workers were killed with ``kill -9``, and when."""
        return {one.pids[0]: one.at for one in self.done if one.kind == "kill"}

    def end(self) -> None:
        """Wait for what was started here."""
        for eater in self._eaters:
            eater.wait()
