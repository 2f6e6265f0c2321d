"""What do other native threads want done on a hub?

Nothing of gevent's is touched from another thread but ``send()`` of an async watcher.
Its queues and events lose wake-ups there; ``loop.run_callback_threadsafe`` loses none,
but it counts the loop's watchers up while libev, which runs without the GIL, counts
them down: now and then a count is lost, and at last the loop takes itself to be empty
(LoopExit, in 3 of about 180 runs of 100,000 calls).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from gevent._hub_local import get_hub_if_exists
from gevent.hub import Hub

from ubatch import process


class Inbox:
    """What other threads want done on a hub; one for each hub, as long as it lives.

    Owner: anybody appends; only the hub's thread takes out, and touches the watcher
    but for ``send()``.
    Race (last_taken): 1. the hub takes the last one out; 2. a thread appends and sends;
    3. the hub returns to its loop. The send is remembered, and the loop comes back.
    """

    def __init__(self, hub: Hub) -> None:
        self._wanted: deque[Callable[[], object]] = deque()
        self._epoch = process.epoch
        self._watcher: Any = None
        self._loop = hub.loop
        if get_hub_if_exists() is hub:
            self._open()
        else:  # once in the life of a hub: see make()
            self._loop.run_callback_threadsafe(self._open)

    @staticmethod
    def of(hub: Hub) -> Inbox:
        """Return the inbox of a hub in this process."""
        inbox = _inboxes.get(hub)
        if inbox is None or inbox._epoch is not process.epoch:
            inbox = _inboxes[hub] = Inbox(hub)
        return inbox

    def _open(self) -> None:
        # It does not keep the loop alive: waiting for strangers does not either.
        self._watcher = self._loop.async_(ref=False)
        self._watcher.start(self._take_out)
        self._take_out()

    def send(self, fn: Callable[[], object]) -> bool:
        """Have *fn*, which raises nothing, run on the hub; False if it is gone."""
        self._wanted.append(fn)
        try:
            if self._watcher is not None:
                self._watcher.send()
        except ValueError:  # its loop is destroyed
            return False
        return True

    def _take_out(self) -> None:
        if self._epoch is not process.epoch:
            return  # what the parent's threads wanted, the parent does
        while self._wanted:
            try:
                self._wanted.popleft()()
            except BaseException:
                self._watcher.send()  # the rest is not lost
                raise


_inboxes: weakref.WeakKeyDictionary[Hub, Inbox] = weakref.WeakKeyDictionary()
