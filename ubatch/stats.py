"""What has a batcher done so far?"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


class Counters:
    """What was counted in one process, over all lives of a batcher there.

    Owner: changed and read only under ``lock``, which the collectors of those lives
    share: one may still drain when the next begins.
    Invariant: whoever is accepted adds one to ``pending``, and each step of a call
    takes it from one counter to another; so their sum is the calls accepted.
    """

    __slots__ = (
        "lock",
        "batches_total",
        "results_total",
        "failures_total",
        "cancelled_total",
        "expired_total",
        "rejected_total",
        "reruns_total",
        "stuck_total",
        "batch_sizes",
        "dispatch_reasons",
        "queued_seconds",
        "handler_seconds",
        "pending",
        "running",
        "stuck",
    )

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self.lock = lock
        self.batches_total = 0
        self.results_total = 0
        self.failures_total = 0
        self.cancelled_total = 0
        self.expired_total = 0
        self.rejected_total = 0
        self.reruns_total = 0
        self.stuck_total = 0
        self.batch_sizes: Counter[int] = Counter()
        self.dispatch_reasons: Counter[str] = Counter()
        self.queued_seconds = 0.0
        self.handler_seconds = 0.0
        self.pending = 0
        self.running = 0
        self.stuck = 0

    def closed(self, size: int, reason: str, queued: float) -> None:
        """Count a batch that goes to the handler."""
        self.pending -= size
        self.running += size
        self.batches_total += 1
        self.batch_sizes[size] += 1
        self.dispatch_reasons[reason] += 1
        self.queued_seconds += queued

    def ended(
        self,
        *,
        was_running: bool,
        results: int = 0,
        failures: int = 0,
        cancelled: int = 0,
        expired: int = 0,
    ) -> None:
        """Count calls that have ended, each in one way."""
        ended = results + failures + cancelled + expired
        if was_running:
            self.running -= ended
        else:
            self.pending -= ended
        self.results_total += results
        self.failures_total += failures
        self.cancelled_total += cancelled
        self.expired_total += expired

    def accepted(self) -> int:
        """Return how many calls were accepted so far."""
        ended = self.results_total + self.failures_total
        ended += self.cancelled_total + self.expired_total
        return ended + self.pending + self.running

    def snapshot(self, name: str, backend: str | None, executor: str) -> Stats:
        """Return what has been counted so far."""
        with self.lock:
            # Each is read once: on gevent the lock holds up no other native thread.
            results, failures = self.results_total, self.failures_total
            cancelled, expired = self.cancelled_total, self.expired_total
            pending, running = self.pending, self.running
            ended = results + failures + cancelled + expired
            return Stats(
                name=name,
                backend=backend,
                executor=executor,
                calls_total=ended + pending + running,
                batches_total=self.batches_total,
                results_total=results,
                failures_total=failures,
                cancelled_total=cancelled,
                expired_total=expired,
                rejected_total=self.rejected_total,
                reruns_total=self.reruns_total,
                stuck_total=self.stuck_total,
                batch_sizes=dict(sorted(self.batch_sizes.items())),
                dispatch_reasons=dict(self.dispatch_reasons),
                queued_seconds=self.queued_seconds,
                handler_seconds=self.handler_seconds,
                pending=pending,
                running=running,
                stuck=self.stuck,
            )


def nothing() -> Counters:
    """Return the counters of a batcher that has not been called in this process."""
    return Counters(nullcontext())


@dataclass(frozen=True, slots=True)
class Stats:
    """What one batcher did in this process, since its first call here.

    A snapshot: it does not change. Each gunicorn worker has its own numbers.
    ``calls_total`` is the sum of results, failures, cancelled, expired, pending and
    running. ``dataclasses.asdict()`` turns it into what JSON takes.
    """

    name: str
    """The batcher's name, as in its log lines."""
    backend: str | None
    """``"gevent"`` or ``"thread"``; None until the first call decides it."""
    executor: str
    """What runs the handler: the option's value, or the class of the object."""
    calls_total: int
    """Calls accepted."""
    batches_total: int
    """Batches handed to the handler."""
    results_total: int
    """Calls answered with a result."""
    failures_total: int
    """Calls answered with an error of the handler's, or cut off by stop()."""
    cancelled_total: int
    """Calls given up by their caller: killed, timed out outside, cancelled."""
    expired_total: int
    """Calls answered with DeadlineExceeded: late, given up in time, or stuck."""
    rejected_total: int
    """Calls refused with QueueFull; not part of ``calls_total``."""
    reruns_total: int
    """Handler runs beyond one per batch, on parts of it: ``on_error="isolate"``."""
    stuck_total: int
    """Batches whose handler ran past ``handler_timeout``."""
    batch_sizes: dict[int, int]
    """How many batches had how many calls: ``{size: batches}``."""
    dispatch_reasons: dict[str, int]
    """How many batches closed for which reason: full, timeout, deadline, settled, now,
    stop."""
    queued_seconds: float
    """Seconds that calls waited for their batch to close, or until they left it,
    summed over calls."""
    handler_seconds: float
    """Seconds that the handler ran, summed over batches."""
    pending: int
    """Calls waiting now."""
    running: int
    """Calls in a running batch now."""
    stuck: int
    """Workers whose handler has run past ``handler_timeout`` and has not returned."""

    @property
    def mean_batch_size(self) -> float:
        """Calls per batch so far; 0.0 before the first batch."""
        calls = sum(size * count for size, count in self.batch_sizes.items())
        return calls / self.batches_total if self.batches_total else 0.0
