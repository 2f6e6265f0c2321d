"""How is a batcher compared with the model?

After each step everything comes to rest: what is free to happen has happened, since
each handler is held until a step lets it end. So the model knows what should be there.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gevent
from gevent.event import Event
from gevent.threadpool import ThreadPool
from greenlet import greenlet
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from tests.bridge import Bridge, Link
from tests.conftest import PATCHED
from tests.ends import Call
from tests.fakes import Caller, Gate, HubGate, NativeCaller, World
from tests.lost import ModelElsewhere
from tests.model import Model
from tests.traces import Log, objects, open_files, processes
from tests.watched import Answer, Held, Item, Mapped
from ubatch import Future, ProcessExecutor, UBatch
from ubatch.backends.thread import ParkedThread
from ubatch.batch import Batch as RealBatch
from ubatch.collector import Collector

PATIENCE = 10.0
"""Seconds after which what should happen at once never will."""

EXECUTORS = {
    "gevent": ["threadpool", "inline", "hub_threadpool", "futures", "gevent pool"],
    "thread": ["threadpool", "inline", "futures"],
}
if gevent.config.loop.__module__.startswith("gevent.libuv"):
    # A run ends by killing the hub's own pool, which on libuv takes no task after that.
    EXECUTORS["gevent"].remove("hub_threadpool")
THREADS = 10
"""Handlers that may be held at once: the hub's own pool has as many threads."""

ELSEWHERE = ["process", "process, retry"]
"""The same in model processes, which Linux has."""

# Whatever option is to come into play; what ends calls by the clock must be off.
OPTIONS: dict[str, Any] = {"shed": False}

PICK = st.integers(0, 99)
ODDS = st.integers(0, 3).map(lambda number: number == 0)


