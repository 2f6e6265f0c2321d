"""How is a model process kept running?

A keeper starts one, waits for its end, and starts another, later each time that it did
not last. The strands borrow what is ready.
"""

from __future__ import annotations

import logging
import signal
from contextlib import suppress
from errno import ECONNRESET
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ubatch.backoff import Backoff
from ubatch.errors import BackendError, WorkerLost
from ubatch.log import tell
from ubatch.parcel import (
    Done,
    PackedError,
    Work,
    read_done,
    text_of,
    unpack_error,
    write_work,
)
from ubatch.spawn import UNKNOWN, Process, fate_of
from ubatch.wire import Frame, Kind, WireError, unpack

if TYPE_CHECKING:
    from ubatch.backends.base import Backend

logger = logging.getLogger(__name__)

WAITED_FOR = 1.0
"""Seconds of pause for which calls wait; before a longer one they are told."""

REAPED = 1.0
"""Seconds within which the kernel is done with a process that was killed."""

ENDING = 0.1
"""The same for one that has closed its socket, if it did so because it ends."""

KILLED = fate_of(-signal.SIGKILL)

NOT_OURS = " (out of memory? see the kernel log)"
"""What a log line adds where somebody else did that."""


class Lost(Exception):
    """A process was lost while it had a batch."""

    unread = False
    """It had not read all of that, so none of it was run."""


class Model:
    """One model process, and who uses it.

    Owner: who claimed it may ask(); kill() and retire() are for anybody. Its keeper and
    its strand each let_go() once, and the last one closes it.
    """

    def __init__(self, process: Process, backend: Backend) -> None:
        self.process = process
        self.sound = True  # it may be asked
        self.retired = False
        self.stuck = False  # it was killed for its handler, and was sound till then
        self.killed = ""  # why it was, by ubatch
        self._lock = backend.lock()
        self._users = 1  # its keeper

    def take(self) -> None:
        """Have one more user."""
        with self._lock:
            self._users += 1

    def let_go(self) -> None:
        """Have one user less."""
        with self._lock:
            self._users -= 1
            last = not self._users
            if self.retired and self._users == 1:
                self.process.channel.end()
        if last:
            self.process.close()

    def retire(self) -> None:
        """Have it end once it has no batch. Does not block."""
        with self._lock:
            self.retired = True
            if self._users == 1:
                self.process.channel.end()

    def kill(self, why: str) -> None:
        """End it now. Does not block."""
        self.sound = False
        self.killed = self.killed or why
        self.process.kill()

    def give_up(self, why: str) -> None:
        """End it, since its handler does not return. Does not block."""
        self.stuck = True
        self.kill(why)

    @property
    def fate(self) -> str:
        """How it ended, and why, for people."""
        fate = self.process.fate
        if self.killed and fate in (KILLED, fate_of(UNKNOWN)):
            return f"was killed by ubatch, since {self.killed}"
        return fate

    def ask(self, work: Work) -> Done:
        """Have a batch run. Blocks the strand.

        Raises:
            Lost: The process is gone.
            WireError: The batch is more than may be sent; the process is still there.
        """
        channel, asked, unread = self.process.channel, False, False
        try:
            channel.send(Kind.JOB, 0, *write_work(work))
            asked = True
            channel.wait()
            frame = channel.receive()
            if frame is not None:
                return read_done(frame)
        except WireError as error:
            if not asked:  # nothing was sent
                raise
            self.kill("its answer made no sense")
            raise Lost(f"the answer of the model process is {error}") from None
        except OSError as error:
            # The kernel says so of a socket that was closed with something to read.
            unread = not asked or error.errno == ECONNRESET
        except BaseException:  # the strand was killed, and the process is out of step
            self.kill("what waited for its answer was killed")
            raise
        self._end()
        lost = Lost(
            f"the model process {self.process.pid} {self.process.fate} while it had "
            "this call"
        )
        lost.unread = unread
        raise lost

    def _end(self) -> None:
        """End it, if it has closed no more than its socket; blocks till it has."""
        self.sound = ended = False
        try:
            with suppress(OSError):  # we are a copy, in a fork
                ended = self.process.wait(ENDING)
        finally:
            if not ended:
                self.kill("it had closed its socket")
        with suppress(OSError):
            self.process.wait(REAPED)


class Setup(Protocol):
    """What a model process is to run."""

    label: str

    def setup(self) -> tuple[Any, list[Any]]:
        """Return the head and the parts of a SETUP."""


class Crew(Protocol):
    """Who borrows the processes. Told from the threads of the keepers."""

    def over(self) -> bool:
        """Tell whether a fork has copied all this."""

    def ready(self, model: Model, seconds: float) -> None:
        """Take one in, that was loaded in as many seconds."""

    def gone(self, model: Model) -> None:
        """Let one go that has ended."""

    def failed(self, trouble: Exception) -> None:
        """Take note that one will not be ready soon."""

    def ended(self, keeper: Keeper, escaped: BaseException | None) -> None:
        """Let a keeper go."""


