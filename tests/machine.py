"""What hypothesis does to a batcher: what callers do, and all that follows here."""

from __future__ import annotations

import gc
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import gevent
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.apps.inside import Forked
from tests.callers import SOON
from tests.conftest import PATCHED
from tests.handlers import Handlers
from tests.stage import ELSEWHERE, ODDS, PICK, THREADS, setups
from tests.traces import objects
from tests.watched import Answer, Held, Item, Mapped, Stopping
from ubatch import BackendError, Stopped
from ubatch.batch import Batch as RealBatch


class Machine(Handlers):
    """Drives one batcher after another, and compares it with the model."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.successors = self.executors  # of the first batcher's
        self.most_forks = 2

    # Handlers that do not return.

    @precondition(lambda self: self.setup["handler_timeout"])
    @rule(pick=PICK, others=ODDS)
    def stick(self, pick: int, others: bool) -> None:
        """Let a handler, and the others that run beside it, run for too long."""
        held = [one for one in self.held if one.batch in one.batch.life.running]
        if not held:
            return
        late = [held[pick % len(held)]]
        if others:
            late = [one for one in held if one.batch.life is late[0].batch.life]
        if not self.has_threads_for(len(late)):
            return
        for one in late:
            self.model.stick(one.batch)
        run_out_of_time([real_batch(one) for one in late])
        self.rest()

    def has_threads_for(self, more: int) -> bool:
        """Tell whether so many more handlers could be held beside those that may be."""
        return self.model.most_at_once() + more <= THREADS

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
        if not self.has_threads_for(model.workers):
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
                    handed = self.model.counts["batches"]
                    self.unseen = self.ub.stats().batches_total - handed
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
            self.begin(data.draw(setups(self.successors), label="setup"))

    @precondition(lambda self: self.forks < self.most_forks and self.numbers > 2)
    @rule()
    def fork(self) -> None:
        """Fork: the child has no call but its own, and the parent loses none."""
        self.forks += 1
        model, ub, setup = self.model, self.ub, self.setup
        size = setup["max_size"]
        ours = setup["executor"] in ("threadpool", "inline", *ELSEWHERE)
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
            return [refused, counts, before.running + before.stuck, answers]

        if PATCHED:
            gevent.get_hub().loop.install_sigchld()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are threads
            refused, counts, busy, answers = Forked(in_child).result()
        assert (len(alive), [0, 0, 0], 0) == (refused, counts, busy)
        if model.life.closed:
            assert "stopped" == answers
        elif model.life.started and ours and room:
            assert list(range(size)) == answers
        self.rest()

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
            assert 0 == self.ub.stats().stuck
            assert [] == self.log.deaths
        except BaseException:
            self.world.spawn(self.ub.stop, 0.0)  # so that it ends, whatever is wrong
            raise
        finally:
            self.holding = False
            for held in [*self.held, *self.cut_off, *self.entered[self.seen :]]:
                held.gate.open()
            if isinstance(self.pool, ThreadPoolExecutor):
                self.pool.shutdown()
            elif self.pool is not None:
                self.pool.kill()
            if self.backend == "gevent":
                gevent.get_hub().threadpool.kill()
            if self.bridge is not None:
                self.bridge.close()
            self.pool = self.bridge = None
            del self.model, self.ub, self.calls
            del self.watched, self.entered, self.held, self.cut_off
        self.until_gone(self.left)


def real_batch(held: Held) -> RealBatch:
    """Return the batch that a handler runs, of which it knows if it is here."""
    if held.real is not None:
        return held.real
    numbers = [call.number for call in held.batch.calls]
    for one in gc.get_objects():
        if isinstance(one, RealBatch) and one.running and not one.settled:
            args, kwargs = one.inputs
            items = args[0] if args else kwargs["item"]
            if numbers == [item.number for item in items]:
                return one
    raise AssertionError(f"no batch of {numbers} runs")


def run_out_of_time(batches: list[RealBatch]) -> None:
    """Let the handlers' time be up now, and not when handler_timeout says.

    As if they had begun that much earlier: it is left to the alarm to find out.
    """
    collector = batches[0].collector
    with collector.lock:
        for batch in batches:
            assert batch in collector.deadlines._batches, "nobody looks at it"
            assert collector.deadlines.next <= batch.limit, "nobody will in time"
            batch.limit = batch.began + SOON
            collector.deadlines.note(batch, batch.limit, monotonic())


def map_items(count: int) -> list[Item]:
    return [Item(number) for number in range(count)]
