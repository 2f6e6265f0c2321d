"""Where does a model server listen, and who may connect?

On a Unix socket that only its user can reach: of mode 0600, in a folder of mode 0700,
and the kernel is asked for the user of whoever connects. There is no TCP: what is sent
are pickles.
"""

from __future__ import annotations

import os
import stat
from _socket import AF_UNIX, SO_PEERCRED, SOCK_STREAM, SOL_SOCKET, socket
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from struct import Struct

from ubatch.errors import BackendError
from ubatch.options import shown

SCHEME = "unix:"
LONGEST_PATH = 107
"""Bytes of a path that the kernel takes."""

BACKLOG = 1024
"""Connections that wait to be accepted; Linux takes as many as net.core.somaxconn."""

CREDENTIALS = Struct("3i")  # pid, uid, gid


def path_of(address: str, *, scheme: bool = True) -> str:
    """Return the path of an address such as ``"unix:/run/app/model.sock"``.

    Args:
        scheme: It has to begin with ``unix:``; else it may.

    Raises:
        ValueError: It is none.
        TypeError: It is no string.
    """
    if not isinstance(address, str):
        raise TypeError(f"an address must be 'unix:PATH', not {shown(address)}")
    path = address.removeprefix(SCHEME)
    if scheme and path == address or not path or "\0" in path:
        raise ValueError(f"{shown(address)} is no address; write 'unix:PATH'")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ValueError(
            f"address {shown(address)} is too long: a path may have {LONGEST_PATH} "
            "bytes; use a shorter folder"
        )
    return path


def listen(path: str) -> socket:
    """Return a socket that listens there; makes the folder if there is none.

    Raises:
        BackendError: Others could reach it, or somebody listens there already.
        OSError: The folder cannot be made or used.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, mode=0o700, exist_ok=True)
    found = os.stat(folder)
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid() or mode & 0o077:
        raise BackendError(
            f"{folder} can be reached by others (mode {mode:o}, "
            f"user {found.st_uid}); use a folder of your own, of mode 700"
        )
    listener = socket(AF_UNIX, SOCK_STREAM)
    try:
        with _alone_in(folder):
            _take_away(path)
            mask = os.umask(0o177)
            try:
                listener.bind(path)
            finally:
                os.umask(mask)
            listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: str) -> socket:
    """Return a socket that is connected to who listens there. Does not block.

    Raises:
        OSError: Nobody listens, or too many wait to be accepted (BlockingIOError).
        BackendError: Who listens is another user.
    """
    sock = socket(AF_UNIX, SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
        check_peer(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def is_taken(path: str) -> bool:
    """Tell whether somebody listens there. Does not block."""
    try:
        connect(path).close()
    except (BackendError, BlockingIOError):  # another user, or it has much to do
        return True
    except OSError:
        return False
    return True


def check_peer(sock: socket) -> int:
    """Return the process that has the other end.

    Raises:
        BackendError: It runs as another user.
    """
    data = sock.getsockopt(SOL_SOCKET, SO_PEERCRED, CREDENTIALS.size)
    pid, user, _ = CREDENTIALS.unpack(data)
    if user != os.geteuid():
        raise BackendError(
            f"process {pid} runs as user {user}, and this one as {os.geteuid()}: a "
            "model server is for processes of its own user alone"
        )
    return int(pid)


@contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """Keep other servers from taking a path there, until this one listens.

    Of two that find the socket of a third, which is gone, the slower one would take
    away what the other has made.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        flock(fd, LOCK_EX)
        yield
    finally:
        os.close(fd)


def _take_away(path: str) -> None:
    """Remove the socket of a server that is gone."""
    try:
        connect(path).close()
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
            return
        raise BackendError(f"{path} is there, and is no socket; use another path")
    except BlockingIOError:
        pass  # it has more to do than it can
    raise BackendError(f"a model server listens at {path} already; stop it first")
