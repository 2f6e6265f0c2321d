"""What runs the batches, and when?

A strand is a greenlet or a thread that closes a batch, has the handler run it, and
hands its outcome back; there is one for each worker.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from ubatch.batch import Batch
from ubatch.errors import BackendError, Failure, HandlerExit
from ubatch.executors import Executor, Outcome
from ubatch.log import tell
from ubatch.options import Options
from ubatch.pace import Observer, Recent
from ubatch.policy import TURN, Pace, Rules

if TYPE_CHECKING:
    from ubatch.collector import Collector

logger = logging.getLogger(__name__)

TURN_EVERY = 0.001
"""Seconds after which strands on the hub let its loop turn before the next batch.

While callbacks are ready a loop polls no socket for 50 of them, whatever each takes:
a batch and all its callers are two.
"""


class Strands:
    """The strands of one collector.

    Owner: as the collector's, whose lock guards this too.
    Invariant: while a batch waits and the life is started, one of the ``hired`` is
    free, or as many as may be there are busy: each with one that is ``running``. For
    each of those that is ``stuck`` there may be one more, up to twice the workers.
    """

    def __init__(
        self, collector: Collector, options: Options, executor: Executor
    ) -> None:
        self.hired = 0
        self.running: set[Batch] = set()
        self.stuck: set[Batch] = set()  # those that ran past handler_timeout
        self.recent = Recent()
        self._turned = 0.0  # when a strand last let the loop turn
        self._workers = options.workers
        self._handler_timeout = options.handler_timeout
        self._rules = Rules(
            options.max_size,
            options.timeout,
            options.linger,
            collector.backend.settled_turns,
            executor.far,
        )
        self._executor = executor
        self._observer = Observer() if options.linger == "adaptive" else None
        self._collector = collector
        self._lock = collector.lock
        self._turnstile = collector.backend.mutex()  # one at a time looks for a batch
        self._news = collector.backend.wake()  # there is something to look at

    # What the collector asks and does, under its lock.

    @property
    def at_work(self) -> int:
        """How many strands are not stuck."""
        return self.hired - len(self.stuck)

    @property
    def places(self) -> int:
        """How many strands may be at work."""
        return min(self._workers, 2 * self._workers - len(self.stuck))

    @property
    def all_stuck(self) -> bool:
        """Every worker is stuck, and so are those that replaced them."""
        return self.places <= 0

    def look(self) -> None:
        """Have a free strand look at what waits, now."""
        self._news.set()

    def opened(self, now: float) -> None:
        """Have a free strand look at a new batch."""
        if self._observer is not None:
            self._observer.opened(now)
        self.look()

    def hire_if_short(self, coming: bool = False) -> None:
        """Start a strand if a batch waits, none is free, and one more may be.

        Args:
            coming: A batch will wait as soon as this returns.

        Raises:
            BackendError: None is at work, and none can be started.
        """
        collector = self._collector
        if len(self.running) < self.hired or self.at_work >= self.places:
            return
        if not collector.life.started:
            return
        if not coming and not collector.waiting:
            return
        hand: list[Batch] = []  # the batch that this strand has closed, or none
        counted: list[bool] = []
        try:
            collector.backend.spawn(
                partial(self._work, hand, counted), partial(self._ended, hand, counted)
            )
        except RuntimeError as error:
            if not self.at_work:
                name = collector.name
                raise BackendError(f"{name}: cannot start a worker") from error
            return  # those that are there go on
        self._count(counted)

    def replace(self, batch: Batch) -> None:
        """Go on without the strand of a batch whose handler does not return."""
        self.stuck.add(batch)
        with suppress(BackendError):  # see give_up_due(): then nobody is at work
            self.hire_if_short()

    def _count(self, counted: list[bool]) -> None:
        """Count a strand as hired, once; under the lock."""
        # Race (uncounted): 1. a strand is started; 2. a signal's exception strikes who
        #       started it; 3. it is not counted, and there is one too many for good. So
        #       a strand counts itself, if it was not.
        if not counted:
            counted.append(True)
            self.hired += 1

    # What a strand does.

    def _work(self, hand: list[Batch], counted: list[bool]) -> None:
        """Run batches until the life is closed; the life of one strand."""
        with self._lock:
            self._count(counted)
        while self._run_one(hand):
            self._executor.rest()
            with self._lock:
                if self.at_work > self._workers:  # it was stuck, and replaced
                    return

    def _run_one(self, hand: list[Batch]) -> bool:
        """Wait for a batch and run it; False when there will be none.

        A function of its own, so that an idle strand holds nothing of its last
        batch.
        """
        with self._turnstile:
            batch = self._next(hand)
        if batch is None:
            return False
        outcome = self._run(batch, hand)
        failure = outcome.failure
        for one in (*outcome.failures, outcome.first, failure):
            if one is not None:
                one.release_frames()
        if failure is not None:
            cause = failure.error.__cause__
            if isinstance(failure.error, HandlerExit) and cause is not None:
                if isinstance(cause, self._executor.fatal):
                    raise cause
        return True

    def _next(self, hand: list[Batch]) -> Batch | None:
        """Wait until a batch should close, and close it; None to end."""
        collector = self._collector
        waiting = collector.waiting
        if waiting and self._callers_first():
            collector.backend.breathe()
        # A greenlet survives a fork, and must not go on in the child.
        while not collector.inherited():
            if self._executor.on_hub and waiting and self._long_since_a_turn():
                self._turn()
            with self._lock:
                now = monotonic()
                due = collector.endings.give_up_due(now)
                batch, look_again = self._close_one(now, hand)
                end = collector.life.closed and not waiting
            if due:
                collector.endings.tell()
            if batch is not None or end:
                return batch
            if look_again == TURN:
                self._turn()
            else:
                self._news.wait(None if look_again == inf else look_again)
        return None

    def _turn(self) -> None:
        self._collector.backend.turn(self._news)
        self._turned = monotonic()
        with self._lock:
            self._collector.waiting.observe_turn()

    def _callers_first(self) -> bool:
        """Tell whether those who were just answered should run before a batch does.

        Where it runs beside them, the worker would idle meanwhile, and lose up to a
        third of its throughput; where both need the GIL, a random forest gained a
        quarter.
        """
        if self._executor.on_hub:
            return True
        if self._observer is None or self._executor.apart:
            return False
        return self._observer.contended

    def _long_since_a_turn(self) -> bool:
        return monotonic() - self._turned > TURN_EVERY

    def _close_one(self, now: float, hand: list[Batch]) -> tuple[Batch | None, float]:
        """Close the first batch that should be; else say when to look again."""
        collector, places = self._collector, self._executor.places
        if places is not None and not places.vacant:
            return None, inf  # one is told when that changes
        batch, decision = collector.waiting.choose(
            *(self._rules, now, collector.newest, collector.life.closed),
            *(self._pace, self.recent.spare),
        )
        if batch is None or decision.reason is None:
            return None, max(decision.look_again, TURN)
        hand.append(batch)
        self.running.add(batch)
        if places is not None:
            places.claim(batch)
        collector.waiting.remove(batch)
        size = len(batch.calls)
        collector.counters.closed(size, decision.reason, batch.queued(now))
        batch.begin(now, collector.counters.accepted())
        if self._handler_timeout is not None:
            batch.limit = now + self._handler_timeout
            collector.deadlines.note(batch, batch.limit, now)
        self.hire_if_short()
        return batch, TURN

    def _pace(self, now: float) -> Pace | None:
        """Note what came; return what is known of the callers and the handler."""
        if self._observer is None:
            return None
        collector = self._collector
        joined, newest = collector.counters.accepted(), collector.newest
        return self._observer.pace(joined, newest, now, self._executor.overlaps)

    def _run(self, batch: Batch, hand: list[Batch]) -> Outcome:
        """Have the handler run a closed batch, and hand its outcome out."""
        collector = self._collector
        outcome = Outcome(None, Failure(collector.endings.killed()), 0.0)
        try:
            outcome = self._executor.run(batch)
        finally:  # whatever gets out of here, the callers get an answer
            if not collector.inherited():
                self._observe(batch, outcome)
                collector.endings.settle(batch, outcome)
                with self._lock:
                    self._put_down(hand)
        return outcome

    def _observe(self, batch: Batch, outcome: Outcome) -> None:
        """Note that a handler has returned, and its answers are about to go out."""
        collector = self._collector
        with self._lock:
            collector.deadlines.forget(batch)
            now = monotonic()
            each_run = (now - batch.began) / (1 + outcome.reruns)
            if outcome.failure is None:  # what fails may fail at once
                self.recent.add(now - each_run, now, batch.size)
            if self._observer is None:
                return
            joined, newest = collector.counters.accepted(), collector.newest
            beside = joined - batch.joined
            self._observer.outcome(batch.size, each_run, beside, joined, newest, now)

    def _put_down(self, hand: list[Batch]) -> None:
        """Forget the batch in a strand's hand: it is over."""
        for batch in hand:
            self._collector.deadlines.forget(batch)
            self.running.discard(batch)
            if batch in self.stuck:
                self.stuck.remove(batch)
                self._collector.counters.stuck -= 1
        hand.clear()

    def _ended(
        self, hand: list[Batch], counted: list[bool], escaped: BaseException | None
    ) -> None:
        """Take note that a strand is gone; if it was not told to go, tell everybody.

        The next call hires another.
        """
        collector = self._collector
        if collector.inherited():
            return
        with self._lock:
            self.hired -= bool(counted)
            left = list(hand)
            self._put_down(hand)
            if escaped is not None:
                collector.endings.fail_waiting(collector.endings.killed())
            try:  # of those that were replaced too many may have left
                self.hire_if_short()
            except BackendError:
                collector.endings.fail_waiting(collector.endings.killed())
            end = collector.life.closed and not self.at_work
        collector.endings.fail(left, collector.endings.killed())
        if escaped is not None:
            # Not here: in a hub callback a log handler's lock must not be waited for.
            message = "%s: what runs the batches died: %r"
            collector.backend.defer(
                lambda: tell(logger, logging.ERROR, message, collector.name, escaped)
            )
        if end:
            collector.end()
