"""What should become of every call? The truth, without a thread or a clock.

A model is told what is done to a batcher, and what its handler was given. It says who
waits, who runs and how each call ends, and refuses a batch that should not be.
"""

from __future__ import annotations

from collections import Counter

from tests.blame import Runs
from tests.ends import (
    BROKEN,
    CANCELLED,
    EXPIRED,
    JAMMED,
    STOPPED,
    STUCK,
    Call,
    End,
    Way,
)


class Batch:
    """Calls that are together, in order of arrival."""

    def __init__(self, life: Life, shape: str) -> None:
        self.life = life
        self.shape = shape
        self.calls: list[Call] = []
        self.sealed = False  # it has been full, and takes no more
        self.hurried = False  # it may close early, for a deadline in it
        self.lost = False  # a process was killed that had it
        self.runs: Runs  # as soon as it is closed

    def alive(self) -> list[Call]:
        return [call for call in self.calls if call.end is None]


class Life:
    """From start() to stop()."""

    def __init__(self) -> None:
        self.started = False
        self.closed = False
        self.killed = False  # and what ran there, by stop()
        self.called = False  # something was made for it, which stop() has to end
        self.waiting: list[Batch] = []
        self.running: list[Batch] = []
        self.stuck: list[Batch] = []  # they ran too long, and others run beside them

    def has_ended(self) -> bool:
        waiting = any(batch.alive() for batch in self.waiting)
        return self.closed and not self.running and not waiting


