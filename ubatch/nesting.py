"""Would this wait be for ever? A handler may call batchers, even its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ubatch.errors import UBatchError

if TYPE_CHECKING:
    from ubatch.batch import Batch

running_batch: ContextVar[Batch | None] = ContextVar("running_batch", default=None)
"""The batch whose handler is running here, if one is."""


@contextmanager
def waiting_for(batch: Batch) -> Iterator[None]:
    """Say that the handler running here, if any, now waits for *batch*.

    Raises:
        UBatchError: Nothing but this handler's return could let *batch* end.
    """
    # Race (ring): 1. handler A marks that it waits for B; 2. handler B marks that
    #       it waits for A; 3. both look. Each marks before it looks, so the last one
    #       to mark sees the ring, and one of them at least is refused.
    mine = running_batch.get()
    if mine is None or batch.settled:
        yield
        return
    before, mine.blocked_on = mine.blocked_on, batch
    try:
        if not _can_end(batch, {mine}):
            raise UBatchError(
                f"{batch.collector.name}: a handler waits for a result that cannot "
                "come before it returns, since every worker (workers="
                f"{batch.collector.workers}) waits for it; call the function "
                "directly, or raise workers"
            )
        yield
    finally:
        mine.blocked_on = before


def _can_end(batch: Batch, blocked: set[Batch]) -> bool:
    """Follow who waits for whom until somebody is free to go on."""
    if batch in blocked:
        return False
    blocked.add(batch)
    if batch.running:
        return batch.blocked_on is None or _can_end(batch.blocked_on, blocked)
    if batch.collector.free_worker():
        return True
    running = batch.collector.running_batches()
    return any(_can_end(other, blocked) for other in running)
