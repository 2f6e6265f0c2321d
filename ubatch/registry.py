"""Which batchers are alive in this process?

Each UBatch adds itself when it is made; one that is forgotten goes by itself. After
a fork the child knows those of its parent, and they are its own.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ubatch.ubatch import UBatch

# By identity, since a subclass may compare and hash as it likes.
# Owner: anybody, without a lock: each step on the dict is one that nothing interrupts.
# Race (replaced): 1. a batcher dies, and its reference with it; 2. another takes its
#       place in memory. The first one's callback has run by then: the memory is not yet
#       free.
_alive: dict[int, weakref.ref[UBatch[Any, Any]]] = {}


def add(batcher: UBatch[Any, Any]) -> None:
    """Take note of a new batcher, without keeping it alive."""
    key, forget = id(batcher), _alive.pop  # at exit, this module may be gone first
    _alive[key] = weakref.ref(batcher, lambda _: forget(key, None))


def alive() -> list[UBatch[Any, Any]]:
    """Return the batchers that are alive, the oldest first."""
    found = (reference() for reference in list(_alive.values()))
    return [batcher for batcher in found if batcher is not None]
