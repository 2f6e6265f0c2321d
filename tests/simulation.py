"""A hub, a worker and callers, on a clock of their own: which linger serves them best?

Simulated: a loop that takes turns, as libev does (what is ready when a turn begins is
served in that turn, one call after the other), callers that come by made-up arrivals,
and one worker whose handler takes ``fixed + size * each`` seconds beside the hub, or on
it. The end of a batch is noticed once a turn. What decides is the library's own
``decide()``, fed by its own ``Observer``; or the rule of a peer.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from ubatch.pace import Observer
from ubatch.policy import Linger, Look, Rules, decide

EMPTY_TURN = 5e-6
"""Seconds that a turn takes in which nothing is ready; about what libev needs."""

MAX_SIZE, TIMEOUT, EACH = 64, 0.02, 50e-6
QUIET_TURNS = 2


class Situation(NamedTuple):
    """What a rule is asked about: the open batch, while the worker is free."""

    now: float
    opened: float
    newest: float
    size: int
    quiet_turns: int
    joined: int


class Rule(Protocol):
    """Hears of batches, and closes them."""

    def opened(self, now: float) -> None: ...

    def closes(self, seen: Situation) -> bool: ...

    def outcome(
        self, size: int, began: float, beside: int, seen: Situation
    ) -> None: ...


class Ours:
    """What the library does with one of its lingers."""

    def __init__(self, linger: Linger, overlaps: bool = True) -> None:
        self._rules = Rules(MAX_SIZE, TIMEOUT, linger, QUIET_TURNS)
        self._overlaps = overlaps
        self._observer = Observer()

    def opened(self, now: float) -> None:
        self._observer.opened(now)

    def closes(self, seen: Situation) -> bool:
        joined, newest = seen.joined, seen.newest
        pace = self._observer.pace(joined, newest, seen.now, self._overlaps)
        age = seen.now - seen.opened
        look = Look(seen.size, age, seen.quiet_turns, True, False, pace)
        return decide(self._rules, look).reason is not None

    def outcome(self, size: int, began: float, beside: int, seen: Situation) -> None:
        now, joined, newest = seen.now, seen.joined, seen.newest
        self._observer.outcome(size, now - began, beside, joined, newest, now)


class BentoML:
    """Keep waiting while ``size * (age of the newest + tick + each) <= 0.95 * wait``.

    *wait* is how long the oldest call had waited at the last dispatches, on average,
    and *each* the slope of its line through their times: taken as known here.
    """

    TICK, DECAY, KEPT = 0.001, 0.95, 50

    def __init__(self) -> None:
        self._waits = [TIMEOUT]

    def opened(self, now: float) -> None:
        pass

    def closes(self, seen: Situation) -> bool:
        waited = sum(self._waits) / len(self._waits)
        price = seen.size * (seen.now - seen.newest + self.TICK + EACH)
        if seen.size < MAX_SIZE and price <= waited * self.DECAY:
            return False
        self._waits = [*self._waits, seen.now - seen.opened][-self.KEPT :]
        return True

    def outcome(self, size: int, began: float, beside: int, seen: Situation) -> None:
        pass


class AtOnce:
    """Go with what is there: TensorFlow's adaptive scheduler, and Clipper.

    The former adapts how many batches are in flight, which with one worker is one;
    the latter how large they may be, which soon is *max_size* where that is within its
    latency objective.
    """

    def opened(self, now: float) -> None:
        pass

    def closes(self, seen: Situation) -> bool:
        return True

    def outcome(self, size: int, began: float, beside: int, seen: Situation) -> None:
        pass


class Load(NamedTuple):
    """A handler, what a call costs the hub, and who calls."""

    name: str
    fixed: float
    work: float
    callers: Callable[[Simulation], None]
    new_connections: bool = False
    """Take one call a turn: what gunicorn does with new ones, with several workers."""


class Served(NamedTuple):
    """What came of it."""

    throughput: float
    median: float
    p99: float
    batches: int


class Simulation:
    """One run of a load under a rule."""

    def __init__(self, load: Load, rule: Rule, overlaps: bool = True) -> None:
        self.now = 0.0
        self.random = random.Random(1)
        self._load = load
        self._rule = rule
        self._overlaps = overlaps
        self._arrivals: list[tuple[float, int, Callable[[], None]]] = []
        self._waiting: list[tuple[float, float, Callable[[], None]]] = []
        self._running: list[tuple[float, float, Callable[[], None]]] = []
        self._began = self._ends = 0.0
        self._quiet = self._joined = self._joined_before = self._sequence = 0
        self._newest = 0.0
        self._ended: list[tuple[float, float]] = []  # when, and after how long
        self._closed: list[float] = []

    def arrive(self, when: float, answered: Callable[[], None]) -> None:
        """Have a call come in, and its caller called when it is answered."""
        self._sequence += 1
        heapq.heappush(self._arrivals, (when, self._sequence, answered))

    def run(self, seconds: float, warm: float) -> Served:
        """Simulate so many seconds; count those after *warm*."""
        self._load.callers(self)
        while self.now < seconds and self._turn():
            pass
        waits = sorted(wait for when, wait in self._ended if when > warm)
        return Served(
            len(waits) / (seconds - warm),
            waits[len(waits) // 2],
            waits[len(waits) * 99 // 100],
            sum(when > warm for when in self._closed),
        )

    def _turn(self) -> bool:
        if self._running or not self._waiting:  # idle till something happens
            upcoming = [self._arrivals[0][0]] if self._arrivals else []
            upcoming += [self._ends] if self._running else []
            if not upcoming:
                return False
            self.now = max(self.now, min(upcoming))
        began = self.now
        self.now += EMPTY_TURN
        if self._running and self._ends <= began:
            self._settle()
        before = self._joined
        while self._arrivals and self._arrivals[0][0] <= began:
            self._join(*heapq.heappop(self._arrivals))
            if self._load.new_connections:
                break
        self._quiet = 0 if self._joined > before else self._quiet + 1
        if self._waiting and not self._running:
            self._look()
        return True

    def _join(self, came: float, _: int, answered: Callable[[], None]) -> None:
        self.now += self._load.work
        self._newest = self.now
        self._joined += 1
        if len(self._waiting) % MAX_SIZE == 0:
            self._rule.opened(self.now)
        self._waiting.append((self.now, came, answered))

    def _look(self) -> None:
        seen = self._situation()
        full = seen.size >= MAX_SIZE or seen.now - seen.opened >= TIMEOUT
        if not full and not self._rule.closes(seen):
            return
        self._running = self._waiting[:MAX_SIZE]
        del self._waiting[:MAX_SIZE]
        self._began = self.now
        self._joined_before = self._joined
        self._closed.append(self.now)
        size = len(self._running)
        self._ends = self.now + self._load.fixed + size * EACH
        if not self._overlaps:
            self.now = self._ends

    def _settle(self) -> None:
        batch, self._running = self._running, []
        beside = self._joined - self._joined_before
        self._rule.outcome(len(batch), self._began, beside, self._situation())
        for _, came, answered in batch:
            self._ended.append((self.now, self.now - came))
            answered()

    def _situation(self) -> Situation:
        batch = self._waiting[:MAX_SIZE]
        opened = batch[0][0] if batch else self.now
        return Situation(
            self.now, opened, self._newest, len(batch), self._quiet, self._joined
        )


def closed(clients: int, away: float = 50e-6) -> Callable[[Simulation], None]:
    """Return callers that call again, *away* seconds after each answer or so."""

    def begin(simulation: Simulation) -> None:
        def call_again() -> None:
            pause = away * (0.5 + simulation.random.random())
            simulation.arrive(simulation.now + pause, call_again)

        for client in range(clients):
            simulation.arrive(client * 1e-5, call_again)

    return begin


def poisson(rate: float, seconds: float) -> Callable[[Simulation], None]:
    """Return callers who know nothing of each other: *rate* calls a second."""

    def begin(simulation: Simulation) -> None:
        when = 0.0
        while when < seconds:
            when += simulation.random.expovariate(rate)
            simulation.arrive(when, lambda: None)

    return begin


def bursts(size: int, every: float, seconds: float) -> Callable[[Simulation], None]:
    """Return callers of whom *size* come at once, *every* so many seconds."""

    def begin(simulation: Simulation) -> None:
        when = 0.0
        while when < seconds:
            for _ in range(size):
                simulation.arrive(when, lambda: None)
            when += every * (0.8 + 0.4 * simulation.random.random())

    return begin


def loads(seconds: float) -> Iterator[Load]:
    """Return loads of each kind, for handlers and hubs from cheap to dear."""
    for fixed in (0.002, 0.010, 0.020):
        for work in (3e-6, 100e-6, 400e-6):
            name = f"{fixed * 1e3:g} ms, {work * 1e6:g} us"
            for clients in (16, 64, 256):
                yield Load(f"{name}, {clients} clients", fixed, work, closed(clients))
            capacity = min(MAX_SIZE / (fixed + MAX_SIZE * EACH), 1 / work)
            for share in (0.3, 0.6, 0.9):
                calls = poisson(share * capacity, seconds)
                yield Load(f"{name}, Poisson at {share:.0%}", fixed, work, calls)
            calls = bursts(20, 0.1, seconds)
            yield Load(f"{name}, bursts", fixed, work, calls)
            yield Load(f"{name}, bursts of new ones", fixed, work, calls, True)
