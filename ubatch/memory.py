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
from collections.abc import Sequence
from typing import NamedTuple

from ubatch.wire import Part, WireError

WORTH = 128 * 1024
"""Bytes in all from which on it is faster than the socket."""

SEGMENTS = 4
"""Of one sender, at most; what finds none free goes over the socket."""

LINE = 64
"""Bytes; where arrays may begin."""

SMALLEST = 1 << 20
"""Bytes of a segment: fewer would soon be too few."""


class Outgoing:
    """The segments that this side writes into.

    Owner: one sends at a time; free() may come from another thread, and only adds.
    """

    def __init__(self) -> None:
        self._segments: list[mmap.mmap | None] = [None] * SEGMENTS
        self._free: set[int] = set(range(SEGMENTS))

    def put(self, parts: Sequence[Part]) -> Put | None:
        """Copy parts into a segment; None if none is free, or they are not worth it."""
        sizes = [len(part) for part in parts]
        needed = sum(-(-size // LINE) * LINE for size in sizes)
        if needed < WORTH or not hasattr(os, "memfd_create"):
            return None
        number, fd = self._take(needed)
        if number is None:
            return None
        segment = self._segments[number]
        assert segment is not None
        offset, places = 0, []
        for part, size in zip(parts, sizes):
            segment[offset : offset + size] = part
            places.append((offset, size))
            offset += -(-size // LINE) * LINE
        return Put(number, len(segment), places, fd)

    def free(self, numbers: list[int]) -> None:
        """Take note that the reader has done with some segments."""
        self._free.update(numbers)

    def _take(self, needed: int) -> tuple[int | None, int | None]:
        """Return a free segment, and its descriptor if it is a new one."""
        made = None
        for number in self._free:
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
        self._read: set[int] = set()  # of which the other side has not been told

    def open(self, number: int, size: int, fd: int) -> None:
        """Take a new segment in, instead of one of the same number.

        Raises:
            WireError: It is not what the other side says.
        """
        try:
            # Or it could be cut short, and reading it would be fatal.
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not sealed or os.fstat(fd).st_size < size or number >= SEGMENTS:
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
        self._read.add(number)
        whole = memoryview(segment)
        if any(not 0 <= at <= at + size <= len(whole) for at, size in places):
            raise WireError("a place that is not in its segment of memory")
        return [whole[at : at + size] for at, size in places]

    def done(self) -> list[int]:
        """Return the segments that nothing refers to any more, once."""
        done = [number for number in self._read if _unused(self._segments[number])]
        self._read.difference_update(done)
        return done


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
