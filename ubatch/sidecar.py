"""How does a server keep a model server running beside its workers?

By looking after it whenever its own loop comes round: there is no thread here, beside
which workers would be forked, and no signal handler.
"""

from __future__ import annotations

import logging
import os
import select
import signal
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from ubatch.address import is_taken
from ubatch.backends.native import start_process
from ubatch.backoff import Backoff
from ubatch.log import tell
from ubatch.spawn import fate_of, pidfd_of, status_of, ubatch_command

logger = logging.getLogger(__name__)

LOOK_AGAIN = 0.5
"""Seconds between two looks whether another server has left the path."""


class Sidecar:
    """One ``ubatch serve`` that is kept running.

    Owner: the process that calls start(), and its main thread.
    """

    def __init__(self, path: str, options: Sequence[str]) -> None:
        """Take where it listens, and what else comes after ``ubatch serve``.

        Starts nothing.
        """
        self.options = list(options)
        self._path = path
        self._pid: int | None = None
        self._pidfd = -1
        self._began = 0.0
        self._backoff = Backoff()
        self._again_at: float | None = None  # None: it is not to run
        self._waits = False  # for another server to leave
        self._folders: list[str] = []

    @property
    def started(self) -> bool:
        """It is to run."""
        return self._again_at is not None

    def start(self, folders: Sequence[str] = ()) -> None:
        """Start it, and keep it running as long as tend() is called.

        Args:
            folders: Where it looks for modules first.
        """
        self._folders = list(folders)
        if self._pid is None:
            self._again_at = monotonic()
            self.tend()

    def tend(self) -> None:
        """Start it again, if it has ended and it is time. Does not block."""
        if self._pid is not None and self._has_ended():
            self._note_end()
        if self._pid is None and self._again_at is not None:
            if monotonic() >= self._again_at and not self._has_to_wait():
                self._spawn()

    def reload(self) -> None:
        """Have it load its model anew."""
        self._send(signal.SIGHUP)

    def stop(self, timeout: float) -> None:
        """Have it answer what it has accepted, and end. Blocks.

        Args:
            timeout: Seconds after which it is killed.
        """
        self._again_at = None
        if self._pid is not None:
            self._send(signal.SIGTERM)
            if not self._has_ended(timeout):
                self._send(signal.SIGKILL)
                self._has_ended(1.0)
            self._forget()

    def _has_to_wait(self) -> bool:
        """Tell whether another server is there: of a master that USR2 replaces, say."""
        waited, self._waits = self._waits, is_taken(self._path)
        if self._waits:
            self._again_at = monotonic() + LOOK_AGAIN
            if not waited:
                message = "another model server listens at %s; ours waits until it ends"
                tell(logger, logging.WARNING, message, self._path)
        return self._waits

    def _spawn(self) -> None:
        # In a process group of its own: a terminal's Ctrl-C is for who started us, who
        # tells us when the workers have ended.
        command = ubatch_command("serve", f"--socket={self._path}", *self.options)
        command += ["--with-parent", str(os.getpid())]
        environ = dict(os.environ)
        folders = [*self._folders, environ.get("PYTHONPATH", "")]
        if self._folders:
            environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        try:
            # SIGHUP waits until the server can take it.
            self._pid = start_process(
                command[0], command, environ, setpgroup=0, setsigmask=[signal.SIGHUP]
            )
            self._pidfd = pidfd_of(self._pid)
        except OSError as error:
            self._pid = None
            self._later(0.0, f"the model server cannot be started: {error}")
            return
        self._began = monotonic()
        tell(logger, logging.INFO, "model server %d is started", self._pid)

    def _note_end(self) -> None:
        pid, fate = self._pid, self._forget()
        self._later(monotonic() - self._began, f"the model server {pid} {fate}")

    def _later(self, lived: float, why: str) -> None:
        pause = self._backoff.pause_after(lived)
        tell(logger, logging.ERROR, "%s; starting another in %.1f s", why, pause)
        self._again_at = monotonic() + pause

    def _has_ended(self, timeout: float = 0.0) -> bool:
        """Tell whether it has, whoever has waited for it."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def _send(self, number: int) -> None:
        if self._pid is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _forget(self) -> str:
        """Let go of one that has ended; return how it did."""
        fate = fate_of(status_of(self._pidfd))
        os.close(self._pidfd)
        self._pid = None
        return fate
