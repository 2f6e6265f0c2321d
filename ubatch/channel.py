"""How do frames get from one process to another?

Over a Unix socket: who has to wait does so as its backend waits, a greenlet in favour
of its hub, a thread in the kernel. The sockets are ``_socket``'s, which no
monkey-patching reaches. There and back, 10 kB take 20 to 90 us so, and 230 with pyzmq,
whose threads are two more to be woken each way.
"""

from __future__ import annotations

import mmap
import os
from _socket import MSG_CMSG_CLOEXEC, MSG_CTRUNC, SHUT_RDWR, socket
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Protocol

from ubatch import process
from ubatch.memory import ROOM, Rights, Shared, close_all
from ubatch.wire import (
    HEADER,
    LARGEST_FRAME,
    Frame,
    Kind,
    Part,
    WireError,
    decode_first,
    decode_header,
    decode_sizes,
    encode,
)

AHEAD = 64 * 1024
"""Bytes to read at once; a frame that is smaller takes one system call."""

AT_ONE_GO = 8 << 20
"""Bytes of a part, at most, for which there is memory before they come."""

PAUSE_EVERY = 0.001
"""Seconds after which whoever sends or receives without having to wait lets others run:
a client that never pauses must not keep a hub from all others."""

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

    Args:
        wait_for: How to wait; None where nothing else is to run meanwhile, and nothing
            is to be waited for with a timeout: the socket blocks, and saves 15 us.
        largest: Bytes of a frame that may come.
        stalled: Seconds until more of a frame that has begun must have come, each
            time; as long as for its beginning, if not given.
    """

    def __init__(
        self,
        sock: socket,
        wait_for: WaitFor | None,
        largest: int = LARGEST_FRAME,
        stalled: float | None = None,
    ) -> None:
        sock.setblocking(wait_for is None)
        self._epoch = process.epoch
        self.largest_sent = LARGEST_FRAME  # what the other side takes
        self._largest = largest
        self._stalled = stalled
        self._sock = sock
        self._fd = sock.fileno()
        self._writer: socket | None = None  # the same, for who waits to write
        self._wait_for = wait_for
        self._buffer = bytearray(AHEAD)
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0  # what of it has been read, and not taken
        self._shared = Shared(largest)
        self._paused = monotonic()  # when the receiver last let others run
        self._sending = self._paused  # since when the sender has not

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
        self._sending = monotonic()
        note, parts, rights = self._shared.put(parts, self._maybe_pause_sending)
        try:
            pieces = encode(kind, ident, head, parts, note)
            self._check_size(kind, pieces)  # the other side counts the head, too
            self._send(pieces, rights, timeout)
        finally:
            close_all(rights)

    def _check_size(self, kind: Kind, parts: Sequence[Part]) -> None:
        size = sum(map(len, parts))
        if size > self.largest_sent:
            raise WireError(
                f"a {kind.name} of {size} bytes; {self.largest_sent} are allowed"
            )

    def _send(self, left: list[Part], rights: Rights, timeout: float | None) -> None:
        self._sending = monotonic()
        while left:
            self._maybe_pause_sending()
            try:
                sent = self._sock.sendmsg(left[:AT_ONCE], rights)
                rights = []  # they went with the first byte
            except BlockingIOError:
                if not self._wait(True, timeout):
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
        if self._stop > self._start:  # it goes on without having had to wait
            self._maybe_pause()
        if not self._fill(1, timeout):
            return None
        if self._stalled is not None:
            timeout = self._stalled
        try:
            opened = decode_header(self._take(HEADER.size, timeout), self._largest)
            sizes = decode_sizes(self._take(8 * opened.parts, timeout), opened)
            first, *parts = [self._take(size, timeout) for size in sizes]
        except TimeoutError as error:
            raise TimeoutError(f"{error}, in the middle of a frame") from None
        head, note = decode_first(first)
        return Frame(opened.kind, opened.ident, head, self._shared.get(note, parts))

    def wait(self) -> None:
        """Let others run until something has come. Blocks this caller until then.

        Where an answer takes a while, that saves a look too early; and whoever asks
        and asks never keeps a hub from others, however soon it is answered.
        """
        if self._start == self._stop:
            self._wait(False, None)
            self._paused = monotonic()

    def end(self) -> None:
        """Have both sides find the end of it. Does not block."""
        if self._epoch is process.epoch:  # or it is our parent's as well
            with suppress(OSError):  # it is there already
                self._sock.shutdown(SHUT_RDWR)

    def close(self) -> None:
        """Let go of the socket."""
        if self._writer is not None:
            self._writer.close()
        self._sock.close()
        self._shared.close()

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

    def _take(self, size: int, timeout: float | None) -> Part:
        """Take *size* bytes of a frame that has begun.

        What is larger than the buffer is read to where it will stay.
        """
        if size <= AHEAD:
            if not self._fill(size, timeout):
                raise WireError("a frame that ends too early")
            self._start += size
            return self._buffer[self._start - size : self._start]
        part = _room(size)
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
        late = False
        while True:
            try:
                # With no flag, a process that is started now would have them too.
                count, more, flags, _ = self._sock.recvmsg_into(
                    [into], ROOM, MSG_CMSG_CLOEXEC
                )
                if more or flags & MSG_CTRUNC:
                    self._shared.keep(more, lost=bool(flags & MSG_CTRUNC))
                self._maybe_pause()
                return count
            except BlockingIOError:
                if late:
                    raise TimeoutError(
                        f"the other side has said nothing for {timeout} seconds"
                    ) from None
                # It may be this process that stood still: so it looks once more.
                late = not self._wait(False, timeout)
                self._paused = monotonic()

    def _maybe_pause(self) -> None:
        if monotonic() - self._paused > PAUSE_EVERY:
            self._wait(False, 0.0)
            self._paused = monotonic()

    def _maybe_pause_sending(self) -> None:
        if monotonic() - self._sending > PAUSE_EVERY:
            self._wait(True, 0.0)
            self._sending = monotonic()

    def _wait(self, write: bool, timeout: float | None) -> bool:
        if self._wait_for is None:
            return True
        fd = self._write_fd() if write else self._fd
        return self._wait_for(fd, write, timeout)

    def _write_fd(self) -> int:
        # A number of its own: of two greenlets that wait for one, gevent on libuv
        # forgets the second, if the other side is gone and the first goes away.
        if self._writer is None:
            try:
                self._writer = socket(fileno=os.dup(self._fd))
            except OSError:  # too many files are open
                return self._fd
        return self._writer.fileno()


def _room(size: int) -> bytearray | memoryview:
    """Return memory for a part, of which the size is all that has come yet.

    The kernel gives large ones page by page, as they are written. A bytearray would be
    filled with zeros first: whoever says "1 GiB" could stop a hub for seconds.
    """
    if size <= AT_ONE_GO:
        return bytearray(size)
    try:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return memoryview(mmap.mmap(-1, size, private))
    except OSError as error:
        raise WireError(f"a part of {size} bytes: {error}") from None


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
