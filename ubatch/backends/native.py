"""What is native, even where gevent has patched?

Looked up at each use: patching may come after the import of this module, and a
module imported after it would find gevent's things under the native names.
"""

from __future__ import annotations

import _thread
import os
import select
import sys
from collections.abc import Callable
from math import ceil
from types import ModuleType
from typing import Any

LONGEST_POLL = 2**31 - 1
"""Milliseconds that poll() counts."""


def allocate_lock() -> _thread.LockType:
    """Return a lock that blocks the thread, not the greenlet."""
    lock: _thread.LockType = _native(_thread, "allocate_lock")()
    return lock


def start_thread(run: Callable[[], None]) -> None:
    """Run *run* in a daemon thread; it either starts, or this raises RuntimeError.

    ``threading.Thread.start()`` waits for the thread to come up, and what interrupts
    that wait cannot tell whether it did.
    """
    _native(_thread, "start_new_thread")(run, ())


def wait_for(fd: int, write: bool = False, timeout: float | None = None) -> bool:
    """Block this thread until *fd* can be read or written; False after *timeout*."""
    poll = _native(select, "poll")()
    poll.register(fd, select.POLLOUT if write else select.POLLIN)
    wait = None if timeout is None else min(ceil(timeout * 1000), LONGEST_POLL)
    return bool(poll.poll(wait))


def start_process(*args: Any, **kwargs: Any) -> int:
    """Start a process, as ``os.posix_spawn``; gevent's would watch for its end."""
    pid: int = _native(os, "posix_spawn")(*args, **kwargs)
    return pid


def _native(module: ModuleType, name: str) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    # Without it while another thread imports gevent: nothing is patched yet.
    original = getattr(monkey, "get_original", None)
    return original(module.__name__, name) if original else getattr(module, name)
