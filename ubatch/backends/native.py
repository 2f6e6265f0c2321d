"""What is native, even where gevent has patched?

Looked up at each use: patching may come after the import of this module, and a
module imported after it would find gevent's things under the native names.
"""

from __future__ import annotations

import _thread
import sys
from collections.abc import Callable
from typing import Any


def allocate_lock() -> _thread.LockType:
    """Return a lock that blocks the thread, not the greenlet."""
    lock: _thread.LockType = _native("allocate_lock")()
    return lock


def start_thread(run: Callable[[], None]) -> None:
    """Run *run* in a daemon thread; it either starts, or this raises RuntimeError.

    ``threading.Thread.start()`` waits for the thread to come up, and what interrupts
    that wait cannot tell whether it did.
    """
    _native("start_new_thread")(run, ())


def _native(name: str) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    # Without it while another thread imports gevent: nothing is patched yet.
    original = getattr(monkey, "get_original", None)
    return original("_thread", name) if original else getattr(_thread, name)
