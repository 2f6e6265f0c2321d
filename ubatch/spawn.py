"""How is a model process started, and how does one know that it has ended?

By ``posix_spawn``, never by a fork, so it is safe beside threads, hubs and CUDA. A
process has ended when its pidfd can be read: the end of its socket alone tells
nothing, as long as children of it hold the other end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from _socket import socket, socketpair
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path
from subprocess import _args_from_interpreter_flags  # type: ignore[attr-defined]
from typing import Protocol

from ubatch import process
from ubatch.backends.native import allocate_lock, start_process
from ubatch.channel import Channel, WaitFor

FD = 3
"""The number of the socket in a model process."""

PR_SET_PDEATHSIG = 1
"""What Linux calls that."""

UNWANTED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that may be meant for all processes of a terminal or of a service. Who has a
model process decides when it ends: what those accepted is still to be run."""

UNKNOWN = 256
"""In place of an exit code: somebody else waited for the process, as gevent does for
all children once it watches one, and the kernel has forgotten how it ended."""

PIDFD_GET_INFO = 0xC040FF0B
"""The request of ``ioctl_pidfd(2)``."""

PIDFD_INFO_EXIT = 1 << 3
"""Its flag for how a process ended, which Linux 6.15 and later keep while a pidfd is
open."""

PIDFD_INFO = struct.Struct("Q56x")
"""What is asked: the flags."""

PIDFD_INFO_TOLD = struct.Struct("Q52xi")
"""What is told: the flags, and the status as waitpid() has it."""

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
            self._pidfd = pidfd_of(self.pid)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.channel = Channel(ours, waits.wait_for)
        self._waits = waits
        self._epoch = process.epoch
        self._status: int | None = None  # as subprocess has it
        self._reaping = allocate_lock()

    def kill(self) -> None:
        """End it now, whatever it does. Does not block."""
        if self._status is None and self._epoch is process.epoch:
            # Not by its pid: if somebody waits for all children, it may be another's.
            with suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

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
            # Race (reaped): 1. one waiter takes the status from the kernel; 2. another
            #       finds that it has none; 3. the first one says what it was. So one
            #       at a time asks, and the second one does not.
            with self._reaping:
                if self._status is None:
                    self._status = status_of(self._pidfd)
        return True

    @property
    def fate(self) -> str:
        """How it ended, for people."""
        if self._status is None:
            return "has closed its socket"
        return fate_of(self._status)

    def close(self) -> None:
        """Let go of what was opened for it. It has ended, and nobody waits here."""
        self.channel.close()
        pidfd, self._pidfd = self._pidfd, -1
        os.close(pidfd)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process get a signal when the thread that started it ends; 0: none."""
    with suppress(OSError, AttributeError):  # it is not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def ubatch_command(*arguments: str) -> list[str]:
    """Return the command line of ``ubatch``, where this one is installed."""
    return [*_command("ubatch.cli"), *arguments]


def fate_of(status: int) -> str:
    """Return how a process ended, for people."""
    if status == UNKNOWN:
        return "has ended"
    if status < 0:
        named = -status in set(signal.Signals)  # those for real time are not
        name = signal.Signals(-status).name if named else f"signal {-status}"
        return f"was killed by {name}"
    return f"ended with exit code {status}"


def pidfd_of(pid: int) -> int:
    """Return a pidfd of a process that was just started; without one it is ended.

    Raises:
        OSError: There is none to be had.
    """
    try:
        return os.pidfd_open(pid)
    except OSError:  # too many files are open: nobody could wait for it
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise


def close_inherited(last: int = 2) -> None:
    """Close all files beyond *last*, as a program does first that needs no others.

    What started it may have had listening sockets that whoever it starts inherits.
    """
    os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))


def status_of(pidfd: int) -> int:
    """Return the exit code of a process that has ended, or less than 0: its signal."""
    try:
        # Not by its pid: if somebody waited for all children, it may be another's.
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # somebody else waited for all children
        return _remembered(pidfd)
    if ended is None:
        return UNKNOWN
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


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
        setsigmask=UNWANTED,  # until it can say so
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


def _remembered(pidfd: int) -> int:
    """Return what the kernel still knows of the end of a process that is no more."""
    info = bytearray(PIDFD_INFO.pack(PIDFD_INFO_EXIT))
    try:
        ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError:  # it is older
        return UNKNOWN
    flags, status = PIDFD_INFO_TOLD.unpack(info)
    return os.waitstatus_to_exitcode(status) if flags & PIDFD_INFO_EXIT else UNKNOWN
