"""Callers of one kind, who call for a while and pause to be counted.

``python -m tests.soak_child KIND PLACE SECONDS`` prints a line of JSON at each pause:
what was called so far, and what there is while nobody calls.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from random import Random
from typing import Any, cast

import gevent
import gevent.event
import psutil

from tests.chaos.plan import one_of
from tests.soak_handler import BRIEF, Failed
from tests.soak_places import WORKERS, Place, Soaked, place
from ubatch import BackendError, DeadlineExceeded, Future, WorkerLost
from ubatch.backends import BackendName
from ubatch.batch import Batch

CALLERS = 48
SHARES = {
    "fail": 0.05,
    "cancel": 0.08,  # of which some are answered before that
    "deadline": 0.03,
    "spoil": 0.0005,  # fails the run of all its batch
    "hang": 0.00003,  # runs past the limit
    "map": 0.01,
    "callback": 0.01,
    "foreign": 0.002,
    "life": 0.001,
}
"""What callers do, of all calls; the rest is plain."""

SLOWEST, QUICKEST = 3.0, 0.25
"""Seconds between two pauses, in a long run and in a short one."""

KILL_EVERY = 12.0
"""Seconds between two kills of a model process; in a short run, a third of it."""

PATIENCE = 60.0


GIVEN_UP = (DeadlineExceeded, BackendError)
"""What anybody may get: in the batch of one that hangs, or while all are stuck."""


class Soak:
    """A batcher and its callers."""

    def __init__(self, kind: BackendName, where: Place) -> None:
        self._kind = kind
        self._where = where
        self.batcher = where.soaked(kind)
        self.kills = 0
        self.lost = 0
        self.resting: set[int] = set()
        self.go = threading.Event() if kind == "thread" else gevent.event.Event()
        self.ended = False
        self.called_back = 0
        rarely = {kind: SHARES[kind] * where.slower for kind in ("hang", "life")}
        self._shares = {**SHARES, **rarely}
        quit_early = [self._cancel, self._cancel, self._stop_waiting]
        if kind == "gevent":
            quit_early += [self._kill, self._time_out]
        self._quit_early = quit_early
        foreign = self._from_a_thread if kind == "gevent" else self.batcher.ubatch
        self._ways: dict[str, Callable[[str], Any]] = {
            "deadline": self.batcher.with_options(deadline=2 * BRIEF).ubatch,
            "map": self._map,
            "callback": self._with_callback,
            "foreign": foreign,
            "life": self._in_a_life_of_its_own,
        }

    def call_on(self, number: int) -> None:
        """Call until the end: the life of one caller."""
        random = Random(number)
        while True:
            if not self.go.is_set():
                self.resting.add(number)
                self.go.wait()
                self.resting.discard(number)
            if self.ended:
                return
            self._call(random)

    def _call(self, random: Random) -> None:
        kind = one_of(random, self._shares) or "plain"
        item = f"{kind} {random.random()} ".ljust(100, "x")
        way = self._ways.get(kind, self.batcher.ubatch)
        if kind == "cancel":
            way = random.choice(self._quit_early)
        try:
            answer = way(item)
        except Failed:
            assert kind in ("fail", "spoil"), item
            return
        except GIVEN_UP as error:
            self._check_given_up(error)
            return
        assert answer in (None, item.upper()), (item, answer)

    def _cancel(self, item: str) -> None:
        future = self.batcher.submit(item)
        if future.cancel():
            try:
                future.result()
            except CancelledError:
                pass

    def _stop_waiting(self, item: str) -> Any:
        future = self.batcher.submit(item)
        try:
            return future.result(timeout=BRIEF)
        except TimeoutError:
            future.cancel()

    def _kill(self, item: str) -> None:
        caller = gevent.spawn(self.batcher.ubatch, item)
        gevent.sleep(0)
        caller.kill()

    def _time_out(self, item: str) -> Any:
        with gevent.Timeout(BRIEF, False):
            return self.batcher.ubatch(item)

    def _from_a_thread(self, item: str) -> Any:
        answers = gevent.get_hub().threadpool.apply(
            self.batcher.map, ([item],), {"return_exceptions": True}
        )
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    def _in_a_life_of_its_own(self, item: str) -> Any:
        """Have a new batcher answer, and stop or forget it."""
        batcher = self._where.brief(self._kind)
        answer = batcher.ubatch(item)
        if hash(item) % 2:
            batcher.stop()
        return answer

    def _map(self, item: str) -> None:
        items = [f"{number} {item}" for number in range(3)]
        answers = self.batcher.map(items, return_exceptions=True)
        for asked, answer in zip(items, answers):
            if isinstance(answer, Exception):
                self._check_given_up(answer)
            else:
                assert answer == asked.upper(), (asked, answer)

    def _with_callback(self, item: str) -> Any:
        def called_back(_: Future[Any]) -> None:
            self.called_back += 1

        future = self.batcher.submit(item)
        future.add_done_callback(called_back)
        return future.result()

    def foreign(self) -> int:
        """Return how many threads are there to call from: they come and go."""
        return gevent.get_hub().threadpool.size if self._kind == "gevent" else 0

    def kill(self) -> None:
        """Kill a model process, if there are any."""
        self.kills += 1  # before that: somebody may hear of it at once
        self.kills -= not self._where.kill()

    def _check_given_up(self, error: Exception) -> None:
        assert isinstance(error, GIVEN_UP), error
        if isinstance(error, WorkerLost):
            self.lost += 1
            assert self.kills and "had this call" in str(error), error
        elif isinstance(error, BackendError):
            assert "is stuck in the handler" in str(error), error


def run(kind: BackendName, where: Place, seconds: float) -> None:
    """Let the callers call for so many seconds, and count in the pauses."""
    logging.getLogger("ubatch").addHandler(logging.NullHandler())
    logging.getLogger("ubatch").propagate = False
    soak = Soak(kind, where)
    sleep = time.sleep if kind == "thread" else gevent.sleep
    _use_all_workers(soak.batcher, where, sleep)
    callers: list[Any] = []
    for number in range(CALLERS):
        if kind == "thread":
            callers.append(threading.Thread(target=soak.call_on, args=(number,)))
        else:
            callers.append(gevent.Greenlet(soak.call_on, number))
        callers[-1].daemon = True
        callers[-1].start()
    period = min(max(seconds / 100, QUICKEST), SLOWEST)
    began = time.monotonic()
    next_kill = kill_every = min(KILL_EVERY, seconds / 3)
    while (at := time.monotonic() - began) < seconds:
        soak.go.set()
        sleep(period / 2)
        if at > next_kill:
            soak.kill()
            next_kill = at + kill_every
        sleep(period / 2)
        soak.go.clear()
        _wait_for_rest(soak, where, sleep)
        print(json.dumps({**_count(soak, at), **where.count()}), flush=True)
    soak.ended = True
    soak.go.set()
    for caller in callers:
        caller.join(PATIENCE)
    soak.batcher.stop(PATIENCE)


def _use_all_workers(
    batcher: Soaked, where: Place, sleep: Callable[[float], object]
) -> None:
    """Have both workers hang, and those that replace them: all their threads are."""

    def put_one(item: str) -> Future[Any]:
        future = batcher.submit(item)
        while batcher.stats().pending:
            sleep(BRIEF)
        return future

    hanging = [put_one(f"hang {number}") for number in range(2 * WORKERS)]
    for number in range(where.strands):
        put_one(f"{number}")
    for future in hanging:
        assert isinstance(future.exception(), GIVEN_UP)


def _wait_for_rest(soak: Soak, where: Place, sleep: Callable[[float], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        seen = soak.batcher.stats()
        idle = not (seen.pending or seen.running or seen.stuck)
        if len(soak.resting) == CALLERS and idle:
            break
        assert (
            time.monotonic() < deadline
        ), f"{CALLERS - len(soak.resting)} hang: {seen}"
        sleep(0.005)
    gc.collect()
    sleep(0.05)  # for what is on its way: a callback, the end of a greenlet or a thread
    while not where.ready():
        assert time.monotonic() < deadline, f"not as there should be: {where.count()}"
        sleep(0.05)


def _count(soak: Soak, at: float) -> dict[str, float]:
    process, everything = psutil.Process(), gc.get_objects()
    seen = soak.batcher.stats()
    return {
        "at": at,
        "calls": seen.calls_total,
        "failed": seen.failures_total,
        "cancelled": seen.cancelled_total,
        "expired": seen.expired_total,
        "reruns": seen.reruns_total,
        "stuck": seen.stuck_total,
        "kills": soak.kills,
        "lost": soak.lost,
        "rss": process.memory_info().rss,
        "fds": process.num_fds(),
        "threads": process.num_threads() - soak.foreign(),
        "greenlets": sum(
            isinstance(each, gevent.Greenlet) and not each.dead for each in everything
        ),
        "batches": sum(isinstance(each, Batch) for each in everything),
        "futures": sum(isinstance(each, Future) for each in everything),
    }


if __name__ == "__main__":
    _, _kind, _place, _seconds = sys.argv
    with place(_place) as _where:
        run(cast(BackendName, _kind), _where, float(_seconds))
