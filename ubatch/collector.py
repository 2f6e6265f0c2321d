"""What becomes of a call, in one process?

One collector holds all the state of one batcher's life in one process: the batches
that wait, and what runs them. A fork or a stop() drops the whole object.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import CancelledError
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import finalize

from ubatch import process
from ubatch.batch import ONE_ITEM, Batch, Caller, Handler, Shape, Told, shape_of
from ubatch.errors import BackendError, DeadlineExceeded, Failure, QueueFull, Stopped
from ubatch.executors import Executor, Outcome
from ubatch.future import Future
from ubatch.life import Life
from ubatch.log import tell
from ubatch.policy import Rules
from ubatch.stats import Counters
from ubatch.strands import Strands
from ubatch.waiting import Waiting

if TYPE_CHECKING:
    from ubatch.backends.base import Backend

logger = logging.getLogger(__name__)

Ended = tuple[list[Told], list[Future[Any]], set[Caller]]
"""Who is to be told what, which futures are done, and who is not to be told."""


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
        rules: Rules,
        workers: int,
        max_pending: int | None,
        life: Life,
        backend: Backend,
        executor: Executor,
        counters: Counters,
        handler: Callable[[], Handler | None],
    ) -> None:
        self.name = name
        self.workers = workers
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
        self._max_size = rules.max_size
        self._max_pending = max_pending
        self._executor = executor
        self._handler = handler  # does not keep the batcher alive; its batches do
        self._strands = Strands(self, rules, workers, executor)
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
        if self._max_pending is not None and counters.pending >= self._max_pending:
            raise self._full()
        now = monotonic()
        batch = self.waiting.open.get(shape)
        # Race (rejoined): 1. a call expires; 2. before its caller hears of that, it
        #       leaves; 3. it calls again. What it was to be told is still on its way,
        #       and is held back since it is gone from that batch: so it cannot be in
        #       it again.
        if batch is None or (batch.gone and caller in batch.gone):
            batch = self._open_batch(shape, now)
        self.newest = now
        batch.arrived += now
        calls = batch.calls
        calls[caller] = item
        counters.pending += 1
        try:
            if deadline is not None:
                self._note_deadline(batch, caller, now, deadline)
            if len(calls) >= self._max_size:
                del self.waiting.open[shape]
                self._strands.look()
        except BaseException:  # no stack left, or a signal: it will not be parked
            batch.gone.add(caller)
            self.leave(batch, caller)
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
            future._join(batch, batch.deadlines.get(future))
        return future

    def wait(self, batch: Batch, caller: Caller, deadline: float | None) -> Any:
        """Wait to be told, and see to it that this comes by the deadline."""
        told = self.backend.park(caller, deadline)
        if told is None:
            self.expire(batch, caller)  # or it ended just now; one is told, either way
            told = self.backend.park(caller, None)
        return told

    def leave(self, batch: Batch, caller: Caller) -> None:
        """Give a call up on behalf of a caller that goes away."""
        with self.lock:
            if caller in batch.calls:
                batch.leave(caller, monotonic())
                batch.gone.discard(caller)  # there is nothing to hold back
                self.counters.ended(was_running=batch.running, cancelled=1)
                self._drop_if_empty(batch)

    def expire(self, batch: Batch, caller: Caller) -> None:
        """End a call whose deadline has passed, unless it has ended already."""
        with self.lock:
            if caller not in batch.calls:
                return
            ended = self._expire(batch, caller)
        self.tell(ended)

    def expire_due(self, now: float) -> list[Ended]:
        """End the waiting calls whose deadline has passed; tell() them then."""
        due = self.waiting.expired(now) if now >= self.waiting.soonest else ()
        return [self._expire(batch, caller) for batch, caller in due]

    def cancel(self, future: Future[Any]) -> bool:
        """Take a call out for good, if no worker has it."""
        batch = future._batch
        with self.lock:
            if future._cancelled:
                return True
            if batch.running or future not in batch.calls:
                return False
            self.leave(batch, future)
            batch.futures.discard(future)
            future._cancelled = True
            future._finish(Failure(CancelledError()))
        future._notify()
        return True

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
                self._strands.hire_if_short()
            except BackendError as error:
                left, failure = self.waiting.take_all(), error
            else:
                return
        self.fail(left, failure)

    def begin_stop(self) -> None:
        """Run what was accepted, then end; the life is closed."""
        with self.lock:
            left = [] if self.life.started else self.waiting.take_all()
            self._strands.hire_if_short()
            end = not self._strands.hired
        self.fail(left, self._stopped())
        self._strands.look()
        if end:
            self.end()

    def abandon(self) -> None:
        """End every call that is still there; their callers get Stopped."""
        with self.lock:
            left = [*self.waiting.take_all(), *self._strands.running]
        self.fail(left, self._stopped())
        self._strands.look()

    def at_end(self, notify: Callable[[], object]) -> None:
        """Have *notify* called when this has ended."""
        with self.lock:
            if not self.ended:
                self._at_end.append(notify)
                return
        notify()

    def is_inside(self) -> bool:
        """Tell whether the caller interrupts itself: a signal struck in a call."""
        return self.backend.holds(self.lock)

    def serves(self, life: Life) -> bool:
        """Tell whether this takes the calls of *life* in this process."""
        return self.life is life and self.epoch is process.epoch

    def inherited(self) -> bool:
        """Tell whether this belongs to a process that this one was forked from."""
        return self.epoch is not process.epoch

    def running_batches(self) -> list[Batch]:
        """Return the batches that hold a worker now."""
        return list(self._strands.running)

    def executor_name(self) -> str:
        """Return what runs the handler, for people."""
        return self._executor.name

    # What the strands do.

    def settle(self, batch: Batch, outcome: Outcome) -> None:
        """End every call of a batch that has not ended yet."""
        with self.lock:
            self.counters.handler_seconds += outcome.seconds
            if batch.settled:  # stop() lost its patience before the handler returned
                return
            told = batch.settle(outcome.answers, outcome.failure)
            failed = 0
            if outcome.failure is not None or outcome.some_failed:
                failed = sum(type(answer) is Failure for _, answer in told)
            self.counters.ended(
                was_running=batch.running,
                results=len(told) - failed,
                failures=failed,
            )
            ended = self._finish(batch, told)
        self.tell(ended)
        if outcome.failure is not None and batch.running:
            self._log_failure(batch, outcome.failure.error)

    def fail(self, batches: list[Batch], error: Exception) -> None:
        """End every call of these batches with an error of ours."""
        for batch in batches:
            self.settle(batch, Outcome(None, Failure(error), 0.0))

    def tell(self, ended: Ended) -> None:
        """Tell who waits for calls that have ended; runs no user's code."""
        told, futures, gone = ended
        self.backend.tell(told, gone)
        for future in futures:
            future._notify()

    def end(self) -> None:
        """Let go of everything: the life is closed, and no strand is left."""
        with self.lock:
            if self.ended:
                return
            self.ended = True
            notify_all, self._at_end = self._at_end, []
        self._executor.close()
        self.backend.close()
        for notify in notify_all:
            notify()

    def killed(self) -> BackendError:
        """Return the error of calls whose strand died."""
        return BackendError(
            f"{self.name}: what ran the batches was killed from outside; call again"
        )

    # What all of them use.

    def _open_batch(self, shape: Shape, now: float) -> Batch:
        self._strands.hire_if_short(coming=True)
        handler = self._handler() if self.life.started else None  # or begin() sets it
        batch = Batch(self, shape, handler, now)
        self.waiting.add(batch)
        self._strands.opened(now)
        return batch

    def _note_deadline(
        self, batch: Batch, caller: Caller, now: float, deadline: float
    ) -> None:
        batch.deadlines[caller] = now + deadline, deadline
        if now + deadline < self.waiting.soonest:
            self.waiting.soonest = now + deadline
            self._strands.look()

    def _expire(self, batch: Batch, caller: Caller) -> Ended:
        deadline, seconds = batch.deadlines[caller]
        batch.leave(caller, deadline)
        self.counters.ended(was_running=batch.running, expired=1)
        self._drop_if_empty(batch)
        error = DeadlineExceeded(
            f"{self.name}: no result within the call's deadline of {seconds:g} seconds"
        )
        return self._finish(batch, [(caller, Failure(error))])

    def _finish(self, batch: Batch, told: list[Told]) -> Ended:
        """Finish the futures among those who are to be told."""
        if not batch.futures:
            return told, [], batch.gone
        futures: list[Future[Any]] = []
        parked: list[Told] = []
        for one in told:
            caller, answer = one
            if isinstance(caller, Future):
                batch.futures.discard(caller)
                caller._finish(answer)
                futures.append(caller)
            else:
                parked.append(one)
        return parked, futures, batch.gone

    def _drop_if_empty(self, batch: Batch) -> None:
        """Forget a waiting batch whose callers have all left: it is never run."""
        if not batch.calls and not batch.running:
            self.counters.queued_seconds += batch.queued(0.0)
            self.waiting.remove(batch)
            if not self.waiting:  # or a strand that lingered would keep its timer
                self._strands.look()

    def _log_failure(self, batch: Batch, error: BaseException) -> None:
        tell(
            logger,
            logging.ERROR,
            "%s: a batch of %d calls failed: %s",
            *(self.name, batch.size, type(error).__name__),
            exc_info=(type(error), error, error.__traceback__),
        )

    def _full(self) -> QueueFull:
        self.counters.rejected_total += 1
        return QueueFull(
            f"{self.name}: {self.counters.pending} calls waiting, max_pending="
            f"{self._max_pending}; shed this one, or retry later"
        )

    def _stopped(self) -> Stopped:
        return Stopped(f"{self.name}: stopped; start() it again to accept calls")
