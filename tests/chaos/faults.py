"""What befalls the server, and when? A seed says so; the same seed says the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from tests.chaos.journal import Journal
from tests.children import Server

KINDS = ("hup", "term", "kill", "memory")
EVERY = 2.5
"""Seconds between two, on average; one that ends a worker waits until two are up."""

ALIVE = 1.0
"""Seconds after its last pulse for which a worker is taken to be up."""

MEMORY = "held = bytearray(b'x') * 300_000_000; import time; time.sleep(1.0)"


class Planned(NamedTuple):
    """One fault to come."""

    at: float
    kind: str
    victim: int
    """Which of the workers, if it is only one."""


class Done(NamedTuple):
    """One fault that came."""

    at: float
    kind: str
    pids: list[int]
    """The workers that it ends."""


def schedule(seed: str, seconds: float) -> Iterator[Planned]:
    """Return what is to come; of each kind as many, in a random order."""
    random = Random(seed)
    at = random.uniform(0.4, 0.8) * EVERY
    while True:
        for kind in random.sample(KINDS, len(KINDS)):
            if at >= seconds:
                return
            yield Planned(at, kind, random.randrange(2))
            at += random.uniform(0.5, 1.5) * EVERY


class Trouble:
    """Makes the faults."""

    def __init__(self, server: Server, journal: Journal) -> None:
        self._server = server
        self._journal = journal
        self._doomed: set[int] = set()
        self._eaters: list[subprocess.Popen[bytes]] = []
        self.done: list[Done] = []

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
            self.done.append(Done(time.monotonic(), "memory", []))
            return True
        workers = self.up()
        if len(workers) != 2:
            return False
        victims = workers if planned.kind == "hup" else [workers[planned.victim]]
        self._doomed.update(victims)
        # Noted before it happens: nobody can be lost to it any sooner.
        self.done.append(Done(time.monotonic(), planned.kind, victims))
        if planned.kind == "hup":
            self._server.signal(signal.SIGHUP)
        else:
            number = signal.SIGTERM if planned.kind == "term" else signal.SIGKILL
            os.kill(victims[0], number)
        return True

    def kills(self) -> dict[int, float]:
        """Return which workers were killed with ``kill -9``, and when."""
        return {one.pids[0]: one.at for one in self.done if one.kind == "kill"}

    def end(self) -> None:
        """Wait for what was started here."""
        for eater in self._eaters:
            eater.wait()
