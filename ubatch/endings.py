"""How does a call end?

Each ends once: with its answer, with an error, or because its caller went away. What
ends it takes it out of its batch under the lock, and tells its caller after that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import CancelledError
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from ubatch.batch import Batch, Caller, Told
from ubatch.errors import BackendError, DeadlineExceeded, Failure, kind_of
from ubatch.executors import Outcome
from ubatch.future import Future
from ubatch.log import tell

if TYPE_CHECKING:
    from ubatch.collector import Collector

logger = logging.getLogger(__name__)

Owed = tuple[Iterator[Told], Iterator[Future[Any]], Set[Caller]]
"""Who is to be told what, which futures are done, and who is not to be told."""


class Endings:
    """Ends the calls of one collector.

    Owner: as the collector's, whose lock this takes; but a method that begins with
    an underscore is called under it, as give_up_due() and fail_waiting() are.
    Invariant: a call that was taken out of its batch, and whose caller has not been
    told, is owed. Whoever tells tells all that is owed, each once: if a signal's
    exception ends one that would have told, the next one does.
    """

    def __init__(self, collector: Collector) -> None:
        self._name = collector.name
        self._collector = collector
        self._lock = collector.lock
        self._counters = collector.counters
        self._owed: dict[int, Owed] = {}

    def settle(self, batch: Batch, outcome: Outcome) -> None:
        """End every call of a batch that has not ended yet."""
        with self._lock:
            self._counters.handler_seconds += outcome.seconds
            self._counters.reruns_total += outcome.reruns
            if batch.settled:  # somebody lost patience before the handler returned
                return
            self._settle(batch, outcome)
        self.tell()
        if batch.running:
            self._log_failure(batch, outcome)

    def answer(self, batch: Batch, answers: list[tuple[int, Any]]) -> None:
        """End some calls of a batch that runs, before the others."""
        with self._lock:
            if batch.settled:
                return
            told = batch.answer(answers)
            self._finish(batch, told)
            self._count(batch, told)
        self.tell()

    def fail(self, batches: Iterable[Batch], error: Exception) -> None:
        """End every call of these batches, which run, with an error of ours."""
        for batch in batches:
            self.settle(batch, Outcome(None, Failure(error), 0.0))
        self.tell()  # also of those that waited, or where somebody was cut off

    def fail_waiting(self, error: Exception) -> None:
        """End every call that waits with an error of ours. Under the lock; tell() then.

        Each batch waits until its turn: whatever cuts this off, none is lost.
        """
        for batch in list(self._collector.waiting):
            self._settle(batch, Outcome(None, Failure(error), 0.0))

    def tell(self) -> None:
        """Tell who waits for calls that have ended; runs no user's code."""
        for key, (told, futures, gone) in list(self._owed.items()):
            self._collector.backend.tell(told, gone)
            for future in futures:
                future._notify()
            self._owed.pop(key, None)

    def leave(self, batch: Batch, caller: Caller) -> None:
        """Give a call up on behalf of a caller that goes away."""
        with self._lock:
            if caller in batch.calls:
                if batch.running:
                    self._collector.left(batch, caller)
                batch.leave(caller, monotonic())
                batch.gone.discard(caller)  # there is nothing to hold back
                self._counters.ended(was_running=batch.running, cancelled=1)
                self._drop_if_empty(batch)

    def cancel(self, future: Future[Any]) -> bool:
        """Take a call out for good, if no worker has it."""
        batch = future._batch
        with self._lock:
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

    def give_up_due(self, now: float) -> bool:
        """End the calls that are out of time. Under the lock; True if tell() is due."""
        collector = self._collector
        if now < collector.deadlines.next:
            return False
        calls, stuck = collector.deadlines.due(now)
        for batch, callers in calls:
            self._expire(batch, callers, now)
        for batch in stuck:
            self._give_up(batch)
        if stuck and not collector.strands.at_work:  # nor can be: see replace()
            self.fail_waiting(self.stuck())
        return bool(calls or stuck)

    def ring(self) -> None:
        """Look for calls that are out of time; the alarm calls this."""
        collector = self._collector
        if collector.inherited():
            return
        with self._lock:
            collector.deadlines.rang()
            self.give_up_due(monotonic())
            # Race (stopping): 1. stop() closes the life, which was never started; 2.
            #       the alarm rings for one of those who wait; 3. stop() looks whether
            #       all has ended, and has the others told if it has not.
            idle = not collector.waiting and not collector.strands.at_work
            end = collector.life.closed and idle
        self.tell()
        if end:
            collector.end()

    def killed(self) -> BackendError:
        """Return the error of calls whose strand died."""
        return BackendError(
            f"{self._name}: what ran the batches was killed from outside; call again"
        )

    def stuck(self) -> BackendError:
        """Return the error of calls that no worker will ever run."""
        return BackendError(
            f"{self._name}: every worker (workers={self._collector.workers}), and what "
            "could replace it, is stuck in the handler past handler_timeout; restart "
            "this process"
        )

    def _expire(self, batch: Batch, callers: list[Caller], now: float) -> None:
        told: list[Told] = []
        for caller in callers:
            at, seconds = batch.deadlines[caller]
            batch.leave(caller, min(now, at))
            message = f"no result within the call's deadline of {seconds:g} seconds"
            if now < at:
                message = (
                    f"given up {at - now:.2g} s before the call's deadline of "
                    f"{seconds:g} seconds: none of the handler's last runs was as short"
                )
            elif not self._collector.life.started:
                message += "; start() has not been called"
            error = DeadlineExceeded(f"{self._name}: {message}")
            alone = not isinstance(caller, Future)  # whose result() may be asked twice
            told.append((caller, Failure(error, alone)))
        self._finish(batch, told)
        self._counters.ended(was_running=batch.running, expired=len(told))
        self._drop_if_empty(batch)

    def _settle(self, batch: Batch, outcome: Outcome) -> None:
        told = batch.settle(outcome.answers, outcome.failure)
        self._finish(batch, told)
        if outcome.failure is not None or outcome.failures:
            self._count(batch, told)
        else:
            self._counters.ended(was_running=batch.running, results=len(told))
        if not batch.running or batch.limit == inf:  # or it may yet run too long
            self._collector.deadlines.forget(batch)
        if not batch.running:
            self._collector.waiting.remove(batch)

    def _give_up(self, batch: Batch) -> None:
        """End the calls of a batch whose handler runs too long, and go on without it.

        Race (returned): 1. the alarm finds that the handler runs too long; 2. the
        handler returns. The batch is settled once, by whoever has the lock first.
        """
        collector, limit = self._collector, batch.limit - batch.began
        error = DeadlineExceeded(
            f"{self._name}: the handler has run for handler_timeout={limit:g} seconds, "
            "and is not waited for any longer"
        )
        told = batch.settle(None, Failure(error))
        self._finish(batch, told)
        self._counters.ended(was_running=True, expired=len(told))
        self._counters.stuck += 1
        self._counters.stuck_total += 1
        collector.deadlines.forget(batch)
        collector.give_up(batch)
        collector.strands.replace(batch)
        figures = limit, batch.size, len(told), self._counters.stuck
        log = partial(self._log_stuck, *figures, collector.strands.places)
        collector.backend.defer(log)

    def _count(self, batch: Batch, told: list[Told]) -> None:
        errors = [answer.error for _, answer in told if type(answer) is Failure]
        # A model server may find, before we do, that a call's time is up.
        expired = sum(isinstance(error, DeadlineExceeded) for error in errors)
        self._counters.ended(
            was_running=batch.running,
            results=len(told) - len(errors),
            failures=len(errors) - expired,
            expired=expired,
        )

    def _finish(self, batch: Batch, told: list[Told]) -> None:
        """Finish the futures among those who are to be told, and owe that to them."""
        futures: list[Future[Any]] = []
        parked = told
        if batch.futures:
            parked = []
            for one in told:
                caller, answer = one
                if isinstance(caller, Future):
                    batch.futures.discard(caller)
                    caller._finish(answer)
                    futures.append(caller)
                else:
                    parked.append(one)
        owed = iter(parked), iter(futures), batch.gone
        self._owed[id(owed)] = owed

    def _drop_if_empty(self, batch: Batch) -> None:
        """Forget a waiting batch whose callers have all left: it is never run."""
        collector = self._collector
        if not batch.calls and not batch.running:
            self._counters.queued_seconds += batch.queued(0.0)
            collector.waiting.remove(batch)
            collector.deadlines.forget(batch)
            if not collector.waiting:  # or a strand that lingered would keep its timer
                collector.strands.look()

    def _log_failure(self, batch: Batch, outcome: Outcome) -> None:
        first = outcome.failure or outcome.first
        if first is None:
            return
        error, how = first.error, "failed"
        if outcome.reruns and outcome.failure is None:
            how = (
                f"failed; run again in parts, {outcome.reruns} times, only "
                f"{len(outcome.failures)} did"
            )
        tell(
            logger,
            logging.ERROR,
            "%s: a batch of %d calls %s: %s",
            *(self._name, batch.size, how, kind_of(error)),
            exc_info=(type(error), error, error.__traceback__),
        )

    def _log_stuck(self, *figures: float) -> None:
        tell(
            logger,
            logging.ERROR,
            "%s: the handler has run for %g s, its handler_timeout, on a batch of %d "
            "calls; the %d that still waited get DeadlineExceeded (workers stuck: %d, "
            "still at work or to be had: %d)",
            *(self._name, *figures),
        )
