"""How does chaos run gunicorn, and what do its workers tell of themselves?"""

from __future__ import annotations

import os
from typing import Any

from tests.chaos.journal import HOME, Journal

# A file in the user's home, that all gunicorns would share. Older ones know none.
control_socket_disable = True
worker_class = "gevent"
workers = 2

PULSE = 0.25
"""Seconds between two looks of a worker at itself."""


def pre_request(worker: Any, request: Any) -> None:
    """Note who takes a request up, as soon as its head has been read."""
    for name, value in request.headers:
        if name == "X-ID":
            worker.journal.write(begun=value)


def post_worker_init(worker: Any) -> None:
    """Have the worker tell how it is, from now on."""
    import gevent

    _fill_the_pool()
    worker.journal = Journal(os.environ[HOME])
    gevent.spawn(_pulse, worker.journal)


def _fill_the_pool() -> None:
    """Start all threads that the hub's pool may have: they are no growth.

    Each has a hub of its own from its first time.sleep() on, which is patched.
    """
    import time

    import gevent

    pool = gevent.get_hub().threadpool
    gevent.joinall([pool.spawn(time.sleep, 0.05) for _ in range(pool.maxsize)])


def _pulse(journal: Journal) -> None:
    import gevent
    import psutil

    from tests.chaos.app import batchers

    process = psutil.Process()
    while True:
        seen = [batcher.stats() for batcher in batchers.values()]
        journal.write(
            rss=process.memory_info().rss,
            fds=process.num_fds(),
            threads=process.num_threads(),
            calls=sum(each.calls_total for each in seen),
            left=sum(each.pending + each.running for each in seen),
        )
        gevent.sleep(PULSE)
