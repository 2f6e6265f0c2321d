"""What hypothesis does to a batcher, and how it is compared with the model.

After each step everything comes to rest: what is free to happen has happened, since
each handler is held until a step lets it end. So the model knows what should be there.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gevent
from gevent.event import Event
from gevent.threadpool import ThreadPool
from greenlet import greenlet
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from tests.apps.inside import Forked
from tests.conftest import PATCHED
from tests.fakes import Caller, Gate, HubGate, NativeCaller, World
from tests.model import CANCELLED, EXPIRED, WAYS, Call, End, Model, Way
from tests.watched import (
    Answer,
    Held,
    Item,
    Mapped,
    Promised,
    Stopping,
    Waiter,
    Watched,
    arguments,
)
from ubatch import BackendError, Future, QueueFull, Stopped, UBatch
from ubatch.backends.thread import ParkedThread
from ubatch.batch import Batch as RealBatch
from ubatch.collector import Collector

PATIENCE = 10.0
"""Seconds after which what should happen at once never will."""

SOON = 0.002
"""Seconds until a call that is to expire does."""

EXECUTORS = {
    "gevent": ["threadpool", "inline", "hub_threadpool", "futures", "gevent pool"],
    "thread": ["threadpool", "inline", "futures"],
}
if gevent.config.loop.__module__.startswith("gevent.libuv"):
    # A run ends by killing the hub's own pool, which on libuv takes no task after that.
    EXECUTORS["gevent"].remove("hub_threadpool")
ENOUGH = 16
"""Threads of an executor of ours: handlers of lives that were given up keep theirs."""

HELD = 6
"""Handlers that are held at once, at most: the hub's own pool has ten threads."""

# Whatever option is to come into play; what ends calls by the clock must be off.
OPTIONS: dict[str, Any] = {"shed": False}

SHAPES = st.sampled_from(["one", "two", "named", "only"])
PICK = st.integers(0, 99)
ODDS = st.integers(0, 3).map(lambda number: number == 0)


