"""How do frames get from one process to another?

Over a Unix socket that never blocks: who has to wait does so as its backend waits, a
greenlet in favour of its hub, a thread in the kernel. The sockets are ``_socket``'s,
which no monkey-patching reaches.
"""

from __future__ import annotations

import os
from _socket import CMSG_SPACE, SCM_RIGHTS, SHUT_RDWR, SOL_SOCKET, socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from struct import Struct
from typing import Any, Protocol

from ubatch import process
from ubatch.memory import Incoming, Outgoing
from ubatch.wire import (
    HEADER,
    IN_BAND,
    LARGEST_FRAME,
    Frame,
    Kind,
    Note,
    Part,
    WireError,
    decode_first,
    decode_header,
    decode_sizes,
    encode,
)

AHEAD = 64 * 1024
"""Bytes to read at once; a frame that is smaller takes one system call."""

_INT = Struct("i")

FEW = 8
"""Descriptors that may come ahead of the frames that speak of them."""

ROOM = CMSG_SPACE(FEW * _INT.size)

AT_ONCE = 512
"""Parts to send at once; Linux takes 1024."""


class WaitFor(Protocol):
    """Waits until a file descriptor can be read, or written."""

    def __call__(
        self, fd: int, write: bool = False, timeout: float | None = None
    ) -> bool:
        """Block this caller, *timeout* seconds at most; False if that was too short.

        Raises:
            OSError: This process was forked from the one that waited.
        """


