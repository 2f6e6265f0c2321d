"""What runs the handler?

An executor blocks the strand that calls it, a greenlet or a thread, until the
handler is done; that is what makes a strand a worker.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import suppress
from contextvars import Context
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Union

from ubatch.batch import Batch, Job, failures_apart
from ubatch.errors import BackendError, Failure, UBatchError
from ubatch.isolation import Answer, Answered, always
from ubatch.log import tell
from ubatch.nesting import running_batch
from ubatch.options import shown

if TYPE_CHECKING:
    from gevent.hub import Hub
    from gevent.threadpool import ThreadPool

    from ubatch.backends.base import Backend
    from ubatch.options import Options

logger = logging.getLogger(__name__)

ExecutorName = Literal["threadpool", "hub_threadpool", "inline"]
ExecutorOption = Union[ExecutorName, "ThreadPool", futures.Executor, "Elsewhere"]
EXECUTORS: tuple[ExecutorName, ...] = ("threadpool", "hub_threadpool", "inline")

HUB_STALL = 0.1
"""Seconds that an inline handler may keep the hub before we say so.

What gevent's own monitor calls blocking (``GEVENT_MAX_BLOCKING_TIME``).
"""


class Outcome(NamedTuple):
    """What became of a batch."""

    answers: list[Any] | None
    failure: Failure | None
    seconds: float
    """How long the handler ran."""
    failures: Sequence[Failure] = ()
    """Those among the answers."""
    reruns: int = 0
    """How many times the handler was run again, on parts of the batch."""
    first: Failure | None = None
    """What the first run raised, if there were more."""


NOBODY_WAITS = Answered([], 0, None)
"""What a batch is answered with that was given up before its handler began."""


class Places(Protocol):
    """The processes in which batches run; there may be none at the moment.

    Owner: called under the collector's lock.
    """

    @property
    def vacant(self) -> bool:
        """One of them is ready, and has no batch."""

    @property
    def trouble(self) -> Exception | None:
        """Why there will be none soon; None while one may wait for that."""

    def claim(self, batch: Batch) -> None:
        """Keep a vacant one for a batch, which is then run() or given up()."""

    def left(self, batch: Batch, call: int) -> None:
        """Nobody waits for one call of a batch that runs any longer. Does not block."""

    def give_up(self, batch: Batch) -> None:
        """Nobody waits for a batch that runs any longer. Does not block."""


Changed = Callable[[Exception | None], object]
"""Called when there is a place, or an error tells why there will be none soon."""


class Executor(Protocol):
    """Where handlers run."""

    name: str
    places: Places | None
    """None where there is always a place for one more batch of a free worker."""
    fatal: tuple[type[BaseException], ...]
    """What a handler may raise that has to end the strand too."""

    @property
    def overlaps(self) -> bool:
        """The handler runs beside the callers, not instead of them."""

    on_hub: bool
    """The handler runs on the hub, so that batch after batch would starve others."""
    apart: bool
    """The handler has an interpreter of its own, and no GIL to wait for here."""
    far: bool
    """Those who call are in other processes."""

    def run(self, batch: Batch) -> Outcome:
        """Run a batch's handler; block the strand, raise nothing of the handler's."""

    def rest(self) -> None:
        """Do what can wait until a batch has been settled."""

    def close(self) -> None:
        """Let go of threads that were made here. Does not wait for handlers."""


class Elsewhere:
    """An option whose handler is made by another process: it has none of its own."""

    label: str
    """What it runs, for people."""

    def fit(self, options: Options) -> Options:
        """Return a batcher's options as this needs them."""
        return options

    def open(self, name: str, backend: Backend, changed: Changed) -> Executor:
        """Return what runs the batches of one collector. Starts nothing.

        Args:
            name: The batcher's, for log lines.
            changed: Called when its places have changed.
        """
        raise NotImplementedError

    def handler(self, *args: Any, **kwargs: Any) -> Any:
        """Stand for the handler, where there has to be one."""
        raise UBatchError(f"{self.label}: its handler is in another process")