def setups(backend: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return the kinds of batchers that a run may begin with."""
    return st.fixed_dictionaries(
        {
            "executor": st.sampled_from(EXECUTORS[backend]),
            "max_size": st.integers(1, 4),
            "max_pending": st.none() | st.integers(1, 6),
            "workers": st.integers(1, 2),
            "linger": st.sampled_from(["now", "full", "settle", "adaptive"]),
            "start": st.booleans(),
        }
    )


def within(seconds: float, call: Callable[..., Any], *args: Any) -> Any:
    """Call, under a gevent.Timeout."""
    with gevent.Timeout(seconds):
        return call(*args)


class Machine(RuleBasedStateMachine):
    """Drives one batcher after another, and compares it with the model."""

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
        gevent.get_hub().threadpool  # makes it
        gc.collect()
        gc.freeze()  # what a failed run left is not this one's
        self.threads_before = set(sys._current_frames())
        self.files_before = open_files()
        self.armed_before = gevent.get_hub().loop.activecnt  # timers, and the like
        self.deaths = Deaths()

    @initialize(data=st.data())
    def first_batcher(self, data: Any) -> None:
        self.begin(data.draw(setups(self.backend), label="setup"))

    def begin(self, setup: dict[str, Any]) -> None:
        """Make a batcher, and its model."""
        self.setup = setup
        self.inline = self.backend == "gevent" and (
            setup["executor"] == "inline"
            or (PATCHED and setup["executor"] == "futures")
        )
        executor = setup["executor"]
        if executor == "futures":
            executor = self.pool = ThreadPoolExecutor(ENOUGH)
        elif executor == "gevent pool":
            executor = self.pool = ThreadPool(ENOUGH)
        shared = {name: setup[name] for name in ("max_pending", "workers", "linger")}
        self.model = Model(setup["max_size"], **shared)
        self.ub = UBatch(
            setup["max_size"],
            60.0 if setup["linger"] == "full" else 0.005,
            handler=self.handle,
            backend=self.backend,  # type: ignore[arg-type]
            executor=executor,
            **shared,
            **OPTIONS,
        )
        self.calls: dict[int, Call] = {}
        self.watched: list[Any] = []
        self.entered: list[Held] = []
        self.seen = 0  # of those
        self.unseen = 0  # batches that no handler got, as stop() lost patience
        self.held: list[Held] = []
        self.told: Counter[int] = Counter()
        self.holding = True  # handlers
        if setup["start"]:
            self.start()

    def handle(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a batch: the handler."""
        held = Held(args, kwargs, HubGate() if self.inline else Gate())
        if os.getpid() == self.parent and self.holding:
            self.entered.append(held)
            held.gate.wait()
        return held.end()

    # What callers do.

    @rule(shape=SHAPES, afar=ODDS, deadline=ODDS)
    def call(self, shape: str, afar: bool, deadline: bool) -> None:
        self.ask(shape, afar, 60.0 if deadline else None)

    @rule(shape=SHAPES, deadline=ODDS)
    def submit(self, shape: str, deadline: bool) -> None:
        self.promise(shape, 60.0 if deadline else None)

    @rule(count=st.integers(1, 6), keep=st.booleans(), afar=ODDS)
    def map(self, count: int, keep: bool, afar: bool) -> None:
        items = [self.item() for _ in range(count)]
        model, free = self.model, self.model.has_free_worker()
        if model.broken:
            return  # which of them fail before the rest is given up is not foreseeable,
        if free and (afar or self.backend == "thread") and model.is_full(count):
            return  # nor how many come too late, or are taken before they leave
        one_by_one = free and self.backend == "thread" and model.linger != "full"
        caller = self.spawn(afar, lambda: self.ub.map(items, return_exceptions=keep))
        if model.life.closed:
            self.refused(caller, Stopped)
            return
        calls = [self.calls[item.number] for item in items]
        if one_by_one:
            model.join_one_by_one(calls)
        else:
            joined: list[Call] = []
            for call in calls:
                if model.is_full():
                    self.gives_up(caller, joined)
                    return
                joined.append(model.join(call))
        self.watched.append(Mapped(calls, caller, keep))
        self.rest()

    def gives_up(self, caller: Caller, joined: list[Call]) -> None:
        self.model.life.called = True
        for call in joined:
            self.model.finish(call, CANCELLED)
        self.model.counts["rejected"] += 1
        self.refused(caller, QueueFull)

    @precondition(lambda self: not self.model.broken)  # or either error may come first
    @rule(shape=SHAPES, promised=st.booleans())
    def expire(self, shape: str, promised: bool) -> None:
        """Make a call whose deadline passes, before or after a worker takes it."""
        if promised:
            call = self.promise(shape, SOON, EXPIRED)
        else:
            call = self.ask(shape, False, SOON, EXPIRED)
        assert call is None or call.end is EXPIRED

    @precondition(lambda self: self.backend == "gevent" and not self.model.broken)
    @rule(shape=SHAPES)
    def time_out(self, shape: str) -> None:
        """Make a call under a gevent.Timeout of its caller's."""
        self.ask(shape, False, None, CANCELLED)

    def ask(
        self, shape: str, afar: bool, deadline: float | None, end: End | None = None
    ) -> Call | None:
        """Have somebody call, and wait; *end* is how that ends by itself."""
        item = self.item(shape)
        call = self.calls[item.number]
        args, kwargs = arguments(shape, item)
        calls: Any = self.ub.with_options(deadline=deadline) if deadline else self.ub
        del item

        def ask() -> Any:
            nonlocal args, kwargs
            mine, args, kwargs = (args, kwargs), (), {}
            if end is CANCELLED:
                return within(SOON, lambda: calls.ubatch(*mine[0], **mine[1]))
            return calls.ubatch(*mine[0], **mine[1])

        caller = self.spawn(afar, ask)
        if self.model.life.closed:
            return self.refused(caller, Stopped)
        if self.model.is_full():
            self.model.life.called = True
            self.model.counts["rejected"] += 1
            return self.refused(caller, QueueFull)
        watched = Watched(self.model.join(call), caller)
        if end is CANCELLED:
            watched.leave(self.model, gevent.Timeout)
        elif end is not None:
            self.model.finish(call, end)
        self.watched.append(watched)
        self.rest()
        return call

    def promise(
        self, shape: str, deadline: float | None, end: End | None = None
    ) -> Call | None:
        """Submit; *end* is how the call ends by itself."""
        item = self.item(shape)
        call = self.calls[item.number]
        args, kwargs = arguments(shape, item)
        calls: Any = self.ub.with_options(deadline=deadline) if deadline else self.ub
        refusal = QueueFull if self.model.is_full() else None
        refusal = Stopped if self.model.life.closed else refusal
        try:
            future = calls.submit(*args, **kwargs)
        except (QueueFull, Stopped) as error:
            assert type(error) is refusal, repr(error)
            if refusal is QueueFull:
                self.model.life.called = True
                self.model.counts["rejected"] += 1
            self.rest()
            return None
        assert refusal is None, "it was accepted"
        self.model.join(call)
        if end is not None:
            self.model.finish(call, end)
        self.watched.append(Promised(call, future, self.told))
        self.rest()
        return call

    def refused(self, caller: Caller, error: type[Exception]) -> None:
        """Check that a caller is sent away."""
        self.rest(lambda: caller.ended)
        assert type(caller.error) is error, repr(caller.error)

    # What callers do with calls that they have made.

    def promised(self) -> list[Promised]:
        return [one for one in self.watched if isinstance(one, Promised)]

    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        """Cancel a future, be it waiting, running or done."""
        one = self.pick(self.promised(), pick)
        if one is None:
            return
        batch = one.call.batch
        waits = one.call.end is None and batch and batch in batch.life.waiting
        if waits:
            self.model.finish(one.call, CANCELLED)
        assert one.future.cancel() == (one.call.end is CANCELLED)
        self.rest()

    @rule(pick=PICK, afar=ODDS)
    def wait_for(self, pick: int, afar: bool) -> None:
        """Have one more wait for a future."""
        one = self.pick(self.promised(), pick)
        if one is None:
            return
        future = one.future
        caller = self.spawn(afar, lambda: future.result())
        self.watched.append(Waiter(one.call, caller))
        self.rest()

    @rule(pick=PICK)
    def lose_patience(self, pick: int) -> None:
        """Wait for a future for a short time."""
        one = self.pick(self.promised(), pick)
        if one is None:
            return
        if one.call.end is None:
            try:
                raise AssertionError(f"{one.call} got {one.future.result(SOON)}")
            except TimeoutError as error:
                assert "the call goes on" in str(error)
        self.rest()

    def killable(self) -> list[Any]:
        waiting = [one for one in self.watched if one.killable and not one.is_due()]
        return [one for one in waiting if not isinstance(one.killable, NativeCaller)]

    @precondition(lambda self: self.backend == "gevent")
    @rule(pick=PICK)
    def kill(self, pick: int) -> None:
        """Kill a greenlet that waits for a call, a future, map() or stop()."""
        one = self.pick(self.killable(), pick)
        if one is not None:
            one.leave(self.model, gevent.GreenletExit)
            one.caller.greenlet.kill(block=False)
        self.rest()

    # What handlers do.

    @rule(
        pick=PICK,
        way=st.just("results") | st.sampled_from(WAYS),
        places=st.sets(st.integers(0, 3), min_size=1),
    )
    def answer(self, pick: int, way: Way, places: set[int]) -> None:
        """Let a handler end, well or badly."""
        if not self.held:
            return
        if way == "exit" and self.inline:
            way = "raise"  # it would end the main greenlet, as it should
        held = self.held.pop(pick % len(self.held))
        self.model.answer(held.batch, way, places)
        held.way, held.picked = way, places
        held.gate.open()
        del held
        self.rest()

    # What the owner does.

    @rule()
    def start(self) -> None:
        self.model.start()
        self.ub.start()
        self.rest()

    @rule(patient=st.booleans(), afar=ODDS)
    def stop(self, patient: bool, afar: bool) -> None:
        model = self.model
        if model.broken and not patient:
            return  # either error may come first
        if len(self.held) > HELD:
            return
        if model.life.closed and (afar or self.backend == "thread"):
            return  # it might only get there when the next life has begun
        collector: Any = self.ub._in_this_process()
        life = model.stop(patient)
        timeout = None if patient else 0.0
        caller = self.spawn(afar, lambda: self.ub.stop(timeout))
        self.watched.append(Stopping(life if patient else None, caller))

        def is_stopped() -> bool:
            if not patient and caller.ended and life is not None:
                # A batch may have been given up before its handler got it.
                self.notice()
                if len(collector.running_batches()) == len(life.running):
                    self.unseen = self.ub.stats().batches_total - self.seen
            return "stop" in repr(self.ub)

        self.rest(is_stopped)

    @precondition(
        lambda self: self.setup["executor"] == "futures" and not self.model.broken
    )
    @rule()
    def break_executor(self) -> None:
        """Shut the executor down, while handlers run."""
        if any(isinstance(one, Mapped) for one in self.watched):
            return  # see map()
        self.pool.shutdown(wait=False)
        self.model.broken = True
        self.rest()

    @precondition(lambda self: self.numbers > 5)
    @rule(data=st.data(), sure=ODDS)
    def replace(self, data: Any, sure: bool) -> None:
        """Stop this batcher, and go on with another, which has another executor."""
        if sure or self.model.broken:
            self.finish()
            self.begin(data.draw(setups(self.backend), label="setup"))

    @precondition(lambda self: self.forks < 2 and self.numbers > 2)
    @rule()
    def fork(self) -> None:
        """Fork: the child has no call but its own, and the parent loses none."""
        self.forks += 1
        model, ub, setup = self.model, self.ub, self.setup
        size = setup["max_size"]
        ours = setup["executor"] in ("threadpool", "inline")
        room = setup["max_pending"] is None or setup["max_pending"] >= size
        alive = [one.future for one in self.promised() if one.call.end is None]

        def in_child() -> list[Any]:
            signal.alarm(30)
            refused = 0
            for future in alive:
                try:
                    future.cancel()
                except BackendError:
                    refused += 1
            before = ub.stats()
            answers: Any = None
            if model.life.closed:
                try:
                    ub.submit(Item(0))
                except Stopped:
                    answers = "stopped"
            elif model.life.started and ours and room:
                answers = [one.number for one in ub.map(map_items(size))]
            if ours or model.life.closed:
                ub.stop()
                assert "stopped" in repr(ub)
            counts = [before.calls_total, before.batches_total, before.pending]
            return [refused, counts, before.running, answers]

        if PATCHED:
            gevent.get_hub().loop.install_sigchld()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are threads
            refused, counts, running, answers = Forked(in_child).result()
        assert (len(alive), [0, 0, 0], 0) == (refused, counts, running)
        if model.life.closed:
            assert "stopped" == answers
        elif model.life.started and ours and room:
            assert list(range(size)) == answers
        self.rest()

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
        self.notice()  # first, as it may show that somebody is not yet due
        for one in self.watched:
            if one.has_ended():
                assert one.is_due(), f"too early: {one}"
            elif one.is_due():
                return False
        seen, collector = self.ub.stats(), self.ub._life.collector
        self.notice()
        busy = len(collector.running_batches()) if collector else 0
        return (
            (seen.batches_total == self.seen + self.unseen or self.model.broken)
            and self.model.is_at_rest()
            and busy == len(self.model.life.running)
            and (seen.pending, seen.running)
            == (self.model.pending(), self.model.running())
        )

    def notice(self) -> None:
        """Check what handlers were given since the last look."""
        while self.seen < len(self.entered):
            held = self.entered[self.seen]
            self.seen += 1
            calls = [self.calls[number] for number in held.numbers]
            assert {held.shape} == {call.shape for call in calls}
            held.batch = self.model.close(calls)
            self.held.append(held)
            self.entered[self.seen - 1] = None  # type: ignore[call-overload]

    def compare(self) -> None:
        """Compare what can be seen of the batcher with the model."""
        seen, counts = self.ub.stats(), self.model.counts
        ends = "results", "failures", "cancelled", "expired"
        for name in "calls", "rejected", *ends:
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
            f"{late} are late"
        )

    # How it ends.

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.finish()

    def finish(self) -> None:
        """Stop, let all handlers end, and look for what is left."""
        try:
            self.answer_all()
            if not self.model.pending():
                self.until_gone(lambda: objects(Answer, Item))
            self.stop(patient=True, afar=False)
            self.answer_all()
            assert not self.watched, self.watched
            assert (0, 0) == (self.model.pending(), self.model.running())
            assert [] == self.deaths.told
        except BaseException:
            self.world.spawn(self.ub.stop, 0.0)  # so that it ends, whatever is wrong
            raise
        finally:
            self.holding = False
            for held in [*self.held, *self.entered[self.seen :]]:
                held.gate.open()
            if isinstance(self.pool, ThreadPoolExecutor):
                self.pool.shutdown()
            elif self.pool is not None:
                self.pool.kill()
            if self.backend == "gevent":
                gevent.get_hub().threadpool.kill()
            self.pool = None
            del self.model, self.ub, self.calls
            del self.watched, self.entered, self.held
        self.until_gone(self.left)

    def answer_all(self) -> None:
        while self.held:
            self.answer(0, "results", {0})

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
        if threads or files or armed:
            return [f"threads {threads}", f"files {files}", f"watchers {armed}"]
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


class Deaths(logging.Handler):
    """What the log says of strands that died; nothing else is logged anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        logging.getLogger("ubatch").handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        if "died" in record.msg:
            self.told.append(record.getMessage())


def map_items(count: int) -> list[Item]:
    return [Item(number) for number in range(count)]


def objects(*kinds: type) -> list[str]:
    """Return what is left, by name: a list of the things would keep them alive."""
    gc.collect()
    return [repr(one) for one in gc.get_objects() if isinstance(one, kinds)]


def open_files() -> set[str]:
    """Return the open files of this process, where one can see them."""
    try:
        return set(os.listdir("/proc/self/fd"))
    except FileNotFoundError:
        return set()
