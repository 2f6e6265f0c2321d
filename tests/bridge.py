"""How is a handler held that runs in another process?

Each model process has a link to this one: a socket, and a native thread here, which
calls what stands for the handler, and sends back how that ended. So a run can be held,
and ended, as if it were here.
"""

from __future__ import annotations

import os
import pickle
import struct
from _socket import (
    AF_UNIX,
    MSG_DONTWAIT,
    MSG_PEEK,
    SHUT_RDWR,
    SO_PEERCRED,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from tests.apps.held import held
from ubatch.backends.native import start_thread

Handle = Callable[["Link", tuple[Any, ...], dict[str, Any]], Any]


class Bridge:
    """Where model processes call in."""

    def __init__(self, handle: Handle) -> None:
        self.links: list[Link] = []  # of those that are there, the oldest first
        self._handle = handle
        self._listener = socket(AF_UNIX, SOCK_STREAM)
        self._listener.bind(b"")  # the kernel finds a name
        self._listener.listen(16)
        start_thread(self._accept)

    @property
    def factory(self) -> Callable[[], Any]:
        """What makes the handler there."""
        return partial(held, self._listener.getsockname(), os.getpid())

    @property
    def address(self) -> str:
        """Where model processes of a server call in, in hexadecimal."""
        name: bytes = self._listener.getsockname()
        return name.hex()

    def busy(self) -> int:
        """Return how many of the processes wait for an answer, or are about to end."""
        return sum(link.is_busy() for link in list(self.links))

    def close(self) -> None:
        """Take no more in. A link ends when its process does."""
        self._listener.shutdown(SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                link = Link(self._listener._accept()[0])
                self.links.append(link)
                start_thread(partial(self._serve, link))
        self._listener.close()

    def _serve(self, link: Link) -> None:
        try:
            with suppress(OSError):  # it was killed
                link.answer_all(self._handle)
        finally:
            self.links.remove(link)
            link.close()


class Link:
    """One model process."""

    def __init__(self, fd: int) -> None:
        self._socket = socket(AF_UNIX, SOCK_STREAM, 0, fd)
        self._stream = open(fd, "rb", closefd=False)
        self._answering = False
        whose = self._socket.getsockopt(SOL_SOCKET, SO_PEERCRED, 12)
        self.pid: int = struct.unpack("3i", whose)[0]

    def is_gone(self) -> bool:
        """Tell whether the process has ended, and has left nothing to be read."""
        try:
            return not self._socket.recv(1, MSG_PEEK | MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def is_busy(self) -> bool:
        # Race (between): 1. the thread finds that there is something to read; 2. it
        #       reads that. Before the second it says so.
        try:
            self._socket.recv(1, MSG_PEEK | MSG_DONTWAIT)
        except BlockingIOError:
            return self._answering
        except OSError:
            pass
        return True

    def answer_all(self, handle: Handle) -> None:
        """Answer each batch that it sends, until it ends."""
        self._socket.sendall(b"!")
        while self._socket.recv(1, MSG_PEEK):
            self._answering = True
            self._answer(handle)
            self._answering = False

    def _answer(self, handle: Handle) -> None:
        error = value = None
        try:
            value = handle(self, *pickle.load(self._stream))
        except BaseException as raised:
            error = raised
        self._socket.sendall(pickle.dumps((error, value)))

    def close(self) -> None:
        self._stream.close()
        self._socket.close()
