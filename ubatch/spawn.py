"""How is a model process started, and how does one know that it has ended?

By ``posix_spawn``, never by a fork, so it is safe beside threads, hubs and CUDA. A
process has ended when its pidfd can be read: the end of its socket alone tells
nothing, as long as children of it hold the other end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from _socket import socket, socketpair
from contextlib import suppress
from pathlib import Path
from subprocess import _args_from_interpreter_flags  # type: ignore[attr-defined]
from typing import Protocol

from ubatch import process
from ubatch.backends.native import start_process
from ubatch.channel import Channel, WaitFor

FD = 3
"""The number of the socket in a model process."""

PR_SET_PDEATHSIG = 1
"""What Linux calls that."""

UNKNOWN = 255
"""The exit code of a process that somebody else has waited for."""

PROGRAM = "import sys; sys.path[1:1] = [{!r}]; from {} import main; sys.exit(main())"
"""What it runs: ubatch is to be found there, whatever this process did to its path."""


class Waits(Protocol):
    """The part of a backend that waits."""

    @property
    def wait_for(self) -> WaitFor: ...

    def wait_idly(self, fd: int) -> bool: ...


class Process:
    """One model process, as it looks from here.

    Owner: anybody may kill() it; one waits for its end, and then closes it.
    """

    def __init__(self, label: str, waits: Waits) -> None:
        """Start it.

        Args:
            label: What it is for, for those who list processes.

        Raises:
            OSError: It cannot be started.
        """
        ours, theirs = socketpair()
        try:
            self.pid = _start(theirs, label)
            self._pidfd = os.pidfd_open(self.pid)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.channel = Channel(ours, waits.wait_for)
        self._waits = waits
        self._epoch = process.epoch
        self._status: int | None = None  # as subprocess has it

    def kill(self) -> None:
        """End it now, whatever it does. Does not block."""
        if self._status is None and self._epoch is process.epoch:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end, *timeout* seconds at most; tell whether it came.

        Raises:
            OSError: This process was forked from the one that started it.
        """
        if self._status is None:
            if timeout is None:
                self._waits.wait_idly(self._pidfd)
            elif not self._waits.wait_for(self._pidfd, False, timeout):
                return False
            status = _status_of(self.pid)
            if self._status in (None, UNKNOWN):  # or another waiter was told
                self._status = status
        return True

    @property
    def fate(self) -> str:
        """How it ended, for people."""
        if self._status is None:
            return "has closed its socket"
        if self._status < 0:
            number = -self._status
            named = number in set(signal.Signals)  # those for real time are not
            name = signal.Signals(number).name if named else f"signal {number}"
            return f"was killed by {name}"
        return f"ended with exit code {self._status}"

    def close(self) -> None:
        """Let go of what was opened for it. It has ended, and nobody waits here."""
        self.channel.close()
        os.close(self._pidfd)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process get a signal when the thread that started it ends."""
    with suppress(OSError, AttributeError):  # it is not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def ubatch_command(*arguments: str) -> list[str]:
    """Return the command line of ``ubatch``, where this one is installed."""
    return [*_command("ubatch.cli"), *arguments]


def _start(theirs: socket, label: str) -> int:
    command = [*_command("ubatch.model"), label]
    return start_process(
        command[0],
        command,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), FD),  # first: it may be 0
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        ],
        setsigmask=[],
    )


def _command(module: str) -> list[str]:
    python, root = _python(), str(Path(__file__).resolve().parent.parent)
    program = PROGRAM.format(root, module)
    return [python, *_args_from_interpreter_flags(), "-c", program]


def _python() -> str:
    """Return the interpreter: where a server embeds it, ``sys.executable`` is that."""
    if "python" in os.path.basename(sys.executable or "").lower():
        return sys.executable
    return os.path.join(sys.exec_prefix, "bin", "python3")


def _status_of(pid: int) -> int:
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # somebody else waited for all children
        return UNKNOWN
    if ended is None:
        return UNKNOWN
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
