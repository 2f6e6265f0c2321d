"""Has the batcher been started, and has it been stopped?

One life lasts from start() to stop(). It is the one place where that is written
down: the batcher and the collectors of its life all read it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ubatch import process

if TYPE_CHECKING:
    from ubatch.collector import Collector


class Life:
    """One life of a batcher, in every process that it reaches by forking.

    Owner: anybody, without a lock; a flag is only ever set, and a dict takes the
    first of two that are put in at once.
    Race (crossed): 1. _begin() puts a collector in; 2. stop() closes the life, and
    then looks for its collector. Whoever comes second sees what the first did: a
    collector reads ``closed`` at every call. The same holds for start() and
    ``started``.
    """

    __slots__ = ("started", "closed", "_collectors", "_next")

    def __init__(self) -> None:
        self.started = False
        self.closed = False
        self._collectors: dict[process.Epoch, Collector] = {}
        self._next: dict[str, Life] = {}

    @property
    def collector(self) -> Collector | None:
        """What serves this life in this process, if a call has been made here."""
        return self._collectors.get(process.epoch)

    def publish(self, collector: Collector) -> Collector:
        """Put a collector in; return the one that was first."""
        for epoch in set(self._collectors) - {process.epoch}:
            del self._collectors[epoch]  # a parent's, with its calls
        return self._collectors.setdefault(process.epoch, collector)

    def forget(self, collector: Collector) -> None:
        """Take a collector out that can serve no more."""
        if self.collector is collector:
            del self._collectors[process.epoch]

    def after(self) -> Life:
        """Return the life that follows this one, the same for all who ask."""
        return self._next.setdefault("life", Life())


def close(life: Life, before: Collector | None) -> Collector | None:
    """Have a life refuse new calls; return what has yet to end."""
    life.closed = True
    collector = life.collector or before  # a first call may just have made it
    if collector is None or collector.ended or not collector.life.closed:
        return None
    return collector


def end(collector: Collector, timeout: float | None) -> None:
    """End a collector whose life is closed, and wait for that."""
    backend = collector.backend
    if not backend.alive():
        return
    backend.in_owner(collector.begin_stop)
    if not collector.is_inside():
        latch = backend.latch_here()
        backend.in_owner(lambda: collector.at_end(latch.set))
        latch.wait(timeout)
        if not collector.ended:
            backend.in_owner(collector.abandon)
    collector.finalizer.detach()


def have_done(collector: Collector, act: Callable[[], None]) -> None:
    """Do what does not block; at once, unless the hub of another thread has to."""
    if collector.backend.is_foreign():
        collector.backend.soon(act)
    elif collector.backend.alive():
        act()


def forget(life: Life, collector: Collector) -> None:
    """Close a life whose batcher is garbage; what was accepted is run."""
    life.closed = True
    if not collector.inherited():
        collector.backend.soon(collector.begin_stop)