def check(option: object) -> None:
    """Refuse what cannot be an executor, as early as possible.

    Raises:
        ValueError: A name that means nothing.
        TypeError: An object that runs nothing.
    """
    if isinstance(option, str):
        if option not in EXECUTORS:
            raise ValueError(
                f"executor={shown(option)} is unknown; use one of "
                f"{', '.join(EXECUTORS)}, ProcessExecutor('module:factory'), "
                "ServerExecutor('unix:PATH'), a concurrent.futures.Executor or a "
                "gevent.threadpool.ThreadPool"
            )
    elif not isinstance(option, (futures.Executor, Elsewhere)):
        if not _is_gevent_pool(option):
            raise TypeError(
                "executor must be a name, a ProcessExecutor, a ServerExecutor, a "
                "concurrent.futures.Executor or a gevent.threadpool.ThreadPool, not "
                f"{shown(option)}"
            )


def name_of(option: ExecutorOption) -> str:
    """Return an executor's name, for people."""
    return option if isinstance(option, str) else type(option).__name__


def for_threads(option: ExecutorOption) -> Executor:
    """Return the executor for strands that are threads.

    Raises:
        BackendError: It needs a hub.
    """
    if option in ("threadpool", "inline"):  # the strands are the thread pool
        return InlineExecutor(str(option))
    if isinstance(option, futures.Executor):
        return FuturesExecutor(option, futures.Future.result)
    raise BackendError(
        f"executor={option!r} needs the gevent backend, and this process runs "
        "batches on native threads; use executor='threadpool'"
    )


def for_gevent(option: ExecutorOption, workers: int, hub: Hub) -> Executor:
    """Return the executor for strands that are greenlets of *hub*."""
    from gevent.threadpool import ThreadPool

    if option == "threadpool":
        return PoolExecutor("threadpool", ThreadPool(workers, hub), owned=True)
    if option == "hub_threadpool":
        return PoolExecutor("hub_threadpool", hub.threadpool, owned=False)
    if option == "inline":
        return HubExecutor(hub)
    if isinstance(option, futures.Executor):
        return FuturesExecutor(option, _HubWait(hub))
    assert not isinstance(option, Elsewhere)  # which opens itself
    return PoolExecutor(name_of(option), option, owned=False)


class Usual:
    """What is true of most executors."""

    places: Places | None = None
    fatal: tuple[type[BaseException], ...] = ()
    overlaps = True
    on_hub = False
    apart = False
    far = False

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


class InlineExecutor(Usual):
    """Run the handler in the strand itself, a thread."""

    overlaps = False  # the threads that call share the interpreter with it

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, batch: Batch) -> Outcome:
        return attempt(batch)


class HubExecutor(InlineExecutor):
    """Run the handler in a greenlet on the hub, for handlers that cooperate."""

    on_hub = True

    def __init__(self, hub: Hub) -> None:
        from gevent import GreenletExit

        super().__init__("inline")
        self.fatal = (SystemExit, KeyboardInterrupt, GreenletExit)
        self.overlaps = False  # unless it cooperates
        self._hub = hub
        self._stall: tuple[str, float] | None = None  # whose, and its seconds
        self._warned = False

    def run(self, batch: Batch) -> Outcome:
        ran: list[bool] = []  # the hub's callbacks, while the handler did
        callback = self._hub.loop.run_callback(ran.append, True)
        try:
            outcome = attempt(batch)
        finally:
            callback.stop()
        self.overlaps = bool(ran)
        if outcome.seconds > HUB_STALL and not ran:
            self._stall = batch.collector.name, outcome.seconds
        return outcome

    def rest(self) -> None:
        if self._stall is not None and not self._warned:
            self._warned = True
            tell(
                logger,
                logging.WARNING,
                "%s: the inline handler kept the hub for %.2f s; no greenlet ran "
                "meanwhile. Use executor='threadpool', or a handler that cooperates",
                *self._stall,
            )