class Channel:
    """Sends and receives whole frames.

    Owner: one receives at a time, and one sends; end() is for anybody. What receives
    closes it, once nobody else has it: while it is waited for, its number must not be
    given to another file.
    """

    def __init__(
        self, sock: socket, wait_for: WaitFor, largest: int = LARGEST_FRAME
    ) -> None:
        sock.setblocking(False)
        self.largest = largest
        self._epoch = process.epoch
        self._sock = sock
        self._fd = sock.fileno()
        self._wait_for = wait_for
        self._buffer = bytearray(AHEAD)
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0  # what of it has been read, and not taken
        self._outgoing = Outgoing()
        self._incoming = Incoming()
        self._fds: deque[int] = deque()  # that came, and no frame has spoken of yet

    def send(
        self,
        kind: Kind,
        ident: int,
        head: object,
        parts: Sequence[Part] = (),
        timeout: float | None = None,
    ) -> None:
        """Send one frame; blocks this caller until all of it is on its way.

        Args:
            timeout: Seconds that the other side may take none of it.

        Raises:
            OSError: The other side is gone.
            TimeoutError: It takes nothing.
            WireError: The frame is too large.
        """
        self._check_size(kind, parts)
        note, parts, fd = self._share(parts)
        try:
            pieces = encode(kind, ident, head, note, parts)
            self._check_size(kind, pieces)  # the other side counts the head, too
            self._send(pieces, fd, timeout)
        finally:
            if fd is not None:
                os.close(fd)

    def _check_size(self, kind: Kind, parts: Sequence[Part]) -> None:
        size = sum(map(len, parts))
        if size > self.largest:
            raise WireError(
                f"a {kind.name} of {size} bytes; {self.largest} are allowed"
            )

    def _share(self, parts: Sequence[Part]) -> tuple[Note, Sequence[Part], int | None]:
        """Put large parts into memory that both sides have.

        Returns:
            What to tell of that and of memory that can be used again, what is left to
            be sent, and the descriptor of a new segment.
        """
        note: Note = [self._incoming.done()]
        large = [at for at, part in enumerate(parts) if len(part) >= IN_BAND]
        put = self._outgoing.put([parts[at] for at in large])
        if put is None:
            return note, parts, None
        size = None if put.fd is None else put.size
        note += [put.number, size, large, put.places]
        where = set(large)
        return note, [p for at, p in enumerate(parts) if at not in where], put.fd

    def _send(self, left: list[Part], fd: int | None, timeout: float | None) -> None:
        rights = [] if fd is None else [(SOL_SOCKET, SCM_RIGHTS, _INT.pack(fd))]
        while left:
            try:
                sent = self._sock.sendmsg(left[:AT_ONCE], rights)
                rights = []
            except BlockingIOError:
                if not self._wait_for(self._fd, True, timeout):
                    raise TimeoutError(
                        f"the other side has taken nothing for {timeout} seconds"
                    ) from None
            else:
                _drop(left, sent)

    def receive(self, timeout: float | None = None) -> Frame | None:
        """Return the next frame; None at the end. Blocks this caller until then.

        Args:
            timeout: Seconds until something of it must have come, each time.

        Raises:
            OSError: The other side is gone.
            TimeoutError: It says nothing.
            WireError: What came is no frame, or ends too early.
        """
        if not self._fill(HEADER.size, timeout):
            if self._start == self._stop:
                return None
            raise WireError("a frame that ends too early")
        opened = decode_header(self._take(HEADER.size), self.largest)
        sizes = decode_sizes(self._take(8 * opened.parts, timeout), opened)
        first, *parts = [self._take(size, timeout) for size in sizes]
        head, note = decode_first(first)
        return Frame(opened.kind, opened.ident, head, self._shared(note, parts))

    def _shared(self, note: Note, parts: list[Any]) -> list[Part]:
        """Return all parts of a frame: those in shared memory, too."""
        try:
            done, *put = note
            self._outgoing.free(done)
            if not put:
                return parts
            number, size, large, places = put
            if size is not None:
                self._open(number, size)
            if sum(length for _, length in places) > self.largest:
                raise WireError(f"more than {self.largest} bytes of shared memory")
            found = self._incoming.get(number, places)
            for at, part in zip(large, found, strict=True):
                parts.insert(at, part)
        except (TypeError, ValueError) as error:
            raise WireError("a frame whose memory makes no sense") from error
        return parts

    def _open(self, number: int, size: int) -> None:
        if not self._fds:
            raise WireError("a segment of memory that did not come")
        fd = self._fds.popleft()
        try:
            self._incoming.open(number, size, fd)
        finally:
            os.close(fd)

    def end(self) -> None:
        """Have both sides find the end of it. Does not block."""
        if self._epoch is process.epoch:  # or it is our parent's as well
            with suppress(OSError):  # it is there already
                self._sock.shutdown(SHUT_RDWR)

    def close(self) -> None:
        """Let go of the socket."""
        self._sock.close()
        while self._fds:
            os.close(self._fds.pop())

    def _fill(self, size: int, timeout: float | None) -> bool:
        """Have *size* bytes in the buffer, that has room for them; False at the end."""
        have = self._stop - self._start
        if have >= size:
            return True
        if self._start + size > AHEAD:
            self._buffer[:have] = self._buffer[self._start : self._stop]
            self._start, self._stop = 0, have
        elif not have:
            self._start = self._stop = 0
        while self._stop - self._start < size:
            count = self._read(self._view[self._stop :], timeout)
            if not count:
                return False
            self._stop += count
        return True

    def _take(self, size: int, timeout: float | None = None) -> bytearray:
        """Take *size* bytes of a frame that has begun.

        What is larger than the buffer is read to where it will stay.
        """
        if size <= AHEAD:
            if not self._fill(size, timeout):
                raise WireError("a frame that ends too early")
            self._start += size
            return self._buffer[self._start - size : self._start]
        part = bytearray(size)
        have = self._stop - self._start
        part[:have] = self._buffer[self._start : self._stop]
        self._start = self._stop = 0
        with memoryview(part) as view:
            while have < size:
                count = self._read(view[have:], timeout)
                if not count:
                    raise WireError("a frame that ends too early")
                have += count
        return part

    def _read(self, into: memoryview, timeout: float | None) -> int:
        while True:
            try:
                count, more, _, _ = self._sock.recvmsg_into([into], ROOM)
                if more:
                    self._keep(more)
                return count
            except BlockingIOError:
                if not self._wait_for(self._fd, False, timeout):
                    raise TimeoutError(
                        f"the other side has said nothing for {timeout} seconds"
                    ) from None

    def _keep(self, more: list[tuple[int, int, bytes]]) -> None:
        """Keep the descriptors that came, until frames speak of them."""
        for _, kind, data in more:
            if kind == SCM_RIGHTS:
                whole = len(data) - len(data) % _INT.size
                self._fds += (fd for (fd,) in _INT.iter_unpack(data[:whole]))
        while len(self._fds) > FEW:
            os.close(self._fds.pop())


def _drop(left: list[Part], sent: int) -> None:
    """Take what was sent out of what is to be."""
    gone = 0
    for part in left:
        if len(part) > sent:
            break
        sent -= len(part)
        gone += 1
    del left[:gone]
    if sent:
        left[0] = memoryview(left[0])[sent:]
