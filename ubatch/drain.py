"""How do all batchers of a process end, within a given time?"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ubatch import registry
from ubatch.log import tell
from ubatch.stats import Stats
from ubatch.ubatch import UBatch

logger = logging.getLogger(__name__)

LOOK = 0.01
"""Seconds between two looks. Nothing but the clock is waited for, so that nothing can
make this take longer than it may: no strand that died, no hub that stands still.
"""


def drain(left: Callable[[], float]) -> None:
    """Stop all batchers of this process, and wait for their calls while there is time.

    First those that have calls, and the others when these are through: a handler may
    need another batcher for its answer. Calls that are left when the time is up get
    Stopped. One line in the log tells what became of the calls of each.

    Args:
        left: Tells how many seconds are left; is asked at every look.
    """
    drained: list[_Drained] = []
    try:
        while left() > 0 and (found := _stop_more(drained)):
            drained += found
            while left() > 0 and any(each.calls() for each in found):
                # gevent's, where it has patched: the greenlets run meanwhile.
                time.sleep(LOOK)
    finally:
        drained += _stop_more(drained)
        for batcher in registry.alive():
            batcher._stop_soon()
        for each in drained:
            each.finish()
        if drained:
            time.sleep(LOOK)  # those who were told last may act on it


def _stop_more(drained: list[_Drained]) -> list[_Drained]:
    """Stop the batchers that have calls, but for those that were stopped before."""
    before = {id(each.batcher) for each in drained}
    alive = [each for each in registry.alive() if id(each) not in before]
    return [_Drained(each) for each in alive if _calls(each.stats())]


def _calls(stats: Stats) -> int:
    return stats.pending + stats.running


def _ended(stats: Stats) -> int:
    return stats.results_total + stats.failures_total + stats.expired_total


class _Drained:
    """One batcher that was stopped while it had calls."""

    def __init__(self, batcher: UBatch[Any, Any]) -> None:
        self.batcher = batcher
        self._began = time.monotonic()
        self._ended_before = _ended(batcher.stats())
        batcher._stop_soon()

    def calls(self) -> int:
        """Return how many calls can still be answered."""
        collector = self.batcher._in_this_process()
        if collector is None or not collector.backend.alive():
            return 0
        return _calls(self.batcher.stats())

    def finish(self) -> None:
        """End the calls that are left; log what became of all of them."""
        stats, seconds = self.batcher.stats(), time.monotonic() - self._began
        answered, left = _ended(stats) - self._ended_before, _calls(stats)
        message = "%s: drained for %.2f s: %d calls answered, %d left"
        if left:
            self.batcher._give_up()
            message += ", which get Stopped; allow more time, or set a deadline"
        level = logging.WARNING if left else logging.INFO
        tell(logger, level, message, stats.name, seconds, answered, left)
