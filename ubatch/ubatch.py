"""UBatch: joins what concurrent callers ask into few calls of one function."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Protocol, TypeVar

from ubatch import backends, executors, options, process, registry
from ubatch.backends import BACKENDS, BackendName
from ubatch.calls import Calls, Deadline, View
from ubatch.collector import Collector
from ubatch.errors import BadBatchOutputSize as BadBatchOutputSize  # noqa: F401
from ubatch.errors import Failure
from ubatch.errors import HandlerAlreadySet as HandlerAlreadySet
from ubatch.errors import HandlerNotSet as HandlerNotSet
from ubatch.errors import Stopped, UBatchError
from ubatch.executors import Changed, Elsewhere, Executor, ExecutorOption
from ubatch.future import Future
from ubatch.isolation import ON_ERROR, OnError
from ubatch.life import Life, close, end, forget, have_done
from ubatch.log import tell
from ubatch.nesting import running_batch, waiting_for
from ubatch.options import Options
from ubatch.policy import LINGERS, Linger
from ubatch.remote import MOST_AT_ONCE, ServerExecutor
from ubatch.stats import Counters, Stats, nothing

if TYPE_CHECKING:
    from ubatch.backends.base import Backend

T = TypeVar("T")
S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)

logger = logging.getLogger(__name__)


class Outputs(Protocol[S_co]):
    """What a handler returns: a list, a tuple, an array, a tensor, a Series."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[S_co]: ...

    def __getitem__(self, index: int, /) -> S_co: ...


