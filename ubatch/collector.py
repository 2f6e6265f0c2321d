"""What takes calls in, in one process?

One collector holds all the state of one batcher's life in one process: the batches
that wait, and what runs them. A fork or a stop() drops the whole object.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import finalize

from ubatch import process
from ubatch.batch import ONE_ITEM, Batch, Caller, Handler, Shape, shape_of
from ubatch.deadlines import Deadlines
from ubatch.endings import Endings
from ubatch.errors import BackendError, Failure, QueueFull, Stopped
from ubatch.executors import Changed, Executor
from ubatch.future import Future
from ubatch.isolation import Answer, answer_apart, answer_whole
from ubatch.life import Life
from ubatch.options import Options
from ubatch.stats import Counters
from ubatch.strands import Strands
from ubatch.waiting import Waiting

if TYPE_CHECKING:
    from ubatch.backends.base import Backend

NOBODY_KNOWS = 1.0
"""Seconds after which to retry, where no batch has shown how fast they are."""


class Collector:
    """The waiting batches of one batcher in one process, and what runs them.

    Owner: on gevent everything here is touched by the owning hub's thread alone
    (others come in through ``backend.in_owner``), so the lock does nothing; on
    threads every field changes under it. No user's code and no logging runs under
    it, or before the calls that depend on what follows have been ended.
    Invariant: a batch that waits is not empty, and not settled.
    """

    def __init__(
        self,
        name: str,
        options: Options,
        life: Life,
        backend: Backend,
        executor: Callable[[Changed], Executor],
        counters: Counters,
        handler: Callable[[], Handler | None],
    ) -> None:
        """Take what one life in one process has.

        Args:
            executor: Makes it, given what to call when its places change.
        """
        self.name = name
        self.workers = options.workers
        self.life = life
        self.backend = backend
        self.counters = counters
        self.epoch = process.epoch
        self.finalizer: finalize[..., Any]  # runs when the batcher is forgotten
        self.newest = 0.0  # when the last call came
        self.ended = False  # its life is closed, and nothing of it runs any more
        self.lock = counters.lock
        self.waiting = Waiting()
        self.caller, self.park = backend.caller, backend.park
        self.join = backend.guarded(self._join, self.lock)
        self.answer: Answer = answer_whole
        if options.on_error == "isolate":
            self.answer = answer_apart
        self._max_size = options.max_size
        self._max_pending = options.max_pending
        self._executor = executor(self.places_changed)
        self.places = self._executor.places
        self._handler = handler  # does not keep the batcher alive; its batches do
        self.strands = Strands(self, options, self._executor)
        self.endings = Endings(self)
        lead = self.strands.recent.lead if options.shed else _no_lead
        self.deadlines = Deadlines(backend.alarm(self.endings.ring), lead)
        self._at_end: list[Callable[[], object]] = []

    # What callers do.

    def _join(
        self,
        caller: Caller,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float | None,
    ) -> Batch:
        """Put one call into the open batch of its shape, and return that.

        Raises:
            QueueFull: *max_pending* calls wait already.
            Stopped: stop() has begun.
        """
        item: Any
        if len(args) == 1 and not kwargs:
            shape, item = ONE_ITEM, args[0]
        else:
            shape, item = shape_of(args, kwargs), (args, kwargs)
        if self.life.closed:
            raise self._stopped()
        counters = self.counters
        now = monotonic()
        if self._max_pending is not None and counters.pending >= self._max_pending:
            raise self._full(self._max_pending)
        batch, opened = self.waiting.open.get(shape), None
        # Race (rejoined): 1. a call expires; 2. before its caller hears of that, it
        #       leaves; 3. it calls again. What it was to be told is still on its way,
        #       and is held back since it is gone from that batch: so it cannot be in
        #       it again.
        if batch is None or (batch.gone and caller in batch.gone):
            batch = opened = self._new_batch(shape, now)
        self.newest = now
        batch.arrived += now
        calls = batch.calls
        calls[caller] = item
        counters.pending += 1
        try:
            if opened is not None:
                # The look is first: where a signal strikes in between, it is in vain.
                self.strands.opened(now)
                self.waiting.add(opened)
            if deadline is not None:
                self._note_deadline(batch, caller, now, deadline)
            if len(calls) >= self._max_size:
                del self.waiting.open[shape]
                self.strands.look()
        except BaseException:  # no stack left, or a signal: it will not be parked
            batch.gone.add(caller)
            self.endings.leave(batch, caller)
            raise
        return batch

    def submit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None
    ) -> Future[Any]:
        """Put one call in, and return the future of its result."""
        future = self.backend.future()
        with self.lock:
            batch = self._join(future, args, kwargs, deadline)
            batch.futures.add(future)
            future._batch = batch
        return future

    def link(
        self, future: Future[Any], notify: Callable[[Future[Any]], object]
    ) -> bool:
        """Have *notify* called when *future* is done; False if it is."""
        with self.lock:
            if not future._done:
                future._links.append(notify)
            return not future._done

    # What the batcher does.

    def begin(self) -> None:
        """Run what waits, now that the life is started."""
        with self.lock:
            handler = self._handler()
            for batch in self.waiting:
                batch.handler = handler
            try:
                self.strands.hire_if_short()
            except BackendError as error:
                self.endings.fail_waiting(error)
        self.endings.tell()

    def begin_stop(self) -> None:
        """Run what was accepted, then end; the life is closed."""
        with self.lock:
            if not self.life.started:
                self.endings.fail_waiting(self._stopped())
            self.strands.hire_if_short()
            end = not self.strands.at_work
        self.endings.tell()
        self.strands.look()
        if end:
            self.end()

    def places_changed(self, trouble: Exception | None) -> None:
        """Look at what waits: there is a place, or *trouble* says why there is none."""
        if trouble is not None:
            with self.lock:
                self.endings.fail_waiting(trouble)
            self.endings.tell()
        self.strands.look()

    def left(self, batch: Batch, caller: Caller) -> None:
        """Take note that a caller leaves a batch that runs; under the lock."""
        if self.places is not None:
            self.places.left(batch, batch.call_of(caller))

    def give_up(self, batch: Batch) -> None:
        """End the process of a batch that nobody waits for any more; under the lock."""
        if self.places is not None:
            self.places.give_up(batch)

    def abandon(self) -> None:
        """End every call that is still there; their callers get Stopped."""
        error = Stopped(
            f"{self.name}: stop(timeout) ended before this call was answered"
        )
        with self.lock:
            self.endings.fail_waiting(error)
            running = list(self.strands.running)
        # Race (given_back): 1. a batch that runs elsewhere is given up; 2. its strand
        #       settles it, with no answers; 3. it is failed here. So that comes first.
        self.endings.fail(running, error)
        with self.lock:
            for batch in running:
                self.give_up(batch)
        self.strands.look()

    def at_end(self, notify: Callable[[], object]) -> None:
        """Have *notify* called when this has ended."""
        with self.lock:
            if not self.ended:
                self._at_end.append(notify)
                return
        notify()

    def is_inside(self) -> bool:
        """Tell whether the caller interrupts itself: a signal struck in a call, say."""
        return self.backend.cannot_wait(self.lock)

    def serves(self, life: Life) -> bool:
        """Tell whether this takes the calls of *life* in this process."""
        return self.life is life and self.epoch is process.epoch

    def inherited(self) -> bool:
        """Tell whether this belongs to a process that this one was forked from."""
        return self.epoch is not process.epoch

    def running_batches(self) -> list[Batch]:
        """Return the batches that hold a worker now; a stuck one's was replaced."""
        return list(self.strands.running - self.strands.stuck)

    def free_worker(self) -> bool:
        """Tell whether one more batch could run now."""
        return len(self.running_batches()) < self.strands.places

    def executor_name(self) -> str:
        """Return what runs the handler, for people."""
        return self._executor.name

    def end(self) -> None:
        """Let go of everything: the life is closed, and no strand is left."""
        with self.lock:
            if self.ended:
                return
            self.ended = True
            notify_all, self._at_end = self._at_end, []
        self.endings.tell()  # if somebody else was cut off
        self._executor.close()
        self.deadlines.close()
        self.backend.close()
        for notify in notify_all:
            notify()

    # What all of them use.

    def _new_batch(self, shape: Shape, now: float) -> Batch:
        if self.strands.all_stuck:
            raise self.endings.stuck()
        if self.places is not None and self.places.trouble is not None:
            raise Failure(self.places.trouble).own()
        self.strands.hire_if_short(coming=True)
        handler = self._handler() if self.life.started else None  # or begin() sets it
        return Batch(self, shape, handler, now)

    def _note_deadline(
        self, batch: Batch, caller: Caller, now: float, deadline: float
    ) -> None:
        at = now + deadline
        batch.deadlines[caller] = at, deadline
        if at < batch.soonest:
            try:
                self.deadlines.note(batch, at, now)
            except RuntimeError as error:
                raise BackendError(
                    f"{self.name}: cannot start what watches the deadlines"
                ) from error
            self.strands.look()

    def _full(self, max_pending: int) -> QueueFull:
        self.counters.rejected_total += 1
        pending = self.counters.pending
        retry_after = self.strands.recent.seconds_for(pending)
        if retry_after == inf:  # no batch has ended yet
            retry_after = NOBODY_KNOWS
        return QueueFull(
            f"{self.name}: {pending} calls waiting, max_pending={max_pending}; shed "
            f"this one, or retry in {retry_after:.2g} s",
            *(pending, max_pending, retry_after),
        )

    def _stopped(self) -> Stopped:
        return Stopped(f"{self.name}: stopped; start() it again to accept calls")


def _no_lead(now: float) -> float:
    return 0.0
