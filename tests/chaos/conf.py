"""How does chaos run gunicorn, and what do its workers tell of themselves?"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import psutil

from tests.chaos.journal import HOME, Journal
from tests.chaos.plan import ALARM, BATCHERS, KIND, socket_of
from ubatch import gunicorn as hooks

# A file in the user's home, that all gunicorns would share. Older ones know none.
control_socket_disable = True
worker_class = os.environ.get(KIND, "gevent")
threads = 64 if worker_class == "gthread" else 1
workers = 2

# The server ends by itself if whoever started it was killed.
signal.alarm(int(os.environ[ALARM]))

worker_exit = hooks.worker_exit

_kind = BATCHERS["server"]
on_starting, on_reload, on_exit = hooks.serve(
    "tests.chaos.handler:server",
    socket=socket_of(os.environ[HOME]),
    max_size=16,
    processes=_kind.workers,
    max_pending=_kind.max_pending,
    on_error=_kind.on_error,
    handler_timeout=_kind.limit,
    retry=_kind.retry,
)

PULSE = 0.25
"""Seconds between two looks of a worker at itself."""


def pre_request(worker: Any, request: Any) -> None:
    """Note who takes a request up, as soon as its head has been read."""
    for name, value in request.headers:
        if name == "X-ID":
            worker.journal.write(begun=value)


def post_worker_init(worker: Any) -> None:
    """Have the worker tell how it is, from now on."""
    from tests.chaos.handler import journal

    hooks.post_worker_init(worker)
    worker.journal = journal
    # Where gevent has patched, this is a greenlet.
    threading.Thread(target=_pulse, args=(worker.journal,), daemon=True).start()


def _pulse(journal: Journal) -> None:
    from tests.chaos.app import batchers
    from tests.chaos.handler import at_work

    process = psutil.Process()
    while True:
        each_seen = {name: batcher.stats() for name, batcher in batchers.items()}
        seen = each_seen.values()
        journal.write(
            rss=process.memory_info().rss,
            fds=process.num_fds(),
            threads=process.num_threads(),
            calls=sum(each.calls_total for each in seen),
            at_work=len(at_work),
            left=sum(each.pending + each.running for each in seen),
            stuck=sum(each.stuck for each in seen),
            found_stuck={name: each.stuck_total for name, each in each_seen.items()},
        )
        time.sleep(PULSE)