class PoolExecutor(Usual):
    """Run the handler on a thread of a gevent thread pool."""

    def __init__(self, name: str, pool: ThreadPool, *, owned: bool) -> None:
        self.name = name
        self._pool = pool
        self._owned = owned
        self._closed = False
        self._running = 0

    def run(self, batch: Batch) -> Outcome:
        self._running += 1
        try:
            outcome: Outcome | None = self._pool.spawn(attempt, batch).get()
        finally:
            self._running -= 1
            self._maybe_kill()
        assert outcome is not None  # attempt() returns, whatever happens
        return outcome

    def close(self) -> None:
        self._closed = True
        self._maybe_kill()

    def _maybe_kill(self) -> None:
        """Let the threads go, once nothing runs there: until then that would poll."""
        if self._owned and self._closed and not self._running:
            from gevent import spawn

            # In a greenlet: a hub callback, such as the end of the last strand, may
            # not wait for the last task to be ticked off, and would leave its thread.
            spawn(self._pool.kill)


class FuturesExecutor(Usual):
    """Run the handler on somebody's ``concurrent.futures.Executor``."""

    def __init__(
        self,
        executor: futures.Executor,
        wait: Callable[[futures.Future[Any]], Any],
    ) -> None:
        self.name = name_of(executor)
        self._executor = executor
        self._wait = wait

    def run(self, batch: Batch) -> Outcome:
        began = monotonic()
        try:
            if isinstance(self._executor, futures.ThreadPoolExecutor):
                task = self._executor.submit(attempt, batch)
                outcome: Outcome = self._wait(task)
                return outcome
            # It may run elsewhere: send what can be pickled.
            job = batch.job()
            if job is None:
                return outcome_of(NOBODY_WAITS, began)
            sent = self._executor.submit(_afresh, batch.collector.answer, job)
            answered: Answered = self._wait(sent)
            return outcome_of(answered, began)
        except Exception as error:  # the handler's, or a broken executor's
            return Outcome(None, Failure(error), monotonic() - began)


class _HubWait:
    """Wait in a greenlet for a future that another thread will finish."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def __call__(self, future: futures.Future[Any]) -> Any:
        from gevent.event import Event

        finished = Event()
        # The watcher keeps the loop from ending while the main greenlet waits, and
        # send() is the one call on it that another thread may make.
        watcher = self._hub.loop.async_()
        watcher.start(finished.set)
        try:
            future.add_done_callback(lambda _: _send(watcher))
            finished.wait()
        finally:
            watcher.close()
        return future.result()


def _send(watcher: Any) -> None:
    with suppress(Exception):  # closed: the strand was killed, and nobody waits
        watcher.send()


def attempt(batch: Batch) -> Outcome:
    """Run the handler on a batch in this thread; return whatever comes of it.

    In a fresh context: a worker's thread would hand one batch's context variables
    on to the next. Nothing is raised: an error that leaves a gevent pool's thread
    is printed by the hub, and SystemExit there ends the main greenlet.
    """
    began = monotonic()
    try:
        return outcome_of(Context().run(_answer_inside, batch), began)
    except BaseException as error:
        return Outcome(None, Failure(error), monotonic() - began)


def outcome_of(answered: Answered, began: float) -> Outcome:
    """Return the outcome of a handler that began then, and has returned."""
    seconds = monotonic() - began
    first = None if answered.first is None else Failure(answered.first)
    if answered.exit is not None:
        failure = Failure(answered.exit)
        return Outcome(None, failure, seconds, (), answered.reruns, first)
    answers, failures = failures_apart(answered.answers)
    return Outcome(answers, None, seconds, failures, answered.reruns, first)


def _answer_inside(batch: Batch) -> Answered:
    running_batch.set(batch)
    job = batch.job()
    if job is None:
        return NOBODY_WAITS
    return batch.collector.answer(job, batch.wanted)


def _afresh(answer: Answer, job: Job) -> Answered:
    return Context().run(answer, job, always)


def _is_gevent_pool(option: object) -> bool:
    module = sys.modules.get("gevent.threadpool")
    return module is not None and isinstance(option, module.ThreadPool)