def setups(executors: Sequence[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Return the kinds of batchers that a run may begin with."""
    return st.fixed_dictionaries(
        {
            "executor": st.sampled_from(executors),
            "max_size": st.integers(1, 4) | st.just(8),
            "max_pending": st.none() | st.integers(1, 6),
            "workers": st.integers(1, 2),
            "linger": st.sampled_from(["now", "full", "settle", "adaptive"]),
            "on_error": st.sampled_from(["fail", "isolate"]),
            "handler_timeout": st.sampled_from([None, 60.0]),
            "start": st.booleans(),
        }
    )


class Stage(RuleBasedStateMachine):
    """Holds a batcher and its model, and tells where they differ."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.world = World(backend)
        self.backend = backend
        self.parent = os.getpid()
        self.numbers = 0
        self.forks = 0
        self.ub: UBatch[Any, Any]
        self.model: Model
        self.pool: Any = None
        self.executors: Sequence[str] = EXECUTORS[backend]  # of the first batcher
        self.bridge: Bridge | None = None  # to processes, if the handler is there
        gevent.get_hub().threadpool  # makes it
        gevent.sleep(0.001)  # what others have left to the loop is not this one's
        gc.collect()
        gc.freeze()  # what a failed run left is not this one's
        self.threads_before = set(sys._current_frames())
        self.files_before = open_files()
        self.processes_before = processes()
        self.armed_before = gevent.get_hub().loop.activecnt  # timers, and the like
        self.log = Log()

    @initialize(data=st.data())
    def first_batcher(self, data: Any) -> None:
        self.begin(data.draw(setups(self.executors), label="setup"))

    def begin(self, setup: dict[str, Any]) -> None:
        """Make a batcher, and its model."""
        self.set_up(setup)
        self.inline = self.backend == "gevent" and (
            setup["executor"] == "inline"
            or (PATCHED and setup["executor"] == "futures")
        )
        executor = setup["executor"]
        if executor == "futures":
            executor = self.pool = ThreadPoolExecutor(THREADS)
        elif executor == "gevent pool":
            executor = self.pool = ThreadPool(THREADS)
        shared = {name: setup[name] for name in ("max_pending", "workers", "linger")}
        isolate = setup["on_error"] == "isolate"
        handler: Any = self.handle
        kind = ModelElsewhere if executor in ELSEWHERE else Model
        self.model = kind(setup["max_size"], **shared, isolate=isolate)
        if isinstance(self.model, ModelElsewhere):
            self.model.retry = executor == "process, retry"
            self.bridge = Bridge(self.handle_elsewhere)
            executor = ProcessExecutor(
                self.bridge.factory, setup["workers"], retry=self.model.retry
            )
            handler = None
        self.ub = UBatch(
            setup["max_size"],
            60.0 if setup["linger"] == "full" else 0.005,
            handler=handler,
            backend=self.backend,  # type: ignore[arg-type]
            executor=executor,
            on_error=setup["on_error"],
            handler_timeout=setup["handler_timeout"],
            **shared,
            **OPTIONS,
        )
        if setup["start"]:
            self.model.start()
            self.ub.start()

    def set_up(self, setup: dict[str, Any]) -> None:
        """Begin with nothing."""
        self.setup = setup
        self.calls: dict[int, Call] = {}
        self.watched: list[Any] = []
        self.entered: list[Held] = []
        self.seen = 0  # of those
        self.unseen = 0  # batches that no handler got, as stop() lost patience
        self.held: list[Held] = []
        self.cut_off: list[Held] = []  # their process is being killed
        self.told: Counter[int] = Counter()
        self.log.clear()
        self.holding = True  # handlers

    def handle(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a batch, or a part of it: the handler."""
        return self.hold(Held(args, kwargs, HubGate() if self.inline else Gate()))

    def handle_elsewhere(
        self, link: Link, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Do the same for a model process."""
        return self.hold(Held(args, kwargs, Gate(), link))

    def hold(self, held: Held) -> Any:
        if os.getpid() == self.parent and self.holding:
            self.entered.append(held)
            held.gate.wait()
        return held.end()

    # What is always true.

    def rest(self, and_also: Callable[[], bool] = lambda: True) -> None:
        """Wait until nothing is left to happen, then compare."""
        if self.model.broken:
            self.model.fail_what_closes()
        for one in self.watched:
            if isinstance(one, Mapped) and one.left is None and one.failed():
                one.give_up(self.model)
        deadline = time.monotonic() + PATIENCE
        while not (and_also() and self.is_at_rest()):
            assert time.monotonic() < deadline, f"no rest: {self.difference()}"
            gevent.sleep(0.001) if self.backend == "gevent" else time.sleep(0.0002)
        self.model.tidy()
        self.compare()

    def is_at_rest(self) -> bool:
        if self.bridge is not None and not self.is_bridge_at_rest(self.bridge):
            return False
        self.notice()  # first, as it may show that somebody is not yet due
        for one in self.watched:
            if one.has_ended():
                assert one.is_due(), f"too early: {one}"
            elif one.is_due():
                return False
        seen, collector = self.ub.stats(), self.ub._life.collector
        self.notice()
        handed = self.model.counts["batches"] + self.unseen
        busy = len(collector.running_batches()) if collector else 0
        return (
            (seen.batches_total == handed or self.model.broken)
            and self.model.is_at_rest()
            and busy == len(self.model.life.running)
            and seen.reruns_total == self.model.counts["reruns"]
            and self.log.stuck == self.model.counts["stuck"]
            and (seen.pending, seen.running, seen.stuck)
            == (self.model.pending(), self.model.running(), self.model.stuck())
        )

    def is_bridge_at_rest(self, bridge: Bridge) -> bool:
        """Let go of the runs whose process was killed; tell whether all were noticed.

        Nobody hears of how they end.
        """
        self.notice()
        for held in self.held:
            if held.batch not in held.batch.life.running:
                self.cut_off.append(held)
        self.held = [one for one in self.held if one not in self.cut_off]
        for held in self.cut_off[:]:
            if held.link is not None and held.link.is_gone():
                held.gate.open()
                self.cut_off.remove(held)
        return not self.cut_off and bridge.busy() == len(self.held)

    def notice(self) -> None:
        """Check what handlers were given since the last look."""
        while self.seen < len(self.entered):
            held = self.entered[self.seen]
            self.seen += 1
            calls = [self.calls[number] for number in held.numbers]
            assert {held.shape} == {call.shape for call in calls}
            held.batch = self.model.given(calls)
            self.held.append(held)
            self.entered[self.seen - 1] = None  # type: ignore[call-overload]

    def compare(self) -> None:
        """Compare what can be seen of the batcher with the model."""
        seen, counts = self.ub.stats(), self.model.counts
        ends = "results", "failures", "cancelled", "expired"
        for name in "calls", "rejected", "reruns", "stuck", *ends:
            assert getattr(seen, f"{name}_total") == counts[name], self.difference()
        assert (seen.pending, seen.running) == (
            self.model.pending(),
            self.model.running(),
        )
        ended = sum(getattr(seen, f"{name}_total") for name in ends)
        assert seen.calls_total == ended + seen.pending + seen.running
        assert seen.batches_total == sum(seen.batch_sizes.values())
        assert seen.batches_total == sum(seen.dispatch_reasons.values())
        if not self.model.broken and not self.unseen:
            sizes = sum(size * many for size, many in seen.batch_sizes.items())
            batched = counts["batches"], counts["batched"]
            assert batched == (seen.batches_total, sizes)
        life, collector = self.model.life, self.ub._life.collector
        if collector and not (life.waiting or life.running):
            assert not collector.deadlines._batches, "an alarm is set for nobody"
        self.check_ended()

    def check_ended(self) -> None:
        """Check how those have ended that should have by now, and nobody else."""
        for one in list(self.watched):
            assert one.has_ended() == one.is_due(), one
            if one.is_due():
                one.check()
                self.watched.remove(one)

    def difference(self) -> str:
        late = [one for one in self.watched if one.is_due() and not one.has_ended()]
        waiting = [life.waiting for life in self.model.lives]
        return (
            f"{self.ub.stats()}\nmodel: {dict(self.model.counts)}, "
            f"{self.model.pending()} pending, {self.model.running()} running, "
            f"{[[one.calls for one in batches] for batches in waiting]} wait, "
            f"{late} are late, {self.cut_off} should be killed"
        )

    def until_gone(self, look: Callable[[], list[str]]) -> None:
        """Wait until nothing is left of what can be seen."""
        deadline = time.monotonic() + PATIENCE
        while left := look():
            assert time.monotonic() < deadline, f"left behind: {left}"
            gevent.sleep(0.001)

    def left(self) -> list[str]:
        """Return what a batcher should not leave behind, by name."""
        threads = set(sys._current_frames()) - self.threads_before
        files = open_files() - self.files_before
        armed = gevent.get_hub().loop.activecnt - self.armed_before
        others = processes() - self.processes_before
        if threads or files or armed or others:
            found = f"threads {threads}, files {files}, processes {others}"
            return [found, f"watchers {armed}"]
        left = objects(RealBatch, Future, ParkedThread, Answer, Item)
        for one in gc.get_objects():
            begun = isinstance(one, greenlet) and bool(one)  # and not ended
            if begun or isinstance(one, Collector):
                left.append(repr(one))
        return left

    # Helpers.

    @staticmethod
    def pick(some: list[Any], number: int) -> Any:
        """Return one of some, if there is any.

        Which rules may come next must not depend on that, as hypothesis sees it: what
        is taken by a worker before it expires differs from run to run.
        """
        return some[number % len(some)] if some else None

    def item(self, shape: str = "one") -> Item:
        item = Item(self.numbers)
        self.calls[self.numbers] = Call(self.numbers, shape)
        self.numbers += 1
        return item

    def spawn(self, afar: bool, call: Callable[[], Any]) -> Caller:
        """Start a caller: here, or in a thread that the hub knows nothing of."""
        begun: list[bool] = []
        # A first call looks for the hub among all objects, and here those are frozen.
        native = afar and self.ub.stats().backend == "gevent"

        def begin() -> Any:
            begun.append(True)
            try:
                return call()
            finally:
                if not native and self.backend == "gevent":
                    Event().wait(0.001)  # an error, if it is told again

        caller = (NativeCaller if native else self.world.spawn)(begin)
        self.world.until(lambda: begun)
        return caller
