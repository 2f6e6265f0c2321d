"""Where do handlers run that are not to share this process?

In *model processes*, each with a model of its own, and one batch at a time. Each has a
keeper; the strands borrow those that are ready.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from ubatch import options, process
from ubatch.batch import Batch, Job
from ubatch.errors import BackendError, Failure, WorkerLost
from ubatch.executors import (
    NOBODY_WAITS,
    Changed,
    Elsewhere,
    Executor,
    Outcome,
    Places,
    outcome_of,
)
from ubatch.isolation import answer_apart
from ubatch.keeper import Keeper, Lost, Model
from ubatch.options import Options, shown
from ubatch.origin import Origin
from ubatch.parcel import Done, Work
from ubatch.wire import WireError, pack

if TYPE_CHECKING:
    from ubatch.backends.base import Backend, Wake

LOOK = 1.0
"""Seconds after which a batch that waits for another process sees whether anybody still
waits for it."""

PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
"""Of this machine that this process may use."""

FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

Factory = str | Callable[[], Callable[..., Any]]


class ProcessExecutor(Elsewhere):
    """Runs the handler in processes of its own: off the GIL, and not in this memory.

    The factory is called once in each of them, never here, and returns the handler;
    this process need not import what a model needs. Nothing is started until the first
    call in each process that uses it; then by ``spawn``, so it is safe after threads,
    hubs and CUDA. Linux only.

    Args:
        factory: ``"package.module:factory"``, or a function that can be pickled.
        processes: How many there are, and so how many batches run at once; at least 1.
        retry: Run the calls of a lost process again, once; for handlers that may be
            run again. Otherwise they get WorkerLost.

    Raises:
        ValueError: An argument makes no sense.
        TypeError: The factory is of the wrong kind, or cannot be pickled.
        BackendError: This system has no pidfds.
    """

    far = False
    """Calls come from other processes."""

    def __init__(
        self, factory: Factory, processes: int = 1, *, retry: bool = False
    ) -> None:
        if not hasattr(os, "pidfd_open"):
            raise BackendError("model processes need Linux 5.4 or later: pidfds")
        self.label, self._factory = _checked(factory)
        self.processes = options.count("processes", processes, options.MOST_WORKERS)
        self.retry = options.flag("retry", retry)

    def fit(self, options: Options) -> Options:
        """Have as many workers as there are processes.

        Raises:
            ValueError: The user wants another number.
        """
        if options.workers not in (1, self.processes):
            raise ValueError(
                f"workers={options.workers} and {self!r}: each batch that runs needs a "
                f"process; leave workers out, or set processes={options.workers}"
            )
        return options._replace(workers=self.processes)

    def open(self, name: str, backend: Backend, changed: Changed) -> Executor:
        return Processes(self, name, backend, changed, Origin())

    def callers(self) -> int:
        """Return how many processes call."""
        return 1

    def setup(self) -> tuple[Any, list[Any]]:
        """Return the head and the parts of a SETUP."""
        head = {"parent": os.getpid(), "label": self.label}
        return head, pack((_path(), self._factory))

    def __repr__(self) -> str:
        return f"ProcessExecutor({self.label!r}, processes={self.processes})"


def _path() -> list[str]:
    """Return where modules are looked for here."""
    try:
        here = os.getcwd()
    except OSError:  # the folder is gone
        return [entry for entry in sys.path if entry != ""]
    return [here if entry == "" else entry for entry in sys.path]


def _checked(factory: object) -> tuple[str, str | bytes]:
    """Return a factory's name, and what a model process is told of it."""
    if isinstance(factory, str):
        if not FACTORY.fullmatch(factory):
            raise ValueError(
                f"factory={shown(factory)} is no name; write 'package.module:factory'"
            )
        return factory, factory
    if not callable(factory):
        raise TypeError(
            "factory must be 'package.module:factory' or a function that returns the "
            f"handler, not {shown(factory)}"
        )
    named: object = factory
    while isinstance(named, partial):
        named = named.func
    module = getattr(named, "__module__", None)
    name = getattr(named, "__qualname__", None) or type(named).__qualname__
    if module == "__main__":
        raise TypeError(
            f"factory {name} is of the program that was started, which another process "
            "cannot import; put it into a module, or write 'package.module:factory'"
        )
    try:
        return f"{module}:{name}", pickle.dumps(factory, protocol=5)
    except Exception as error:
        raise TypeError(
            f"factory {shown(factory)} cannot be pickled: {error}; use a function of a "
            "module, or write 'package.module:factory'"
        ) from error


