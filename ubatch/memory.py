"""How do large arrays get to another process without being copied twice?

Through a segment of memory that both have: the sender copies them in, and they are read
where they are. The descriptor of a new segment goes over the socket once; then each
frame says what is where. A segment is used again when the reader says that nothing
refers to it any longer, so there are a few of them; the kernel frees them when neither
side is left.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from _socket import CMSG_SPACE, SCM_RIGHTS, SOL_SOCKET
from collections import deque
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, NamedTuple

from ubatch import process
from ubatch.wire import IN_BAND, Note, Part, WireError

Rights = list[tuple[int, int, bytes]]
"""What ``sendmsg()`` and ``recvmsg()`` call ancillary data: descriptors, here."""

_INT = Struct("i")

FEW = 8
"""Descriptors that may come ahead of the frames that speak of them."""

ROOM = CMSG_SPACE(FEW * _INT.size)
"""Bytes that they take."""

WORTH = 128 * 1024
"""Bytes in all from which on it is faster than the socket."""

SEGMENTS = 4
"""Of one sender, at most; what finds none free goes over the socket."""

SLICE = 1 << 20
"""Bytes to copy before others may run. Into memory that is new, 300 MB were seen to
take more than a second."""

LINE = 64
"""Bytes; where arrays may begin."""

SMALLEST = 1 << 20
"""Bytes of a segment: fewer would soon be too few."""


class Shared:
    """The memory that the two ends of a channel share.

    Owner: put() is for who sends, the others are for who receives.
    """

    def __init__(self, largest: int) -> None:
        """Share nothing yet; *largest*: bytes that may come with one frame."""
        self._largest = largest
        self._outgoing = Outgoing()
        self._incoming = Incoming()
        self._fds: deque[int] = deque()  # that came, and no frame has spoken of yet
        self._lost = False  # the kernel had no number for one that came

    def put(
        self, parts: Sequence[Part], pause: Callable[[], object]
    ) -> tuple[Note, Sequence[Part], Rights]:
        """Put large parts into memory that both ends have.

        Args:
            pause: May let others run; called now and then while much is copied.

        Returns:
            What to tell of that, and of what can be used again; the parts that are
            left to be sent; and the descriptor of a new segment.
        """
        large = [at for at, part in enumerate(parts) if len(part) >= IN_BAND]
        put = None
        if large:
            put = self._outgoing.put([parts[at] for at in large], pause)
        note: Note = [self._incoming.done()]
        if put is None:
            return note, parts, []
        note += [put.number, None if put.fd is None else put.size, large, put.places]
        gone = set(large)
        rest = [part for at, part in enumerate(parts) if at not in gone]
        if put.fd is None:
            return note, rest, []
        return note, rest, [(SOL_SOCKET, SCM_RIGHTS, _INT.pack(put.fd))]

    def get(self, note: Note, parts: list[Any]) -> list[Part]:
        """Return all parts of a frame: those that did not come with it, too.

        Raises:
            WireError: What is told of them makes no sense.
        """
        try:
            done, *put = note
            self._outgoing.free(done)
            if not put:
                return parts
            number, size, large, places = put
            if size is not None:
                self._open(number, size)
            if sum(length for _, length in places) > self._largest:
                raise WireError(f"more than {self._largest} bytes of shared memory")
            found = self._incoming.get(number, places)
            for at, part in zip(large, found, strict=True):
                parts.insert(at, part)
        except (TypeError, ValueError) as error:
            raise WireError("a frame whose memory makes no sense") from error
        return parts

    def keep(self, rights: Rights, lost: bool = False) -> None:
        """Keep the descriptors that came, until frames speak of them.

        Args:
            lost: There were more, which the kernel did not give to this process.
        """
        self._lost = self._lost or lost
        self._fds += _descriptors(rights)
        while len(self._fds) > FEW:
            os.close(self._fds.pop())

    def close(self) -> None:
        """Let go of descriptors that nobody will speak of."""
        while self._fds:
            os.close(self._fds.pop())

    def _open(self, number: int, size: int) -> None:
        # Not the next one: after one that was lost, that is of another frame.
        if self._lost:
            raise WireError(
                f"a segment of memory that did not come (process {os.getpid()} has too "
                "many files open; raise its RLIMIT_NOFILE, which is ulimit -n)"
            )
        if not self._fds:
            raise WireError("a segment of memory that did not come")
        fd = self._fds.popleft()
        try:
            self._incoming.open(number, size, fd)
        finally:
            os.close(fd)


def close_all(rights: Rights) -> None:
    """Close descriptors that have been sent, or will not be."""
    for fd in _descriptors(rights):
        os.close(fd)


def _descriptors(rights: Rights) -> list[int]:
    found: list[int] = []
    for _, kind, data in rights:
        if kind == SCM_RIGHTS:
            whole = len(data) - len(data) % _INT.size
            found += (fd for (fd,) in _INT.iter_unpack(data[:whole]))
    return found


class Outgoing:
    """The segments that this side writes into.

    Owner: one sends at a time; free() may come from another thread, and only adds.
    """

    def __init__(self) -> None:
        self._segments: list[mmap.mmap | None] = [None] * SEGMENTS
        self._free: set[int] = set(range(SEGMENTS))

    def put(self, parts: Sequence[Part], pause: Callable[[], object]) -> Put | None:
        """Copy parts into a segment; None if none is free, or they are not worth it.

        While it lets others run, the segment is in nobody else's hands: it is not free,
        and its reader has not been told of it.
        """
        needed, places = 0, []
        for part in parts:
            places.append((needed, len(part)))
            needed += -(-len(part) // LINE) * LINE
        if needed < WORTH or not hasattr(os, "memfd_create"):
            return None
        number, fd = self._take(needed)
        if number is None:
            return None
        segment = self._segments[number]
        assert segment is not None
        try:
            _copy(parts, places, segment, pause)
        except BaseException:  # who sends was killed meanwhile
            if fd is not None:
                os.close(fd)
            self.free([~number])
            raise
        return Put(number, len(segment), places, fd)

    def free(self, numbers: list[int]) -> None:
        """Take note that the reader has done with some segments; see done()."""
        if not all(number in range(-SEGMENTS, SEGMENTS) for number in numbers):
            raise WireError("segments of memory that there are not")
        for number in numbers:
            if number < 0:
                number = ~number
                self._segments[number] = None
            self._free.add(number)

    def _take(self, needed: int) -> tuple[int | None, int | None]:
        """Return a free segment, and its descriptor if it is a new one."""
        made = None
        for number in list(self._free):  # others may be added meanwhile
            segment = self._segments[number]
            if segment is not None and len(segment) >= needed:
                self._free.discard(number)
                return number, None
            made = number
        if made is None:
            return None, None
        try:
            self._segments[made], fd = _make(needed)
        except OSError:  # too many files are open, or there is no memory
            return None, None
        self._free.discard(made)
        return made, fd


class Put(NamedTuple):
    """What was put into a segment."""

    number: int
    size: int
    """Of the segment."""
    places: list[tuple[int, int]]
    """Where in there: from which byte on, and how many."""
    fd: int | None
    """Of the segment, if the reader does not have it yet; to be closed."""


class Incoming:
    """The segments that the other side writes into.

    Owner: one receives at a time; done() may be called by who sends.
    """

    def __init__(self) -> None:
        self._segments: dict[int, mmap.mmap] = {}
        # Of which the other side has not been told, and how often we had forked then.
        self._read: dict[int, int] = {}

    def open(self, number: int, size: int, fd: int) -> None:
        """Take a new segment in, instead of one of the same number.

        Raises:
            WireError: It is not what the other side says.
        """
        try:
            # Or it could be cut short, and reading it would be fatal.
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            good = sealed and number in range(SEGMENTS)
            if not good or not 0 < size <= os.fstat(fd).st_size:
                raise WireError("a segment of memory that is not as it should be")
            self._segments[number] = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            raise WireError(f"a segment of memory that is of no use: {error}") from None

    def get(self, number: int, places: Sequence[Sequence[int]]) -> list[memoryview]:
        """Return what is in a segment.

        Raises:
            WireError: There is no such place.
        """
        segment = self._segments.get(number)
        if segment is None or number in self._read:
            raise WireError("a segment of memory that nobody has spoken of")
        whole = memoryview(segment)
        if any(not 0 <= at <= at + size <= len(whole) for at, size in places):
            raise WireError("a place that is not in its segment of memory")
        # Race (handed_out): 1. this says that a segment is read; 2. done() finds that
        #       nothing refers to it yet; 3. this hands it out, and the other side
        #       writes over it. So something does before this says so.
        found = [whole[at : at + size] for at, size in places]
        self._read[number] = process.forks
        return found

    def done(self) -> list[int]:
        """Return the segments that nothing refers to any more, once.

        A child that we have forked since may refer to what was there: such a one is
        told of by ``~number``, and is to be made anew.
        """
        read = list(self._read.items())  # others may be added meanwhile
        done = [(number, at) for number, at in read if _unused(self._segments[number])]
        for number, _ in done:
            del self._read[number]
        return [number if at == process.forks else ~number for number, at in done]


def _copy(
    parts: Sequence[Part],
    places: Sequence[tuple[int, int]],
    segment: mmap.mmap,
    pause: Callable[[], object],
) -> None:
    """Copy parts to their places in a segment, with pauses."""
    left = SLICE
    for part, (offset, size) in zip(parts, places):
        if left <= 0:
            pause()
            left = SLICE
        left -= size
        if size <= SLICE:
            segment[offset : offset + size] = part
            continue
        for at in range(0, size, SLICE):
            if at:
                pause()
            piece = memoryview(part)[at : at + SLICE]
            segment[offset + at : offset + at + len(piece)] = piece


def _make(needed: int) -> tuple[mmap.mmap, int]:
    size = max(SMALLEST, 1 << (needed - 1).bit_length())
    fd = os.memfd_create("ubatch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return mmap.mmap(fd, size), fd
    except BaseException:
        os.close(fd)
        raise


def _unused(segment: mmap.mmap) -> bool:
    """Tell whether no array, nor anything else, refers to a segment.

    To be resized is refused to one that is in use; to its own size, it is not changed.
    """
    try:
        segment.resize(len(segment))
    except BufferError:
        return False
    return True
