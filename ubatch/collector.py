"""Who closes batches and has them run, in one process?

One collector holds all the state of one batcher's life in one process: the batches
that wait, and the strands (greenlets or threads, one per worker) that run them. A
fork or a stop() drops the whole object.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import CancelledError
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import finalize

from ubatch import process
from ubatch.batch import ONE_ITEM, Batch, Handler, Shape, shape_of
from ubatch.errors import BackendError, Failure, HandlerExit, QueueFull, Stopped
from ubatch.executors import Executor, Outcome
from ubatch.future import Future
from ubatch.life import Life
from ubatch.log import tell
from ubatch.policy import TURN, Rules
from ubatch.stats import Counters
from ubatch.waiting import Waiting

if TYPE_CHECKING:
    from ubatch.backends.base import Backend

logger = logging.getLogger(__name__)


class Collector:
    """The waiting batches of one batcher in one process, and what runs them.

    Owner: on gevent everything here is touched by the owning hub's thread alone
    (others come in through ``backend.in_owner``), so the lock does nothing; on
    threads every field changes under it. No user's code and no logging runs under
    it, or before the calls that depend on what follows have been ended.
    Invariant: a batch that waits is not empty, and not settled.
    Invariant: ``_free`` strands of ``_strands`` have no batch; while a batch waits
    and the life is started, one is free, or as many as may be there are busy.
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
        self.ended = False  # its life is closed, and nothing of it runs any more
        self._rules = rules
        self._max_pending = max_pending
        self._executor = executor
        self._handler = handler  # does not keep the batcher alive; its batches do
        self._lock = counters.lock
        self._turnstile = backend.mutex()  # one strand at a time looks for a batch
        self._wake = backend.wake()  # there is something new to look at
        self._waiting = Waiting()
        self._running: set[Batch] = set()
        self._strands = 0
        self._free = 0
        self._at_end: list[Callable[[], object]] = []

    # What callers do.

    def join(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None
    ) -> tuple[Batch, float]:
        """Put one call into the open batch of its shape; return batch and ticket.

        Raises:
            QueueFull: *max_pending* calls wait already.
            Stopped: stop() has begun.
        """
        item: Any
        if len(args) == 1 and not kwargs:
            shape, item = ONE_ITEM, args[0]
        else:
            shape, item = shape_of(args, kwargs), (args, kwargs)
        counters = self.counters
        with self._lock:
            if self.life.closed:
                raise self._stopped()
            if self._max_pending is not None and counters.pending >= self._max_pending:
                counters.rejected_total += 1
                raise QueueFull(
                    f"{self.name}: {counters.pending} calls waiting, max_pending="
                    f"{self._max_pending}; shed this one, or retry later"
                )
            batch = self._waiting.open.get(shape)
            if batch is None or not self._strands:
                self._hire_if_short(coming=True)
            if batch is None:
                batch = self._open_batch(shape)
            ticket = batch.add(item, monotonic())
            if deadline is not None:
                batch.deadlines[ticket] = ticket + deadline
            counters.joined()
            if len(batch.calls) >= self._rules.max_size:
                del self._waiting.open[shape]
                self._wake.set()
        return batch, ticket

    def submit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None
    ) -> Future[Any]:
        """Put one call in, and return the future of its result."""
        with self._lock:
            batch, ticket = self.join(args, kwargs, deadline)
            future = self.backend.future(batch, ticket, deadline)
            batch.futures[ticket] = future
        return future

    def leave(self, batch: Batch, ticket: float) -> None:
        """Give a call up on behalf of a caller that goes away."""
        with self._lock:
            if ticket in batch.calls:  # it is empty once the batch is settled
                batch.leave(ticket)
                self.counters.ended(was_running=batch.running, cancelled=1)
                self._drop_if_empty(batch)

    def expire(self, batch: Batch, ticket: float) -> bool:
        """End a call whose deadline has passed, unless it has ended already."""
        with self._lock:
            if ticket not in batch.calls:
                return False
            futures = self._expire(batch, ticket)
        _notify(futures)
        return True

    def cancel(self, future: Future[Any]) -> bool:
        """Take a call out for good, if no worker has it."""
        batch, ticket = future._batch, future._ticket
        with self._lock:
            if future._cancelled:
                return True
            if batch.running or ticket not in batch.calls:
                return False
            self.leave(batch, ticket)
            del batch.futures[ticket]
            future._cancelled = True
            future._finish(None, Failure(CancelledError()))
        _notify([future])
        return True

    def link(
        self, future: Future[Any], notify: Callable[[Future[Any]], object]
    ) -> bool:
        """Have *notify* called when *future* is done; False if it is."""
        with self._lock:
            if not future._done:
                future._links.append(notify)
            return not future._done

    # What the batcher does.

    def begin(self) -> None:
        """Run what waits, now that the life is started."""
        with self._lock:
            handler = self._handler()
            for batch in self._waiting:
                batch.handler = handler
            self._hire_if_short()

    def begin_stop(self) -> None:
        """Run what was accepted, then end; the life is closed."""
        with self._lock:
            left = [] if self.life.started else self._waiting.take_all()
            self._hire_if_short()
            end = not self._strands
        self._settle_all(left, self._stopped())
        self._wake.set()
        if end:
            self._end()

    def abandon(self) -> None:
        """End every call that is still there; their callers get Stopped."""
        with self._lock:
            left = [*self._waiting.take_all(), *self._running]
        self._settle_all(left, self._stopped())
        self._wake.set()

    def at_end(self, notify: Callable[[], object]) -> None:
        """Have *notify* called when this has ended."""
        with self._lock:
            if not self.ended:
                self._at_end.append(notify)
                return
        notify()

    def is_inside(self) -> bool:
        """Tell whether the caller interrupts itself: a signal struck in a call."""
        return self.backend.holds(self._lock)

    def serves(self, life: Life) -> bool:
        """Tell whether this takes the calls of *life* in this process."""
        return self.life is life and self.epoch is process.epoch

    def inherited(self) -> bool:
        """Tell whether this belongs to a process that this one was forked from."""
        return self.epoch is not process.epoch

    def running_batches(self) -> list[Batch]:
        """Return the batches that hold a worker now."""
        return list(self._running)

    def executor_name(self) -> str:
        """Return what runs the handler, for people."""
        return self._executor.name

    # What the strands do.

    def _work(self) -> None:
        """Run batches until the life is closed; the life of one strand."""
        while self._run_one():
            self._executor.rest()

    def _run_one(self) -> bool:
        """Wait for a batch and run it; False when there will be none.

        A function of its own, so that an idle strand holds nothing of its last
        batch.
        """
        with self._turnstile:
            batch = self._next()
        if batch is None:
            return False
        failure = self._run(batch)
        if failure is not None:
            failure.release_frames()
            cause = failure.error.__cause__
            if isinstance(failure.error, HandlerExit) and cause is not None:
                if isinstance(cause, self._executor.fatal):
                    raise cause
        return True

    def _next(self) -> Batch | None:
        """Wait until a batch should close, and close it; None to end."""
        while not self.inherited():  # a greenlet survives a fork, and must not go on
            with self._lock:
                now = monotonic()
                expired = self._expire_due(now)
                batch, look_again = self._look(now)
                end = self.life.closed and not self._waiting
            _notify(expired)
            if batch is not None or end:
                return batch
            if look_again == TURN:
                self.backend.turn(self._wake)
                with self._lock:
                    self._waiting.observe_turn()
            else:
                self._wake.wait(look_again)
        return None

    def _look(self, now: float) -> tuple[Batch | None, float | None]:
        """Close the first batch that should; else say when to look again."""
        chosen, look_again = self._waiting.choose(self._rules, now, self.life.closed)
        if chosen is None:
            return None, look_again
        batch, reason = chosen
        self._waiting.remove(batch)
        self._running.add(batch)
        self._free -= 1
        queued = len(batch.calls) * now - sum(batch.calls)
        self.counters.closed(len(batch.calls), reason.value, queued)
        batch.begin()
        self._hire_if_short()
        return batch, None

    def _run(self, batch: Batch) -> Failure | None:
        """Have the handler run a closed batch, and hand its outcome out."""
        outcome = Outcome(None, Failure(self._killed()), 0.0)
        try:
            outcome = self._executor.run(batch)
        finally:  # whatever gets out of here, the callers get an answer
            if not self.inherited():
                with self._lock:
                    self._running.discard(batch)
                    self._free += 1
                self._settle(batch, outcome)
        return outcome.failure

    def _settle(self, batch: Batch, outcome: Outcome) -> None:
        """End every call of a batch that has not ended yet."""
        with self._lock:
            self.counters.handler_seconds += outcome.seconds
            if batch.settled:  # stop() lost its patience before the handler returned
                return
            results, failures = batch.settle(outcome.answers, outcome.failure)
            self.counters.ended(
                was_running=batch.running, results=results, failures=failures
            )
            futures = list(batch.futures.values())
            for future in futures:
                future._finish(*batch.end_of(future._ticket))
            batch.futures.clear()
        batch.latch.set()
        _notify(futures)
        if outcome.failure is not None and batch.running:
            self._log_failure(batch, outcome.failure.error)

    def _settle_all(self, batches: list[Batch], error: Exception) -> None:
        for batch in batches:
            self._settle(batch, Outcome(None, Failure(error), 0.0))

    def _strand_ended(self, escaped: BaseException | None) -> None:
        """Take note that a strand is gone; if it was not told to go, tell everybody.

        The next call hires another.
        """
        if self.inherited():
            return
        with self._lock:
            self._strands -= 1
            self._free -= 1
            left = self._waiting.take_all() if escaped is not None else []
            end = self.life.closed and not self._strands
        self._settle_all(left, self._killed())
        if escaped is not None:
            # Not here: in a hub callback a log handler's lock must not be waited for.
            message = "%s: what runs the batches died: %r"
            self.backend.defer(
                lambda: tell(logger, logging.ERROR, message, self.name, escaped)
            )
        if end:
            self._end()

    # What all of them use.

    def _open_batch(self, shape: Shape) -> Batch:
        handler = self._handler() if self.life.started else None  # or begin() sets it
        batch = Batch(self, shape, self.backend.latch(), handler)
        self._waiting.add(batch)
        self._wake.set()
        return batch

    def _hire_if_short(self, coming: bool = False) -> None:
        """Start a strand if a batch waits, none is free, and one more may be.

        Args:
            coming: A batch will wait as soon as this returns.

        Raises:
            BackendError: There is no strand, and none can be started.
        """
        if self._free or self._strands >= self.workers or not self.life.started:
            return
        if not coming and not self._waiting:
            return
        try:
            self.backend.spawn(self._work, self._strand_ended)
        except RuntimeError as error:
            if not self._strands:
                raise BackendError(f"{self.name}: cannot start a worker") from error
            return  # those that are there go on
        self._strands += 1
        self._free += 1

    def _expire_due(self, now: float) -> list[Future[Any]]:
        """End the waiting calls whose deadline has passed; return their futures.

        A caller that waits without a future wakes up by itself.
        """
        ended: list[Future[Any]] = []
        for batch, ticket in self._waiting.expired(now):
            ended += self._expire(batch, ticket)
        return ended

    def _expire(self, batch: Batch, ticket: float) -> list[Future[Any]]:
        error = batch.expire(ticket)
        self.counters.ended(was_running=batch.running, expired=1)
        self._drop_if_empty(batch)
        future = batch.futures.pop(ticket, None)
        if future is None:
            return []
        future._finish(None, Failure(error))
        return [future]

    def _drop_if_empty(self, batch: Batch) -> None:
        """Forget a waiting batch whose callers have all left: it is never run."""
        if not batch.calls:
            self._waiting.remove(batch)

    def _end(self) -> None:
        with self._lock:
            if self.ended:
                return
            self.ended = True
            notify_all, self._at_end = self._at_end, []
        self._executor.close()
        self.backend.close()
        for notify in notify_all:
            notify()

    def _log_failure(self, batch: Batch, error: BaseException) -> None:
        tell(
            logger,
            logging.ERROR,
            "%s: a batch of %d calls failed: %s",
            *(self.name, batch.size, type(error).__name__),
            exc_info=(type(error), error, error.__traceback__),
        )

    def _stopped(self) -> Stopped:
        return Stopped(f"{self.name}: stopped; start() it again to accept calls")

    def _killed(self) -> BackendError:
        return BackendError(
            f"{self.name}: what ran the batches was killed from outside; call again"
        )


def _notify(futures: list[Future[Any]]) -> None:
    """Tell who waits for futures that are done; runs no user's code."""
    for future in futures:
        future._notify()