class Packing(Protocol):
    """How the calls of a batch are sent, and what is made of their answers."""

    def run(self, job: Job, apart: bool, ask: Callable[[Work], Done]) -> Outcome:
        """Have a batch run.

        Raises:
            Lost: As *ask*.
        """


class Processes:
    """The model processes of one collector, and what runs its batches there.

    Owner: all of it changes under ``_lock``, which is taken last; ``_changed`` is
    called without it.
    Invariant: a process is vacant, or claimed by one batch, or no longer sound.
    """

    fatal: tuple[type[BaseException], ...] = ()
    on_hub = False
    apart = True

    def __init__(
        self,
        spec: ProcessExecutor,
        name: str,
        backend: Backend,
        changed: Changed,
        packing: Packing,
    ) -> None:
        self.name = type(spec).__name__
        self.far = spec.far
        self.places: Places | None = self
        self.trouble: Exception | None = None  # why there will be no process soon
        self._spec = spec
        self._of = name
        self._backend = backend
        self._changed = changed
        self._packing = packing
        self._epoch = process.epoch
        self._lock = backend.lock()
        self._closed = False
        self._keepers: set[Keeper] = set()
        self._up: set[Model] = set()
        self._vacant: list[Model] = []
        self._claimed: dict[Batch, Model] = {}
        self._awaited: list[Wake] = []  # of strands that want another one

    # What the strands ask.

    @property
    def overlaps(self) -> bool:
        # Where there are fewer processors than processes, a batch takes one from those
        # who call, and to wait for them costs nothing that it would not.
        return self._spec.callers() + self._spec.processes <= PROCESSORS

    @property
    def vacant(self) -> bool:
        self.begin()
        return bool(self._vacant)

    def begin(self) -> None:
        """Start the processes, unless they have been. Does not block."""
        for _ in range(self._spec.processes - len(self._keepers)):
            self._hire(None)

    def pids(self) -> list[int]:
        """Return the processes that are ready."""
        return sorted(model.process.pid for model in self._up)

    def claim(self, batch: Batch) -> None:
        # Race (snatched): 1. a strand sees a vacant process; 2. that ends, or goes to
        #       a batch whose own was lost; 3. the strand claims it, and there is none.
        #       Then run() waits for the next one.
        with self._lock:
            self._claim(batch)

    def _claim(self, batch: Batch) -> bool:
        while self._vacant:
            model = self._vacant.pop()
            if model.sound and not model.retired:
                model.take()
                self._claimed[batch] = model
                return True
        return False

    def left(self, batch: Batch, call: int) -> None:
        pass

    def give_up(self, batch: Batch) -> None:
        why = "stop() did not wait"
        if batch.limit <= monotonic():
            why = "its handler ran past handler_timeout"
        with self._lock:  # or the process may have another batch by then
            model = self._claimed.get(batch)
            if model is not None:
                model.give_up(why)

    def run(self, batch: Batch) -> Outcome:
        began, retry = monotonic(), self._spec.retry
        lost: Exception | None = None
        try:
            while batch in self._claimed or self._claim_another(batch):
                outcome = self._run(batch)
                if isinstance(outcome, Outcome):
                    return outcome
                lost = WorkerLost(f"{self._of}: {outcome}; call again")
                if not (outcome.unread or retry):
                    break
                retry = retry and outcome.unread
        except WireError as error:  # more than may be sent
            lost = BackendError(f"{self._of}: {error}; set a smaller max_size")
        lost = lost or self.trouble or WorkerLost(f"{self._of}: no model process")
        return Outcome(None, Failure(lost), monotonic() - began)

    def rest(self) -> None:
        pass

    def close(self) -> None:
        with self._lock:
            self._closed = True
            keepers = list(self._keepers)
        for keeper in keepers:
            keeper.retire()

    def reload(self) -> None:
        """Replace each process, once another is ready; it ends its batch before."""
        with self._lock:
            keepers = [] if self._closed else list(self._keepers)
        for keeper in keepers:
            if keeper.instead is not None:  # what it loads is out of date by now
                keeper.retire()
            elif not keeper.retired:
                self._hire(keeper)

    def _run(self, batch: Batch) -> Outcome | Lost:
        """Run a batch in the process that it has claimed, and give that back."""
        model = self._claimed[batch]
        answered = False

        def ask(work: Work) -> Done:
            nonlocal answered
            done = model.ask(work)
            answered = True
            return done

        try:
            job = batch.job()
            if job is None:
                return outcome_of(NOBODY_WAITS, monotonic())
            apart = batch.collector.answer is answer_apart
            return self._packing.run(job, apart, ask)
        except Lost as error:
            # Of a batch that is sent in parts some have been run before.
            error.unread = error.unread and not answered
            return error
        finally:
            self._give_back(batch, model)

    def _claim_another(self, batch: Batch) -> bool:
        """Wait for a process for a batch that has none; False if none comes."""
        while batch.wanted() and not self.over():
            wake = self._backend.wake()
            with self._lock:
                if self._claim(batch):
                    return True
                if self.trouble is not None or self._closed:
                    return False
                self._awaited.append(wake)
            wake.wait(LOOK)
        return False

    def _give_back(self, batch: Batch, model: Model) -> None:
        with self._lock:
            self._claimed.pop(batch, None)
            if model.sound and not model.retired:
                self._vacant.append(model)
        model.let_go()
        self._tell()  # a strand, too, that has found all of them taken

    # What the keepers tell.

    def over(self) -> bool:
        return self._epoch is not process.epoch

    def ready(self, model: Model, seconds: float) -> None:
        with self._lock:
            self.trouble = None
            self._up.add(model)
            self._vacant.append(model)
        self._tell()

    def gone(self, model: Model) -> None:
        with self._lock:
            self._up.discard(model)
            if model in self._vacant:
                self._vacant.remove(model)

    def failed(self, trouble: Exception) -> None:
        with self._lock:
            if self._up:
                return
            self.trouble = trouble
        self._tell(trouble)

    def ended(self, keeper: Keeper, escaped: BaseException | None) -> None:
        with self._lock:
            self._keepers.discard(keeper)
            over = keeper.retired or self._closed
        if escaped is not None and not over:  # the next call begins again
            lost = f"what kept a model process running died: {escaped!r}"
            self._changed(WorkerLost(f"{self._of}: {lost}"))

    def _hire(self, instead: Keeper | None) -> None:
        keeper = Keeper(self, self._spec, self._of, self._backend, instead)
        with self._lock:
            if self._closed:
                return
            self._keepers.add(keeper)
        try:
            self._backend.spawn(keeper.work, keeper.ended)
        except RuntimeError:  # no thread is to be had
            with self._lock:
                self._keepers.discard(keeper)
                others = bool(self._keepers)
            message = "cannot start a thread that keeps a model process"
            if not others:
                self._changed(BackendError(f"{self._of}: {message}"))

    def _tell(self, trouble: Exception | None = None) -> None:
        with self._lock:
            awaited, self._awaited = self._awaited, []
        for wake in awaited:
            wake.set()
        self._changed(trouble)
