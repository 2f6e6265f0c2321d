"""What do two processes say to each other, byte by byte?

A frame is a header, the sizes of its parts, and the parts. The first part tells what
the others are, in JSON; those are pickles, whose large buffers are parts of their own,
so that no array is copied into a pickle and out again. Pure: no socket, no clock.
"""

from __future__ import annotations

import json
import json.encoder
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import islice
from struct import Struct
from typing import Any, NamedTuple

VERSION = 1
"""Of all that follows; the first five bytes of a frame are the same in all of them."""

MAGIC = b"ubat"
HEADER = Struct("<4sBBHIQ")  # magic, version, kind, parts, ident, bytes in all parts

MOST_PARTS = 0xFFFF
LARGEST_FRAME = 1 << 30
"""Bytes that one frame may hold, unless a server says otherwise."""

IN_BAND = 16 * 1024
"""Bytes of a buffer from which on it is a part of its own: to copy less than that into
the pickle and out again is cheaper than one more part, of which each costs 1 us."""

Part = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a frame says."""

    HELLO = 1  # who is there: the first frame each way between a client and a server
    REFUSE = 2  # why there will be no more frames; the last one
    SETUP = 3  # to a model process: what it is
    READY = 4  # from it: the handler is there
    FAILED = 5  # from it: there is none, and why
    JOB = 6  # to it: one batch
    OUTCOME = 7  # from it: what became of that
    CALLS = 8  # to a server: some calls
    ANSWERS = 9  # from it: what became of some of them
    LEAVE = 10  # to it: nobody waits for some of them any more
    STATUS = 11  # to it: how is it? And from it: so
    BYE = 12  # from it: it ends, and takes no more calls


class Frame(NamedTuple):
    """One frame, as it came."""

    kind: Kind
    ident: int
    """Which calls it is about."""
    head: Any
    """What the first part tells."""
    parts: list[Part]
    """The others."""


class WireError(Exception):
    """What came is not what this version of ubatch understands; it is too long, say."""


class VersionError(WireError):
    """The other side speaks another version."""

    def __init__(self, theirs: int) -> None:
        super().__init__(
            f"the other side speaks version {theirs} of the wire and this one version "
            f"{VERSION}; install the same ubatch on both sides, and restart both"
        )


Note = list[Any]
"""What the first part tells besides the head: see memory.py."""

NOTHING: Note = [[]]


def encode(
    kind: Kind, ident: int, head: Any, parts: Sequence[Part] = (), note: Note = NOTHING
) -> list[Part]:
    """Return a frame, in pieces.

    Raises:
        WireError: It has too many parts.
    """
    first = "".join(_to_json([head, note], 0)).encode()
    sizes = [len(first), *map(len, parts)]
    if len(sizes) > MOST_PARTS:
        raise WireError(
            f"a {kind.name} of {len(sizes)} parts; {MOST_PARTS} are allowed"
        )
    header = HEADER.pack(MAGIC, VERSION, kind, len(sizes), ident, sum(sizes))
    table = struct.pack(f"<{len(sizes)}Q", *sizes)
    return [header + table + first, *parts]


class Opened(NamedTuple):
    """What a header says of the frame that begins with it."""

    kind: Kind
    ident: int
    parts: int
    total: int


def decode_header(data: Part, largest: int) -> Opened:
    """Take a header apart.

    Raises:
        WireError: It is none, of another version, or of a frame that is too large.
    """
    magic, version, kind, parts, ident, total = HEADER.unpack(data)
    if magic != MAGIC:
        raise WireError("what came is no frame of ubatch's")
    if version != VERSION:
        raise VersionError(version)
    if kind not in KINDS:
        raise WireError(
            f"a frame of kind {kind}, which version {VERSION} does not know"
        )
    if total > largest:
        raise WireError(f"a {KINDS[kind].name} of {total} bytes; {largest} are allowed")
    return Opened(KINDS[kind], ident, parts, total)


def decode_sizes(data: Part, opened: Opened) -> tuple[int, ...]:
    """Return the sizes of a frame's parts.

    Raises:
        WireError: They do not add up.
    """
    sizes: tuple[int, ...] = struct.unpack_from(f"<{opened.parts}Q", data)
    if sum(sizes) != opened.total or not sizes:
        raise WireError(f"a {opened.kind.name} whose parts do not add up")
    return sizes


def decode_first(data: Part) -> tuple[Any, Note]:
    """Return what the first part of a frame tells.

    Raises:
        WireError: That makes no sense.
    """
    try:
        text = str(data, "utf-8")
        (head, note), end = _from_json(text, 0)
    except (ValueError, TypeError, RecursionError, StopIteration) as error:
        raise WireError("a frame whose first part makes no sense") from error
    if end != len(text) or not isinstance(note, list):
        raise WireError("a frame whose first part makes no sense")
    return head, note


def _encoder() -> Callable[[Any, int], Iterable[str]]:
    """Return what writes JSON, in pieces.

    ``JSONEncoder.encode()`` makes this anew each time, and ``decode()`` looks for
    blanks around: where caches are cold that is 23 of 33 us, and 12 of 30, measured.
    """
    plain = json.JSONEncoder(separators=(",", ":"), check_circular=False)
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # not CPython
        return lambda value, level: plain.iterencode(value)
    text = json.encoder.encode_basestring_ascii
    options = ":", ",", False, False, True  # sort no keys, skip none, allow NaN
    made: Callable[[Any, int], Iterable[str]]
    made = make(None, plain.default, text, None, *options)
    return made


_to_json = _encoder()
_from_json = json.JSONDecoder().scan_once  # type: ignore[attr-defined]

KINDS = {int(kind): kind for kind in Kind}


def pack(value: Any) -> list[Part]:
    """Return a value as a pickle, and after it the large buffers that it refers to.

    Raises:
        Exception: It cannot be pickled.
    """
    buffers: list[Part] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous: the pickle takes it in
            return True
        if raw.nbytes < IN_BAND:
            return True
        buffers.append(raw)
        return False

    return [pickle.dumps(value, protocol=5, buffer_callback=keep), *buffers]


def unpack(parts: Sequence[Part]) -> Any:
    """Return what pack() was given.

    Raises:
        Exception: Something that it needs is not here.
    """
    return pickle.loads(parts[0], buffers=parts[1:])


class Reader:
    """Takes parts from a frame, one group after the other."""

    def __init__(self, frame: Frame) -> None:
        self._parts: Iterator[Part] = iter(frame.parts)

    def take(self, count: int) -> list[Part]:
        """Return the next *count* parts.

        Raises:
            WireError: There are not as many.
        """
        taken = list(islice(self._parts, count))
        if len(taken) != count:
            raise WireError("a frame that lacks some of its parts")
        return taken
