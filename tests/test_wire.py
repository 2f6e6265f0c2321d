"""Do frames arrive as they were sent, and is what is none refused?"""

from __future__ import annotations

import os
import pickle
import struct
from _socket import socket, socketpair
from collections.abc import Iterator
from random import Random
from typing import Any

import gevent
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.fakes import NativeCaller
from ubatch import backends
from ubatch.backends.native import wait_for
from ubatch.channel import AHEAD, AT_ONE_GO, Channel
from ubatch.parcel import (
    Answers,
    Done,
    PackedError,
    Run,
    Work,
    pack_columns,
    pack_error,
    pack_results,
    read_done,
    read_work,
    unpack_columns,
    unpack_error,
    unpack_results,
    write_done,
    write_work,
)
from ubatch.server import memory_of
from ubatch.wire import (
    HEADER,
    IN_BAND,
    KINDS,
    MAGIC,
    MOST_PARTS,
    VERSION,
    Frame,
    Kind,
    Reader,
    VersionError,
    WireError,
    decode_header,
    decode_sizes,
    encode,
    pack,
    unpack,
)

Pair = tuple[Channel, socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A channel, and the bare socket at its other end."""
    ours, theirs = socketpair()
    channel = Channel(ours, wait_for, largest=1 << 20)
    yield channel, theirs
    channel.close()
    theirs.close()


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    """Two channels, one at each end."""
    both = tuple(Channel(end, wait_for) for end in socketpair())
    yield both[0], both[1]
    for channel in both:
        channel.close()


def frame_of(*parts: bytes, kind: int = Kind.JOB, ident: int = 7) -> bytes:
    """Return the bytes of a frame, head first, as they should be."""
    table = struct.pack(f"<{len(parts)}Q", *map(len, parts))
    total = sum(map(len, parts))
    header = struct.pack("<4sBBHIQ", b"ubat", 1, kind, len(parts), ident, total)
    return header + table + b"".join(parts)


# What is on the wire.


def test_a_frame_has_the_bytes_that_are_agreed_on() -> None:
    """Other versions are told apart by the first five; this one is as written here."""
    pieces = encode(Kind.OUTCOME, 9, {"a": [1]}, [b"xy", bytearray(b""), b"z"])
    wanted = frame_of(b'[{"a":[1]},[[]]]', b"xy", b"", b"z", kind=7, ident=9)
    assert wanted == b"".join(bytes(piece) for piece in pieces)
    assert (20, MAGIC, 1) == (HEADER.size, wanted[:4], VERSION)


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [1, 0, 0, 5],
        [AHEAD - 1],
        [AHEAD],
        [AHEAD + 1],
        [AHEAD - 100, 300, AHEAD, 1],
        [3 * AHEAD, 1, 3 * AHEAD],
        [1] * 3000,
    ],
    ids=str,
)
def test_frames_arrive_in_order_whatever_their_size(
    channels: tuple[Channel, Channel], sizes: list[int]
) -> None:
    """Several in a row, so that one read may hold parts of two."""
    ours, theirs = channels
    random = Random(1)
    parts = [random.randbytes(size) for size in sizes]

    def send() -> None:
        for ident in range(5):
            ours.send(Kind.JOB, ident, [ident, "ü\ud800"], parts)
        ours.end()

    sender = NativeCaller(send)
    for ident in range(5):
        frame = theirs.receive()
        assert frame is not None
        assert (Kind.JOB, ident, [ident, "ü\ud800"]) == (
            frame.kind,
            frame.ident,
            frame.head,
        )
        assert parts == frame.parts
    assert theirs.receive() is None
    sender.result()


def test_a_frame_may_come_byte_by_byte(pair: Pair) -> None:
    """Where the pieces begin and end means nothing."""
    channel, theirs = pair
    receiver = NativeCaller(channel.receive)
    for byte in frame_of(b"[null,[[]]]", b"abc", b""):
        theirs.send(bytes([byte]))
    frame = receiver.result()
    assert [b"abc", b""] == frame.parts and frame.head is None


def test_what_was_received_does_not_change(pair: Pair) -> None:
    """The next frame is not read into parts that were given out."""
    channel, theirs = pair
    theirs.sendall(frame_of(b"[1,[[]]]", b"first"))
    first = channel.receive()
    theirs.sendall(frame_of(b"[2,[[]]]", b"other"))
    second = channel.receive()
    assert first is not None and second is not None
    assert (1, [b"first"]) == (first.head, first.parts)
    assert (2, [b"other"]) == (second.head, second.parts)


# What is refused.

NOTES = [
    *(b"[]", b"[1]", b"[[],1]", b"[[],1,2,3,4,5]", b'[["a"],0,null,[],[]]'),
    *(b"[[],0,null,[],[]]", b"[[],0,1048576,[0],[[0,5]]]", b"[[],9,null,[0],[[0,5]]]"),
    *(b"[[[]]]", b'[[],0,null,"a",7]', b"[[],{},null,[0],[[0,5]]]"),
]
"""What may be said of shared memory where there is none."""


@pytest.mark.parametrize(
    "data, why",
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "no frame of ubatch's"),
        (bytes(64), "no frame of ubatch's"),
        (frame_of(b"1")[:4] + b"\x02" + frame_of(b"1")[5:], "speaks version 2"),
        (frame_of(b"1", kind=0), "kind 0, which version 1 does not know"),
        (frame_of(b"1", kind=200), "kind 200"),
        (frame_of(), "parts do not add up"),
        (frame_of(b"ab")[:-2], "ends too early"),
        (frame_of(b"ab", b"c")[:25], "ends too early"),
        (frame_of(b"ab")[:10], "ends too early"),
        (frame_of(bytes(2 * AHEAD))[:-1], "ends too early"),
        (frame_of(bytes((1 << 20) + 1)), "a JOB of 1048577 bytes; 1048576 are"),
        (
            struct.pack("<4sBBHIQQ", b"ubat", 1, 6, 1, 0, 5, 6) + bytes(6),
            "parts do not add up",
        ),
        (
            struct.pack("<4sBBHIQQQ", b"ubat", 1, 6, 2, 0, 1, 2**64 - 1, 2) + bytes(6),
            "parts do not add up",
        ),
    ],
)
def test_what_is_no_frame_is_refused(pair: Pair, data: bytes, why: str) -> None:
    """With an error that says why, and without waiting for more."""
    channel, theirs = pair
    sender = NativeCaller(lambda: [theirs.sendall(data), theirs.shutdown(1)])
    with pytest.raises(WireError, match=why):
        channel.receive(timeout=5.0)
    channel.end()
    sender.join()


def test_another_version_is_told_apart() -> None:
    """Both sides can say what to do, whatever else has changed."""
    data = b"ubat\x63" + bytes(15)
    with pytest.raises(VersionError, match="version 99 .* install the same ubatch"):
        decode_header(data, 100)


def test_too_large_or_too_many_is_not_sent(pair: Pair) -> None:
    """The channel is as it was before, and the next frame goes."""
    channel, theirs = pair
    channel.largest_sent = 1 << 20
    for size in 1 << 20, (1 << 20) - 1000:  # the head counts
        with pytest.raises(WireError, match="bytes; 1048576 are allowed"):
            channel.send(Kind.JOB, 0, None, [bytes(1000)] * (size // 1000 + 1))
    with pytest.raises(WireError, match=f"of 65536 parts; {MOST_PARTS} are allowed"):
        channel.send(Kind.JOB, 0, None, [b""] * MOST_PARTS)
    channel.send(Kind.JOB, 7, 1)
    assert frame_of(b"[1,[[]]]") == theirs.recv(1000)


@pytest.mark.parametrize(
    "first",
    [b"", b"{", b"\xff", b"[" * 100_000, b"nul", b"1", b"[1]", b"[1,2]", b'"ab"']
    + [b"[1,%s]" % note for note in NOTES],
    ids=lambda first: first[:40].decode("latin-1"),
)
def test_a_first_part_that_makes_no_sense_is_refused(pair: Pair, first: bytes) -> None:
    """It is JSON, and speaks of memory that is there; nothing else."""
    channel, theirs = pair
    sender = NativeCaller(theirs.sendall, frame_of(first, b"x"))
    with pytest.raises(WireError, match="makes no sense|memory"):
        channel.receive(timeout=5.0)
    channel.end()
    sender.join()


def test_who_takes_or_says_nothing_is_not_waited_for(pair: Pair) -> None:
    """Longer than is said."""
    channel, theirs = pair
    with pytest.raises(TimeoutError, match="has said nothing for 0.01 seconds"):
        channel.receive(timeout=0.01)
    with pytest.raises(TimeoutError, match="has taken nothing for 0.01 seconds"):
        channel.send(Kind.JOB, 0, None, [bytes(1000)] * 1000, timeout=0.01)


HALF = frame_of(b"[1,[[]]]", bytes(2 * AHEAD))


@pytest.mark.parametrize("sent", [1, HEADER.size, HEADER.size + 9, 40, AHEAD, -1])
def test_who_stops_in_the_middle_of_a_frame_is_not_waited_for(sent: int) -> None:
    """Longer than is said, though a frame may begin whenever it likes."""
    waited: list[float | None] = []

    def wait(fd: int, write: bool = False, timeout: float | None = None) -> bool:
        waited.append(timeout)
        if timeout is None:
            theirs.sendall(HALF[:sent])
        return timeout is None

    ours, theirs = socketpair()
    channel = Channel(ours, wait, stalled=0.01)
    with pytest.raises(TimeoutError, match="nothing for 0.01 seconds, in the middle"):
        channel.receive()
    assert [None, 0.01] == [timeout for timeout in waited if timeout != 0]
    channel.close()
    theirs.close()


def test_what_came_in_time_is_taken_though_nobody_looked() -> None:
    """It may be the receiver that stood still until its time was over."""

    def wait(fd: int, write: bool = False, timeout: float | None = None) -> bool:
        theirs.sendall(frame_of(b"[1,[[]]]"))
        return False

    ours, theirs = socketpair()
    channel = Channel(ours, wait)
    frame = channel.receive(timeout=0.01)
    assert frame is not None and 1 == frame.head
    channel.close()
    theirs.close()


def test_what_has_not_come_takes_no_memory() -> None:
    """Whoever says that 1 GiB will come has not sent it yet."""
    size = 1 << 30
    grown: list[int] = []

    def wait(fd: int, write: bool = False, timeout: float | None = None) -> bool:
        grown.append((memory_of(os.getpid()) or 0) - before)
        return False

    ours, theirs = socketpair()
    channel = Channel(ours, wait, largest=size)
    header = HEADER.pack(MAGIC, VERSION, Kind.CALLS, 1, 1, size)
    theirs.sendall(header + struct.pack("<Q", size) + b"[")
    before = memory_of(os.getpid()) or 0
    with pytest.raises(TimeoutError):
        channel.receive(timeout=0.01)
    assert grown and max(grown) < 2 * AT_ONE_GO
    channel.close()
    theirs.close()


@pytest.mark.parametrize("size", [AT_ONE_GO, AT_ONE_GO + 1, 3 * AT_ONE_GO + 5])
def test_large_parts_may_come_over_the_socket(size: int) -> None:
    """Whole, between small ones, and they may be written to."""
    ours, theirs = socketpair()
    channel = Channel(ours, wait_for)
    large = Random(size).randbytes(size)
    sender = NativeCaller(theirs.sendall, frame_of(b"[1,[[]]]", b"a", large, b"z"))
    frame = channel.receive(timeout=20.0)
    sender.result()
    assert frame is not None and [b"a", large, b"z"] == frame.parts
    array = numpy.frombuffer(frame.parts[1], numpy.uint8)
    del frame
    channel.close()
    array[-1] ^= 1
    assert large[:-1] + bytes([large[-1] ^ 1]) == array.tobytes()
    theirs.close()


def test_who_waits_for_an_answer_lets_others_run_first() -> None:
    """Even if it is there already: else a hub would hear of nobody else."""
    ours, theirs = socketpair()
    backend, _ = backends.load("gevent")
    asks, answers = Channel(ours, backend.wait_for), Channel(theirs, wait_for)
    answers.send(Kind.OUTCOME, 0, "there")
    ran: list[str] = []
    gevent.spawn(ran.append, "another")

    asks.wait()

    assert ["another"] == ran
    frame = asks.receive()
    assert frame is not None and "there" == frame.head
    asks.close(), answers.close()


def test_a_channel_may_block_its_process() -> None:
    """Where nothing else is to run, as in a model process: nobody has to poll."""
    ours, theirs = socketpair()
    blocking, other = Channel(ours, None), Channel(theirs, wait_for)
    came = NativeCaller(blocking.receive)
    parts = [bytes(IN_BAND - 1)] * 60  # more than a socket holds
    other.send(Kind.JOB, 1, None, parts)
    frame = came.result()
    assert frame is not None and parts == frame.parts
    gone = NativeCaller(lambda: blocking.send(Kind.OUTCOME, 2, None, parts))
    frame = other.receive()
    assert frame is not None and parts == frame.parts
    gone.result()
    other.close()
    assert blocking.receive() is None
    blocking.close()


def test_the_end_is_told_from_an_error(pair: Pair) -> None:
    """After the last frame there is None; and who sends then is told."""
    channel, theirs = pair
    theirs.sendall(frame_of(b"[1,[[]]]"))
    theirs.shutdown(1)
    assert channel.receive() is not None
    assert channel.receive() is None
    theirs.close()
    with pytest.raises(OSError):
        channel.send(Kind.JOB, 0, None)


def test_a_reader_gives_no_more_parts_than_there_are() -> None:
    """What a head promises has to be there."""
    reader = Reader(Frame(Kind.JOB, 0, None, [bytearray(b"a")]))
    assert [b"a"] == reader.take(1) and [] == reader.take(0)
    with pytest.raises(WireError, match="lacks some of its parts"):
        reader.take(1)


PLACES = some.lists(some.lists(some.integers(-9, 2**40), min_size=2, max_size=2))
SAID = some.just([[]]) | some.tuples(
    some.lists(some.integers(-1, 5) | some.text(max_size=1), max_size=2),
    some.integers(-1, 5),
    some.none() | some.integers(-1, 2**40),
    some.lists(some.integers(-3, 9), max_size=3),
    PLACES,
).map(list)


@settings(deadline=None)
@given(some.data())
def test_whatever_comes_is_a_frame_or_refused(data: Any) -> None:
    """Random and damaged bytes never do anything else, nor make a reader wait."""
    pieces = encode(
        data.draw(some.sampled_from(list(Kind))),
        data.draw(some.integers(0, 2**32 - 1)),
        data.draw(some.recursive(some.none() | some.text(), some.lists, max_leaves=5)),
        data.draw(some.lists(some.binary(max_size=40), max_size=4)),
        data.draw(SAID),
    )
    good = bytearray(b"".join(bytes(piece) for piece in pieces))
    for _ in range(data.draw(some.integers(0, 3))):
        at = data.draw(some.integers(0, len(good) - 1))
        good[at : at + data.draw(some.integers(0, 8))] = data.draw(
            some.binary(max_size=8)
        )
    ours, theirs = socketpair()
    channel = Channel(ours, wait_for, largest=10_000)
    try:
        theirs.sendall(good)
        theirs.close()
        while (frame := channel.receive(timeout=5.0)) is not None:
            assert frame.kind in KINDS.values()
            assert sum(map(len, frame.parts)) <= 10_000
    except WireError:
        pass
    finally:
        theirs.close()
        channel.close()


@given(some.binary(min_size=HEADER.size, max_size=HEADER.size + 64))
def test_a_decoder_raises_nothing_else(data: bytes) -> None:
    """Only WireError comes of bytes of any kind."""
    try:
        opened = decode_header(
            MAGIC + bytes([VERSION]) + data[5 : HEADER.size], 1 << 30
        )
        table = data[HEADER.size :]
        if len(table) >= 8 * opened.parts:
            assert opened.total == sum(decode_sizes(table, opened))
    except WireError:
        pass


@given(some.lists(some.binary(max_size=9), max_size=5), some.integers(0, 2**32 - 1))
def test_what_is_encoded_is_decoded(parts: list[bytes], ident: int) -> None:
    """Header, table and parts say the same."""
    data = b"".join(bytes(piece) for piece in encode(Kind.CALLS, ident, [1], parts))
    opened = decode_header(data[: HEADER.size], 1 << 20)
    sizes = decode_sizes(data[HEADER.size :], opened)
    assert (Kind.CALLS, ident) == opened[:2]
    assert [len(b"[[1],[[]]]"), *map(len, parts)] == list(sizes)
    assert len(data) == HEADER.size + 8 * len(sizes) + opened.total


# Values, and their buffers.


def test_large_buffers_are_parts_of_their_own_and_not_copied() -> None:
    """Small ones, and those that are not contiguous, are in the pickle."""
    large = numpy.arange(IN_BAND, dtype=numpy.uint8)
    small = numpy.arange(IN_BAND - 1, dtype=numpy.uint8)
    parts = pack([large, small, large[::2], b"x" * IN_BAND])
    assert 2 == len(parts)
    assert numpy.shares_memory(large, numpy.frombuffer(parts[1], numpy.uint8))
    again, *rest = unpack([bytearray(part) for part in parts])
    assert numpy.array_equal(large, again)
    assert numpy.array_equal(small, rest[0]) and numpy.array_equal(large[::2], rest[1])


def test_what_cannot_be_pickled_is_the_packers_error() -> None:
    """It is raised to who packs, who answers the call."""
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pack(lambda: None)


def travel(head_and_parts: tuple[Any, list[Any]]) -> Frame:
    """Return what arrives of something that is sent."""
    head, parts = head_and_parts
    ours, theirs = (Channel(end, wait_for) for end in socketpair())
    try:
        ours.send(Kind.JOB, 0, head, parts)
        frame = theirs.receive()
        assert frame is not None
        return frame
    finally:
        ours.close()
        theirs.close()


def test_work_arrives_as_it_was_written() -> None:
    """Runs, their parcels and their places; names of any kind."""
    parcel = pack_columns([[1, 2, 3]], {"ü": ["a", "b", "c"]})
    large = pack_columns([[numpy.zeros(9999)]], {"ü": [numpy.ones(9999)]})
    work = Work(1, ["ü"], True, [Run(parcel, [2, 0]), Run(large, [0])])
    read = read_work(travel(write_work(work)))
    assert (1, ["ü"], True, 3) == (read.columns, read.names, read.apart, read.size)
    assert [[2, 0], [0]] == [run.places for run in read.runs]
    assert ([[1, 2, 3]], {"ü": ["a", "b", "c"]}) == unpack_columns(read.runs[0].parcel)
    columns, names = unpack_columns(read.runs[1].parcel)
    assert not columns[0][0].any() and names["ü"][0].all()


@pytest.mark.parametrize("first", [None, PackedError("a.B", "text", "trace", b"x")])
def test_outcomes_arrive_as_they_were_written(first: PackedError | None) -> None:
    """Results, errors by place, and what the first run raised."""
    error = PackedError("ValueError", "bad", "", b"")
    runs = [
        Answers(pack_results([1, None]), {1: error}),
        Answers([], {0: error}, True),
        Answers(pack_results([numpy.zeros(9999)] * 2), {}),
    ]
    read = read_done(travel(write_done(Done(0.5, 3, runs, first))))
    assert (0.5, 3, first) == (read.seconds, read.reruns, read.first)
    assert [{1: error}, {0: error}, {}] == [run.errors for run in read.runs]
    assert [False, True, False] == [run.unread for run in read.runs]
    assert [1, None] == unpack_results(read.runs[0].results)
    assert [9999, 9999] == [len(one) for one in unpack_results(read.runs[2].results)]


class Slotted(Exception):
    """Keeps something beside its arguments."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@pytest.mark.parametrize(
    "error",
    [ValueError("a", 1), KeyError("x"), OSError(2, "no"), Slotted("x"), TimeoutError()],
)
def test_an_error_arrives_as_it_was(error: Exception) -> None:
    """Its class, its arguments, its attributes."""
    back = unpack_error(pack_error(error))
    assert type(error) is type(back) and error.args == back.args
    assert vars(error) == vars(back) and str(error) == str(back)
    assert back.__cause__ is None, "it was never raised"
