"""What is native, even where gevent has patched?"""

from __future__ import annotations

import _thread
import sys


def allocate_lock() -> _thread.LockType:
    """Return a lock that blocks the thread, not the greenlet.

    Looked up at each use: patching may come after the import of this module, and
    a module imported after it would find gevent's lock under the native name.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return _thread.allocate_lock()
    lock: _thread.LockType = monkey.get_original("_thread", "allocate_lock")()
    return lock