class Past(NamedTuple):
    """What became of a process."""

    lived: float
    """For how many seconds it was ready; 0.0 if it never was, and endless if it would
    be ready still, had its handler not been stuck."""
    trouble: Exception
    """What to tell those who wait for it."""
    hint: str = ""
    """What to tell in the log besides."""


class Keeper:
    """Keeps one process running.

    Owner: work() runs in a strand of its own; retire() is for anybody.
    Race (unborn): 1. it starts a process; 2. retire() finds none; 3. it says which one
    it has. So it looks again whether it is retired after it has said so.
    """

    def __init__(
        self,
        crew: Crew,
        setup: Setup,
        name: str,
        backend: Backend,
        instead: Keeper | None,
    ) -> None:
        self.retired = False
        self._crew = crew
        self._setup = setup
        self._name = name  # the batcher's
        self._backend = backend
        # Which one it takes the place of, whose process ends when this one's is ready.
        self.instead = instead
        self._wake = backend.wake()
        self._model: Model | None = None
        self._told = ""  # the last trouble that was logged with its traceback

    def retire(self) -> None:
        """Have it end, and its process. Does not block."""
        self.retired = True
        model = self._model
        if model is not None:
            model.retire()
        self._wake.set()

    def work(self) -> None:
        """Keep a process running; the life of a keeper."""
        backoff = Backoff()
        while not self._over():
            past = self._keep_one()
            if self._over():
                return
            if self.instead is not None:
                self._log(past, "%s%s; the one that is there goes on")
                return
            pause = backoff.pause_after(past.lived)
            self._log(past, "%s%s; starting another in %.1f s", pause)
            if not past.lived or pause > WAITED_FOR:
                self._crew.failed(past.trouble)
            self._wake.wait(pause)

    def ended(self, escaped: BaseException | None) -> None:
        """Take note that work() has ended."""
        if not self._crew.over():
            self._crew.ended(self, escaped)

    def _log(self, past: Past, message: str, *args: float) -> None:
        """Log what became of a process; of many equal tracebacks the first one."""
        text, cause = str(past.trouble), past.trouble.__cause__
        shown = None if text == self._told else cause
        self._told = text
        tell(logger, logging.ERROR, message, text, past.hint, *args, exc_info=shown)

    def _over(self) -> bool:
        return self.retired or self._crew.over()

    def _keep_one(self) -> Past:
        """Start a process, and wait for its end."""
        try:
            process = Process(self._setup.label, self._backend)
        except OSError as error:
            return Past(0.0, self._lost(f"no model process can be started: {error}"))
        model = self._model = Model(process, self._backend)
        if self.retired:
            model.retire()
        try:
            return self._see_through(model)
        except OSError as error:  # we are a copy, in a fork
            return Past(0.0, self._lost(str(error)))
        finally:
            self._model = None
            model.sound = False
            self._crew.gone(model)
            if not self._crew.over():
                process.kill()
                process.wait(REAPED)
            process.channel.end()  # whoever asks it now finds out
            model.let_go()

    def _see_through(self, model: Model) -> Past:
        process, label = model.process, self._setup.label
        message = "%s: model process %d loads %s"
        tell(logger, logging.INFO, message, self._name, process.pid, label)
        began = monotonic()
        trouble = self._bring_up(process)
        if trouble is not None or self.retired:
            return Past(0.0, trouble or self._lost("stopped"), self._hint(model))
        ready = monotonic()
        self._crew.ready(model, ready - began)
        message = "%s: model process %d is ready after %.2f s"
        tell(logger, logging.INFO, message, self._name, process.pid, ready - began)
        if self.instead is not None:
            self.instead.retire()
            self.instead = None
        process.wait()
        trouble = self._lost(f"the model process {process.pid} {model.fate}")
        lived = inf if model.stuck else monotonic() - ready
        return Past(lived, trouble, self._hint(model))

    def _hint(self, model: Model) -> str:
        return NOT_OURS if model.fate == KILLED else ""

    def _bring_up(self, process: Process) -> Exception | None:
        """Have the handler made; return why there is none."""
        frame: Frame | None = None
        with suppress(OSError, WireError):
            process.channel.send(Kind.SETUP, 0, *self._setup.setup())
            frame = process.channel.receive()
        if frame is None:
            if self._crew.over():
                return self._lost("forked")
            process.wait(REAPED)
            label, pid, fate = self._setup.label, process.pid, process.fate
            return self._lost(f"the model process {pid} {fate} while it loaded {label}")
        if frame.kind is Kind.READY:
            return None
        error = unpack_error(PackedError(*unpack(frame.parts)))
        text = f"{type(error).__name__}: {text_of(error)}"
        trouble = BackendError(f"{self._name}: the factory failed: {text}")
        trouble.__cause__ = error.__cause__
        return trouble

    def _lost(self, text: str) -> WorkerLost:
        return WorkerLost(f"{self._name}: {text}")