class UBatch(Calls[T, S]):
    """Joins concurrent calls into batches for one function that takes a list.

    Creates no hub, queue, thread, pool or lock until its first call in a process:
    it may be made at import, before a fork and before monkey-patching.

    Args:
        max_size: Calls in a batch at most; at least 1.
        timeout: Seconds that a call may linger for others at most, while a worker
            is free; 0 or more. An upper bound: see *linger*.
        handler: The function: called with one list per argument of the calls, it
            returns one result per call, in order. May come later, by set_handler().
        backend: ``"auto"`` decides at the first call in each process; ``"gevent"``
            or ``"thread"`` insist. The environment's UBATCH_BACKEND overrides
            ``"auto"`` alone.
        executor: What runs the handler. ``"threadpool"``: a thread pool of its own,
            so that a handler that releases the GIL never stalls the hub.
            ``"hub_threadpool"``: the hub's, which DNS look-ups share. ``"inline"``:
            a greenlet on the hub, for handlers that cooperate or take well under a
            millisecond. A ``ProcessExecutor``: processes of its own, off the GIL; it
            makes the handler there. Or a ``concurrent.futures.Executor``, or a
            ``gevent.threadpool.ThreadPool``, which stay yours to close. On threads
            the first and the third are the same: the batcher's own threads.
        workers: Batches that may run at once; at least 1.
        linger: ``"adaptive"``: wait for as many as it pays to wait for, by what is
            observed of the callers and the handler. ``"settle"``: go as soon as
            arrivals have settled. ``"full"``: wait out *timeout*, for handlers whose
            calls cost. ``"now"``: go with what is there.
        max_pending: Calls that may wait; the next one is refused with QueueFull.
            None for no limit.
        deadline: Seconds from a call to its answer, after which it is answered with
            DeadlineExceeded, 0.001 at least; None for as long as it takes. Batches
            are closed early enough for that, by what the handler is seen to take.
        shed: Answer a call with DeadlineExceeded as soon as it can make its deadline
            no more, by the fastest of the last 8 batches, instead of running it for
            nothing.
        on_error: ``"fail"``: an error of the handler's fails its batch. ``"isolate"``:
            the batch is run again in halves, until the bad calls stand alone, and
            the others have their results; for handlers that may be run again. At most
            ``2 * k * log2(n) + 1`` runs for k bad calls of n; if the first
            ``2 * ceil(log2(n)) + 1`` runs all fail, all calls that are left fail.
        handler_timeout: Seconds that the handler may run on a batch, 0.001 at least.
            Then its callers get DeadlineExceeded, and its worker, which is stuck, is
            replaced; as many may be as there are *workers*. A pool that is yours, or
            the hub's, needs threads for twice as many, or what replaces a worker waits
            there for the stuck one, and that counts too. None for no limit.
        name: For log lines and stats(); the handler's name by default.

    Raises:
        ValueError: An option has a value that makes no sense.
        TypeError: An option is of the wrong kind; the handler cannot be called, or
            is a coroutine function.
    """

    def __init__(
        self,
        max_size: int,
        timeout: float,
        *,
        handler: Callable[Concatenate[list[T], ...], Outputs[S]] | None = None,
        backend: BackendName = "auto",
        executor: ExecutorOption = "threadpool",
        workers: int = 1,
        linger: Linger = "adaptive",
        max_pending: int | None = None,
        deadline: float | None = None,
        shed: bool = True,
        on_error: OnError = "fail",
        handler_timeout: float | None = None,
        name: str | None = None,
    ) -> None:
        self.max_size = options.count("max_size", max_size)
        self.timeout = options.seconds("timeout", timeout)
        self._options = Options(
            self.max_size,
            self.timeout,
            options.count("workers", workers, options.MOST_WORKERS),
            options.one_of("linger", linger, LINGERS),
            None if max_pending is None else options.count("max_pending", max_pending),
            options.flag("shed", shed),
            options.one_of("on_error", on_error, ON_ERROR),
            options.limit("handler_timeout", handler_timeout),
        )
        self._backend = options.one_of("backend", backend, BACKENDS)
        executors.check(executor)
        self._executor = executor
        if isinstance(executor, Elsewhere):
            if handler is not None:
                raise ValueError(
                    f"handler={options.shown(handler)} and executor={executor!r}, "
                    "which has its handler made elsewhere: leave one of them out"
                )
            handler, name = executor.handler, name or executor.label
            self._options = executor.fit(self._options)
        self._deadline = options.limit("deadline", deadline)
        self._name = options.name(name)
        self._handler: Callable[..., Any] | None = None
        self._life = Life()
        # What serves, or last served; it may be a parent's, and is then left alone.
        self._collector: Collector | None = None
        if handler is not None:
            self.set_handler(handler)
        registry.add(self)

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        retry: bool = False,
        backend: BackendName = "auto",
        deadline: float | None = None,
        name: str | None = None,
    ) -> UBatch[Any, Any]:
        """Return a batcher, started, whose handler a model server runs.

        The server, ``ubatch serve`` on this host, joins the calls of all processes that
        are connected. Nothing is connected before the first call. Calls wait some
        seconds for a server that is not there, and then get WorkerLost.

        Args:
            address: ``"unix:PATH"``: where it listens.
            retry: Ask again, once, for what a server had that was lost; for handlers
                that may be run again. Otherwise those calls get WorkerLost.
            backend: As in UBatch.
            deadline: As in UBatch; the server is told, and keeps it too.
            name: For log lines and stats(); the address by default.

        Raises:
            ValueError: The address is none.
        """
        return cls(
            MOST_AT_ONCE,
            0.0,
            executor=ServerExecutor(address, retry=retry),
            backend=backend,
            deadline=deadline,
            name=name,
        ).start()

    @property
    def name(self) -> str:
        """The name in log lines and in stats()."""
        named: str | None = getattr(self._handler, "__qualname__", None)
        if self._name or not named:
            return self._name or type(self._handler or self).__name__
        return named.rpartition("<locals>.")[2]

    @property
    def backend(self) -> str | None:
        """``"gevent"`` or ``"thread"``; None until a call in this process decides."""
        collector = self._in_this_process()
        return collector.backend.name if collector else None

    def set_handler(
        self, handler: Callable[Concatenate[list[T], ...], Outputs[S]]
    ) -> None:
        """Set the function that answers a batch. Does not block.

        Raises:
            HandlerAlreadySet: There is one.
            TypeError: It cannot be called, or is a coroutine function.
        """
        if self._handler is not None:
            raise HandlerAlreadySet(
                f"{self.name}: has a handler already; make another UBatch for another"
            )
        options.check_handler(handler)
        self._handler = handler

    def start(self) -> UBatch[T, S]:
        """Mark the batcher ready, and have run what waits for that. Does not block.

        Creates nothing: the first call in each process does. After stop() it makes
        the batcher accept calls again.

        Raises:
            HandlerNotSet: There is no handler.
        """
        if self._handler is None:
            raise HandlerNotSet(
                f"{self.name}: has no handler; pass handler=, or call set_handler()"
            )
        if self._life.closed:
            self._life = self._life.after()
        life = self._life
        life.started = True
        if life.collector is not None:
            life.collector.backend.in_owner(life.collector.begin)
        return self

    def stop(self, timeout: float | None = None) -> None:
        """Refuse new calls, run those that were accepted, and end.

        Blocks this caller, but not the hub. May be called again, from any greenlet
        and any thread; not by the handler itself. Where a signal handler interrupts
        a call of this batcher, or gevent's hub, it cannot wait: it begins to stop, and
        returns.

        Args:
            timeout: Seconds to wait for the calls; those that are left then get
                Stopped. A handler that runs is not interrupted: its result is
                dropped. None for as long as it takes.

        Raises:
            UBatchError: The handler itself called: it would wait for itself.
        """
        if timeout is not None:
            timeout = options.clocked(options.seconds("timeout", timeout))
        life, before = self._life, self._in_this_process()
        running = running_batch.get()
        if running is not None and running.collector is before:
            raise UBatchError(
                f"{self.name}: its own handler called stop(), which waits for the "
                "handler to return; call it from elsewhere"
            )
        collector = close(life, before)
        if collector is not None:
            end(collector, timeout)

    def _stop_soon(self) -> None:
        """Refuse new calls and run those that were accepted; do not wait for them."""
        collector = close(self._life, self._in_this_process())
        if collector is not None:
            have_done(collector, collector.begin_stop)

    def _give_up(self) -> None:
        """End what _stop_soon() has left; do not wait for that."""
        collector = self._in_this_process()
        if collector is not None and not collector.ended:
            have_done(collector, collector.abandon)

    def with_options(self, *, deadline: float | None) -> View[T, S]:
        """Return a view of this batcher whose calls have other options.

        Args:
            deadline: As in UBatch, for the calls made through the view.
        """
        return View(self, options.limit("deadline", deadline))

    def stats(self) -> Stats:
        """Return what was counted in this process so far. Does not block."""
        collector = self._in_this_process()
        if collector is None:
            return nothing().snapshot(
                self.name, None, executors.name_of(self._executor)
            )
        return collector.counters.snapshot(
            self.name, collector.backend.name, collector.executor_name()
        )

    def __enter__(self) -> UBatch[T, S]:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        seen = self.stats()
        return (
            f"<UBatch {self.name!r} {seen.backend or self._backend}, {self._state()}: "
            f"{seen.pending} pending, {seen.running} running, "
            f"{seen.batches_total} batches, {seen.results_total} results>"
        )

    def _state(self) -> str:
        collector = self._life.collector
        if self._life.closed:
            return "stopping" if collector and not collector.ended else "stopped"
        return "started" if self._life.started else "new"

    # One call, from top to bottom. It goes on in Collector.join().

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: Deadline
    ) -> Any:
        collector = self._collector
        # Collector.serves(), without the call: 0.03 of 1.5 us.
        if (
            collector is None
            or collector.life is not self._life
            or collector.epoch is not process.epoch
        ):
            collector = self._begin()
        caller = collector.caller()
        if caller is None:
            return self._call_from_afar(args, kwargs, deadline)
        batch = None
        try:
            batch = collector.join(caller, args, kwargs, deadline)
            if running_batch.get() is not None:
                with waiting_for(batch):
                    told = collector.park(caller)
            else:
                told = collector.park(caller)
        except BaseException:  # killed, timed out, Ctrl-C: the place is given up
            if batch is not None:
                batch.gone.add(caller)  # for sure, even if no stack is left to do more
                collector.endings.leave(batch, caller)
            raise
        answer = told[1]
        if type(answer) is Failure:
            raise answer.own()
        return answer

    def _call_from_afar(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: Deadline
    ) -> Any:
        future = self._submit(args, kwargs, deadline)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: the place is given up
            future.cancel()
            raise

    def _submit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: Deadline
    ) -> Future[Any]:
        collector = self._here()
        future: Future[Any] = collector.backend.in_owner(
            lambda: collector.submit(args, kwargs, deadline)
        )
        return future

    def _map(
        self, items: Iterable[Any], return_exceptions: bool, deadline: Deadline
    ) -> list[Any]:
        collector, items = self._here(), list(items)
        calls: list[Future[Any]] = []

        def submit_all() -> None:
            for item in items:
                calls.append(collector.submit((item,), {}, deadline))

        try:
            collector.backend.in_owner(submit_all)
            return [_outcome(call, return_exceptions) for call in calls]
        finally:
            for call in calls:  # those left when one failed or this caller was killed
                if not call._done:
                    call.cancel()

    def _here(self) -> Collector:
        """Return what takes calls in this process; the first call makes it."""
        collector = self._collector
        if collector is None or not collector.serves(self._life):
            return self._begin()
        if collector.backend.is_foreign() and not collector.backend.alive():
            self._life.forget(collector)
            return self._begin()
        return collector

    def _begin(self) -> Collector:
        """Make the collector of this life in this process, once."""
        life = self._life
        if life.closed:
            raise Stopped(f"{self.name}: stopped; start() it again to accept calls")
        before, running = self._in_this_process(), running_batch.get()
        if before is not None and before.backend.alive():
            backend, why = before.backend.again(), "as before stop()"
            counters = before.counters
        else:
            near = running.collector.backend if running else None
            backend, why = backends.load(self._backend, near)
            counters = Counters(backend.lock())
        # Of two threads that make the first call at once, both make a collector; one
        # is taken, and the other has started nothing.
        make = partial(_executor, self._executor, self.name, self._options, backend)
        made: Collector = backend.in_owner(
            lambda: Collector(
                *(self.name, self._options, life, backend, make, counters),
                _weakly(self._held),
            )
        )
        # The strands do not hold the batcher: one that is forgotten without stop()
        # runs what was accepted, and ends.
        made.finalizer = weakref.finalize(self, forget, life, made)
        made.finalizer.atexit = False
        collector = life.publish(made)
        self._collector = collector
        if collector is not made:
            made.finalizer.detach()
            return collector
        if life.closed:  # by a stop() that came too early to see it
            backend.in_owner(collector.begin_stop)
        self._introduce(collector, why)
        return collector

    def _introduce(self, collector: Collector, why: str) -> None:
        tell(
            logger,
            logging.INFO,
            "%s: backend %s (%s), executor %s, workers %d",
            *(self.name, collector.backend.name, why),
            *(collector.executor_name(), self._options.workers),
        )
        if not self._life.started:
            message = "%s: called before start(), and waits for it"
            tell(logger, logging.WARNING, message, self.name)

    def _held(self) -> Callable[..., Any] | None:
        """Return the handler for one batch, which keeps alive what it needs."""
        return self._handler

    def _in_this_process(self) -> Collector | None:
        collector = self._life.collector or self._collector
        return None if collector is None or collector.inherited() else collector


def _weakly(method: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that calls a method, without keeping its object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> Any:
        alive = reference()
        return alive() if alive is not None else None

    return call


def _executor(
    option: ExecutorOption,
    name: str,
    options: Options,
    backend: Backend,
    changed: Changed,
) -> Executor:
    if isinstance(option, Elsewhere):
        return option.open(name, backend, changed)
    return backend.executor(option, options.threads)


def _outcome(call: Future[Any], return_exceptions: bool) -> Any:
    if not return_exceptions:
        return call.result()
    try:
        error = call.exception()  # not raised, it keeps no frame with all items alive
    except Exception as refused:
        return refused
    return call.result() if error is None else error