class Model:
    """A batcher, as it should be."""

    def __init__(
        self,
        max_size: int,
        max_pending: int | None,
        workers: int,
        linger: str,
        isolate: bool,
    ) -> None:
        self.max_size = max_size
        self.max_pending = max_pending
        self.workers = workers
        self.linger = linger
        self.isolate = isolate
        self.broken = False  # the executor is: batches fail as soon as they close
        self.lives = [Life()]
        self.arriving: list[Call] = []  # while a free worker takes what is there
        self.counts: Counter[str] = Counter()

    @property
    def life(self) -> Life:
        return self.lives[-1]

    def pending(self) -> int:
        waiting = [batch for life in self.lives for batch in life.waiting]
        return sum(len(batch.alive()) for batch in waiting) + len(self.arriving)

    def running(self) -> int:
        running = [batch for life in self.lives for batch in life.running]
        return sum(len(batch.alive()) for batch in running)

    def is_full(self, more: int = 1) -> bool:
        if self.max_pending is None:
            return False
        return self.pending() + more > self.max_pending

    def stuck(self) -> int:
        return sum(len(life.stuck) for life in self.lives)

    def places(self, life: Life) -> int:
        """Return how many batches may run: for each worker one more may be stuck."""
        return min(self.workers, 2 * self.workers - len(life.stuck))

    def has_free_worker(self) -> bool:
        return self.life.started and len(self.life.running) < self.places(self.life)

    def is_jammed(self) -> bool:
        """Tell whether no call can be run: all workers are stuck, and those beside."""
        return self.places(self.life) == 0

    def most_at_once(self) -> int:
        """Return how many handlers may run at once if no more get stuck."""
        lives = [life for life in self.lives if not life.has_ended()]
        return self.stuck() + sum(self.places(life) for life in lives)

    # What callers do.

    def join(self, call: Call) -> Call:
        """Accept a call, into the open batch of its shape."""
        self.life.called = True
        self.counts["calls"] += 1
        self._join(call)
        return call

    def join_one_by_one(self, calls: list[Call]) -> None:
        """Accept calls, any of which a free worker may take before the next comes."""
        self.life.called = True
        self.counts["calls"] += len(calls)
        self.arriving = list(calls)

    def _join(self, call: Call) -> None:
        for batch in self.life.waiting:
            if batch.shape == call.shape and not batch.sealed:
                break
        else:
            batch = Batch(self.life, call.shape)
            self.life.waiting.append(batch)
        batch.calls.append(call)
        batch.sealed = len(batch.alive()) >= self.max_size
        call.batch = batch

    def finish(self, call: Call, end: End) -> None:
        """End a call.

        If it waited, it stays in its batch until the next tidy(): a worker may have
        closed that before.
        """
        assert call.end is None, f"{call} ends a second time, with {end}"
        call.end = end
        self.counts[end.counter] += 1
        if end is EXPIRED and call.batch is not None:
            call.batch.hurried = True

    def give_up(self, call: Call) -> None:
        """Cancel a call that waits, if its batch is not closed just now."""
        self.finish(call, CANCELLED)
        call.doomed = True

    def _revive(self, call: Call) -> None:
        """Take note that a worker was quicker than cancel(): the call runs on."""
        self.counts[CANCELLED.counter] -= 1
        call.end = None

    def tidy(self) -> None:
        """Take those that have ended out of what waits: all is at rest."""
        arriving, self.arriving = self.arriving, []
        for call in arriving:
            self._join(call)
        for life in self.lives:
            for batch in life.waiting:
                batch.calls = batch.alive()
            life.waiting = [batch for batch in life.waiting if batch.calls]

    # What workers do.

    def closable(self, life: Life, hurried: bool = False) -> list[Batch]:
        """Return the batches of which a free worker should take one, in order.

        Args:
            hurried: Those too that it need not take, but may.
        """
        if not life.started or len(life.running) >= self.places(life):
            return []
        waiting = life.waiting
        if life.closed or self.linger != "full":
            return waiting[:]
        return [one for one in waiting if one.sealed or hurried and one.hurried]

    def is_at_rest(self) -> bool:
        """Tell whether no worker has anything left to take, or to run again."""
        if self.arriving and self.has_free_worker():
            return False
        if not all(one.runs.running for life in self.lives for one in life.running):
            return False
        due = [batch for life in self.lives for batch in self.closable(life)]
        return not any(batch.alive() for batch in due)

    def given(self, calls: list[Call]) -> Batch:
        """Check what the handler was given: a batch, or a part of one that failed."""
        batch = calls[0].batch
        if batch is None or batch not in batch.life.running:
            return self.close(calls)
        batch.runs.again(calls)
        return batch

    def close(self, calls: list[Call]) -> Batch:
        """Check a batch that is new to the handler, and take it to be running."""
        assert 0 < len(calls) <= self.max_size, f"a batch of {len(calls)}"
        batch = calls[0].batch
        if batch is None:
            batch = self._arrived(calls)
        else:
            assert batch in batch.life.waiting, f"{calls} ran before, or left"
            self._check_turn(batch)
            wanted = [one for one in batch.calls if one.end is None or one in calls]
            assert wanted == calls, f"{calls} instead of {wanted}"
            batch.life.waiting.remove(batch)
        for call in calls:
            if call.doomed:
                self._revive(call)
        batch.calls = calls
        batch.runs = Runs(calls, self.isolate)
        batch.life.running.append(batch)
        self._count(batch)
        return batch

    def _check_turn(self, batch: Batch) -> None:
        may_close = self.closable(batch.life, hurried=True)
        assert batch in may_close, f"{batch.calls} should wait"
        in_order = batch.life.closed or self.linger in ("now", "full")
        if self.workers == 1 and in_order:
            before = batch.life.waiting[: batch.life.waiting.index(batch)]
            earlier = [one for one in self.closable(batch.life) if one in before]
            assert not any(other.alive() for other in earlier), "out of turn"

    def _arrived(self, calls: list[Call]) -> Batch:
        first = self.arriving.index(calls[0])
        assert calls == self.arriving[first : first + len(calls)], "out of order"
        del self.arriving[first : first + len(calls)]
        batch = Batch(self.life, calls[0].shape)
        for call in calls:
            call.batch = batch
        return batch

    def _count(self, batch: Batch) -> None:
        self.counts["batches"] += 1
        self.counts["batched"] += len(batch.calls)

    def answer(self, batch: Batch, way: Way, picked: set[int]) -> None:
        """End a run, and its batch if that was the last one.

        Args:
            picked: The places that get an error of their own, if any do.
        """
        batch.runs.end(way, picked, wanted=self.is_wanted(batch))
        if not batch.runs.over:
            return
        self.counts["reruns"] += batch.runs.count - 1
        life = batch.life
        (life.stuck if batch in life.stuck else life.running).remove(batch)
        for call in batch.alive():
            self.finish(call, batch.runs.ends[call])

    def is_wanted(self, batch: Batch) -> bool:
        """Tell whether a batch that failed may be run further, in parts."""
        return bool(batch.alive())

    def stick(self, batch: Batch) -> None:
        """Give a running batch up, whose handler runs for too long."""
        life = batch.life
        life.running.remove(batch)
        life.stuck.append(batch)
        self.counts["stuck"] += 1
        for call in batch.alive():
            self.finish(call, STUCK)
        if not self.places(life):  # so nobody will run what waits
            for call in [call for one in life.waiting for call in one.alive()]:
                self.finish(call, JAMMED)

    def fail_what_closes(self) -> None:
        """Fail what a broken executor is given."""
        for life in self.lives:
            while closable := [one for one in self.closable(life) if one.alive()]:
                life.waiting.remove(closable[0])
                for call in closable[0].alive():
                    self.finish(call, BROKEN)

    # What the owner does.

    def start(self) -> None:
        if self.life.closed:
            self.lives.append(Life())
        self.life.started = True

    def stop(self, patient: bool) -> Life | None:
        """Close this life; return the one that stop() ends, if there is one."""
        self.life.closed = True
        called = [life for life in self.lives if life.called]
        if not called or called[-1].has_ended():
            return None
        life = called[-1]
        left = [*life.waiting, *life.running] if not patient else life.waiting
        if not patient or not life.started:
            for batch in left:
                for call in batch.alive():
                    self.finish(call, STOPPED)
        return life
