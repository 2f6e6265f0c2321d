"""What do gunicorn's workers do for their batchers, when they begin and end?

Import both hooks in ``gunicorn.conf.py``; hooks of your own call them::

    from ubatch.gunicorn import post_worker_init, worker_exit
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from time import monotonic
from typing import Any, NamedTuple

from ubatch import registry
from ubatch.address import path_of
from ubatch.drain import drain
from ubatch.isolation import OnError
from ubatch.log import tell
from ubatch.policy import Linger
from ubatch.processes import ProcessExecutor
from ubatch.remote import ServerExecutor
from ubatch.sidecar import Sidecar
from ubatch.ubatch import UBatch

logger = logging.getLogger(__name__)

RESERVE = 0.5
"""Seconds that a worker keeps for itself, to end before it is killed."""
QUICK = {signal.SIGINT: 2.0, signal.SIGQUIT: 2.0, signal.SIGABRT: 1.0}
"""Seconds from a signal that wants a quick end to the kill.

At the least, as of gunicorn 27: 2 where a graceful end has begun already, and about one
after SIGABRT. Where it would wait longer, whoever asked for a quick end would not.
"""


def post_worker_init(worker: Any) -> None:
    """Warn of settings under which batches cannot be full; note when the end begins.

    The warnings are for the batchers that the application has made by now.
    """
    global _watch
    _watch = _Watch(worker.cfg)
    _watch.over(worker)
    warnings = (line for each in registry.alive() for line in _warnings(worker, each))
    for line in dict.fromkeys(warnings):  # the batchers of instances share a name
        tell(logger, logging.WARNING, "%s", line)


def worker_exit(server: Any, worker: Any) -> None:
    """Answer the calls that still wait, within what is left of graceful_timeout.

    Requests that wait are gunicorn's affair: a graceful end lets them finish first.
    This is for what nobody waited for, such as a submit() whose request has ended.
    ``timeout`` limits it too, since the worker gives no sign of life meanwhile.
    """
    if worker.pid != os.getpid():
        return  # the master calls this for a worker that it finds gone
    watch = _watch or _Watch(worker.cfg)  # it did not get as far as the other hook
    watch.end = min(watch.end, monotonic() + worker.cfg.graceful_timeout)
    drain(watch.left)


class Hooks(NamedTuple):
    """What gunicorn is to call, under these names."""

    on_starting: Callable[[Any], None]
    on_reload: Callable[[Any], None]
    on_exit: Callable[[Any], None]


def serve(
    factory: str,
    *,
    socket: str,
    max_size: int = 64,
    timeout: float = 0.01,
    processes: int = 1,
    linger: Linger = "adaptive",
    max_pending: int | None = None,
    deadline: float | None = None,
    on_error: OnError = "fail",
    handler_timeout: float | None = None,
    retry: bool = False,
) -> Hooks:
    """Have gunicorn run a model server beside its workers, and keep it running.

    In ``gunicorn.conf.py``; the workers reach it by ``UBatch.connect()``::

        on_starting, on_reload, on_exit = serve(
            "package.module:factory", socket="/run/app/model.sock"
        )

    It starts with the master, is started again when it is lost, loads its model anew on
    SIGHUP, and ends when the workers have. The master does not import the factory.

    Args:
        factory: ``"package.module:factory"``: what returns the handler.
        socket: The path where it listens; the folder is made, if there is none.
        max_size: As in UBatch, and so are those below.
        timeout: Seconds to linger.
        processes: Model processes; as in ProcessExecutor.
        linger: What to wait for.
        max_pending: Calls that may wait.
        deadline: Seconds for calls that come without one.
        on_error: What to do with a failed batch.
        handler_timeout: Seconds for a batch.
        retry: Run what a lost process had again, once.

    Raises:
        ValueError: An option makes no sense.
        TypeError: An option is of the wrong kind.
    """
    executor = ProcessExecutor(factory, processes, retry=retry)
    UBatch[Any, Any](  # which looks at them all
        *(max_size, timeout),
        executor=executor,
        linger=linger,
        max_pending=max_pending,
        deadline=deadline,
        on_error=on_error,
        handler_timeout=handler_timeout,
    )
    socket = path_of(socket, scheme=False)
    chosen = {
        "max-size": max_size,
        "timeout": timeout,
        "processes": processes,
        "linger": linger,
        "max-pending": max_pending,
        "deadline": deadline,
        "on-error": on_error,
        "handler-timeout": handler_timeout,
    }
    options = [
        f"--{name}={value}" for name, value in chosen.items() if value is not None
    ]
    return _hooks(socket, [factory, *options, *(["--retry"] if retry else [])])


_sidecars: dict[str, Sidecar] = {}
"""By socket; they outlive the configuration, which gunicorn reads again on SIGHUP."""


def _hooks(socket: str, options: list[str]) -> Hooks:
    sidecar = _sidecars.setdefault(socket, Sidecar(socket, options))

    def on_starting(server: Any) -> None:
        tend_workers = server.manage_workers

        def manage_workers() -> None:  # the master calls it at least once a second
            sidecar.tend()
            tend_workers()

        server.manage_workers = manage_workers
        folders = (server.cfg.pythonpath or "").split(",")
        sidecar.start([os.path.abspath(folder) for folder in folders if folder])

    def on_reload(server: Any) -> None:
        if not sidecar.started or sidecar.options != options:
            message = "%s: serve() has other options now; restart gunicorn for that"
            tell(logger, logging.WARNING, message, socket)
        for each in _sidecars.values():
            each.reload()

    def on_exit(server: Any) -> None:
        end = monotonic() + server.cfg.graceful_timeout
        for each in _sidecars.values():
            each.stop(max(0.0, end - monotonic()))

    return Hooks(on_starting, on_reload, on_exit)


class _Watch:
    """Knows how long its worker may live."""

    def __init__(self, cfg: Any) -> None:
        self.end = inf  # when it will be killed, as far as signals tell
        self._beat = monotonic()  # when it last gave a sign of life
        self._cfg = cfg

    def over(self, worker: Any) -> None:
        """Note what it is told, and when it gives a sign of life."""
        worker.notify = partial(self._notify, worker.notify)
        for number in (signal.SIGTERM, *QUICK):
            before = signal.getsignal(number)
            if callable(before):
                signal.signal(number, partial(self._told, before))
        # As gunicorn wants it, and signal() has undone: it interrupts no system call.
        signal.siginterrupt(signal.SIGTERM, False)

    def left(self) -> float:
        """Return the seconds until the worker should be gone."""
        silent = self._beat + self._cfg.timeout if self._cfg.timeout else inf
        return min(self.end, silent) - RESERVE - monotonic()

    def _notify(self, notify: Callable[[], None]) -> None:
        self._beat = monotonic()
        notify()

    def _told(self, before: Callable[..., None], number: int, frame: Any) -> None:
        patience = QUICK.get(signal.Signals(number), self._cfg.graceful_timeout)
        self.end = min(self.end, monotonic() + patience)
        before(number, frame)


_watch: _Watch | None = None


def _warnings(worker: Any, batcher: UBatch[Any, Any]) -> Iterator[str]:
    max_size = batcher.max_size
    slots, why, remedy = _slots(worker, max_size)
    # A model server's batches are made there, of what many workers ask.
    if slots < max_size and not isinstance(batcher._executor, ServerExecutor):
        yield (
            f"{batcher.name}: its requests can never fill a batch of max_size="
            f"{max_size}: {why}; {remedy}"
        )
    collector = batcher._collector
    if collector is not None and collector.inherited():
        yield (
            f"{batcher.name}: was called in the master, before the fork: threads that "
            "its handler's libraries, or an executor of yours, started there are "
            "missing here; make the first call in the worker, say in post_worker_init"
        )


def _slots(worker: Any, max_size: int) -> tuple[float, str, str]:
    """Return how many requests a worker serves at once, why, and what to change."""
    # Here, in a worker that has been patched if it ever will be; not in the master.
    from gunicorn.workers.base_async import AsyncWorker
    from gunicorn.workers.gthread import ThreadWorker
    from gunicorn.workers.sync import SyncWorker

    cfg = worker.cfg
    if isinstance(worker, SyncWorker):
        why = "a sync worker serves one request at a time"
        remedy = f"set worker_class='gevent', or 'gthread' with threads={max_size}"
        return 1, why, remedy
    if isinstance(worker, ThreadWorker) and cfg.threads < max_size:
        why = f"a gthread worker serves threads={cfg.threads} requests at once"
        return cfg.threads, why, f"set threads={max_size}, or a smaller max_size"
    if isinstance(worker, (AsyncWorker, ThreadWorker)):
        # Of a gthread worker in all; of a gevent worker on each socket it listens on.
        sockets = len(worker.sockets) if isinstance(worker, AsyncWorker) else 1
        why = f"a worker serves worker_connections={cfg.worker_connections} at once"
        remedy = f"set worker_connections={max_size} or more, or a smaller max_size"
        return cfg.worker_connections * sockets, why, remedy
    return inf, "", ""
