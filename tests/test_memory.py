"""Do large arrays arrive through shared memory, that is used again once unused?"""

from __future__ import annotations

import gc
import json
import os
import resource
import struct
from _socket import SCM_RIGHTS, SOL_SOCKET, socketpair
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import gevent
import numpy
import pytest
from gevent import monkey

from tests.forcing import Struck, strike
from ubatch import backends
from ubatch.backends.native import wait_for
from ubatch.channel import Channel
from ubatch.memory import FEW, SEGMENTS, SLICE, WORTH, Outgoing, Rights
from ubatch.wire import Frame, Kind, Part, WireError

LARGE = bytes(WORTH)

close = monkey.get_original("os", "close")
"""At once: gevent's may leave that to the loop, where it has watched the number."""


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    """Two channels, one at each end."""
    both = tuple(Channel(end, wait_for, largest=64 * WORTH) for end in socketpair())
    yield both[0], both[1]
    for channel in both:
        channel.close()


def pass_on(sender: Channel, receiver: Channel, *parts: Part) -> Frame:
    """Send a frame, and return it as it arrives."""
    sender.send(Kind.JOB, 1, "head", parts)
    frame = receiver.receive(timeout=5.0)
    assert frame is not None and frame.head == "head"
    return frame


def is_shared(part: Part) -> bool:
    return isinstance(part, memoryview)


def test_large_parts_are_shared_and_small_ones_sent(
    channels: tuple[Channel, Channel],
) -> None:
    """They arrive in their places, whatever went which way."""
    parts = [b"a", os.urandom(WORTH), b"", os.urandom(WORTH + 1), b"z" * 20_000, b"b"]
    frame = pass_on(*channels, *parts)
    assert parts == [bytes(part) for part in frame.parts]
    assert [is_shared(p) for p in frame.parts] == [
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    frame = pass_on(*channels, b"x" * 20_000)
    assert not is_shared(frame.parts[0]), "it is not worth it"


def test_what_is_read_does_not_change(channels: tuple[Channel, Channel]) -> None:
    """As long as anything refers to a segment, nobody writes into it."""
    ours, theirs = channels
    kept = []
    for number in range(3 * SEGMENTS):
        wanted = bytes([number]) * WORTH
        frame = pass_on(ours, theirs, wanted)
        array = numpy.frombuffer(frame.parts[0], numpy.uint8)[::7]  # a view of a view
        kept.append((wanted[::7], array))
        del frame
        pass_on(theirs, ours, b"")  # which tells what is not used
    assert all(wanted == array.tobytes() for wanted, array in kept)


def test_a_segment_is_used_again_when_nothing_refers_to_it(
    channels: tuple[Channel, Channel],
) -> None:
    """A thousand large frames need no more files than one, and none goes by socket."""
    ours, theirs = channels
    pass_on(ours, theirs, LARGE)
    files = len(os.listdir("/proc/self/fd"))
    for number in range(1000):
        wanted = bytes([number % 251]) * WORTH
        frame = pass_on(ours, theirs, wanted)
        assert is_shared(frame.parts[0]) and wanted == frame.parts[0]
        del frame
        pass_on(theirs, ours, b"")
    assert len(os.listdir("/proc/self/fd")) <= files + 2 * SEGMENTS


def test_where_no_segment_is_free_the_socket_is_used(
    channels: tuple[Channel, Channel],
) -> None:
    """However many are kept, what comes after them arrives too."""
    ours, theirs = channels
    kept = [pass_on(ours, theirs, LARGE) for _ in range(SEGMENTS + 2)]
    shared = [is_shared(frame.parts[0]) for frame in kept]
    assert shared == [True] * SEGMENTS + [False] * 2
    assert all(LARGE == bytes(frame.parts[0]) for frame in kept)


def test_a_larger_batch_gets_a_larger_segment(
    channels: tuple[Channel, Channel],
) -> None:
    """Those that are too small are replaced, and what refers to them stays."""
    ours, theirs = channels
    small = [pass_on(ours, theirs, bytes([n]) * WORTH) for n in range(SEGMENTS)]
    del small[1:]
    gc.collect()
    pass_on(theirs, ours, b"")
    large = os.urandom(20 * WORTH)
    frame = pass_on(ours, theirs, large)
    assert is_shared(frame.parts[0]) and large == frame.parts[0]
    assert bytes(WORTH) == small[0].parts[0]


@pytest.mark.parametrize(
    ("sizes", "pauses"),
    [
        ([WORTH], 0),
        ([SLICE], 0),
        ([SLICE + 1], 1),
        ([5 * SLICE + 7], 5),
        ([5, SLICE, SLICE - 1, 0, 1], 1),
        ([SLICE // 8] * 33, 4),
    ],
)
def test_much_is_copied_with_pauses(sizes: list[int], pauses: int) -> None:
    """However many parts it is in; and all of it is where it is said to be."""
    paused: list[None] = []
    parts = [os.urandom(size) for size in sizes]
    outgoing = Outgoing()
    put = outgoing.put(parts, lambda: paused.append(None))
    assert put is not None and put.fd is not None
    found = [os.pread(put.fd, size, at) for at, size in put.places]
    close(put.fd)
    assert parts == found
    assert pauses == len(paused)


def test_others_run_while_a_large_array_is_sent() -> None:
    """Copying it would else keep a hub from all others, until the last byte."""
    ours, theirs = socketpair()
    backend, _ = backends.load("gevent")
    sender, receiver = Channel(ours, backend.wait_for), Channel(theirs, wait_for)
    ran: list[str] = []
    gevent.spawn(ran.append, "another")

    sender.send(Kind.JOB, 1, None, [bytes(64 * SLICE)])

    assert ["another"] == ran
    frame = receiver.receive(timeout=5.0)
    assert frame is not None and is_shared(frame.parts[0])
    sender.close(), receiver.close()


def test_what_was_not_copied_to_the_end_leaves_nothing() -> None:
    """Whoever is killed in a pause leaves no file, and the segment can be used."""
    outgoing = Outgoing()
    files = len(os.listdir("/proc/self/fd"))
    first = outgoing.put([LARGE], strike)
    assert first is not None and first.fd is not None
    close(first.fd)
    outgoing.free([first.number])
    kept = len(os.listdir("/proc/self/fd"))
    for _ in range(2 * SEGMENTS):
        with pytest.raises(Struck):
            outgoing.put([bytes(SLICE), LARGE], strike)
    assert len(os.listdir("/proc/self/fd")) <= kept
    puts = [outgoing.put([LARGE], strike) for _ in range(SEGMENTS)]
    assert list(range(SEGMENTS)) == sorted(put.number for put in puts if put)
    for put in puts:
        assert put is not None and put.fd is not None, "its reader has not got it"
        close(put.fd)
    del outgoing
    gc.collect()
    assert files == len(os.listdir("/proc/self/fd"))


@contextmanager
def no_more_files() -> Iterator[None]:
    """Have no file be opened, as if too many were."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


TOO_MANY = f"process {os.getpid()} has too many files open; raise its RLIMIT_NOFILE"


def test_who_has_too_many_files_open_is_told_so(
    channels: tuple[Channel, Channel],
) -> None:
    """Where the kernel cannot give it a segment; what needs none arrives before."""
    ours, theirs = channels
    ours.send(Kind.JOB, 1, "head", [b"small"])
    ours.send(Kind.JOB, 2, "head", [LARGE])
    with no_more_files():
        frame = theirs.receive(timeout=5.0)
        assert frame is not None and [b"small"] == frame.parts
        with pytest.raises(WireError, match=TOO_MANY):
            theirs.receive(timeout=5.0)


def test_where_no_file_can_be_opened_the_socket_is_used(
    channels: tuple[Channel, Channel],
) -> None:
    """By who would have to open one: what it sends arrives."""
    with no_more_files():
        assert not is_shared(pass_on(*channels, LARGE).parts[0])
    assert is_shared(pass_on(*channels, LARGE).parts[0])


def test_a_segment_is_not_taken_for_one_that_was_lost() -> None:
    """Once one did not come, the next that does is of another frame."""
    first, second = frame_with([[], 0, 4096, [0], [[0, 3]]]), frame_with([[]])
    ours, theirs = socketpair()

    def wait(fd: int, write: bool = False, timeout: float | None = None) -> bool:
        full.close()
        theirs.send(first[-1:])  # what is lacking, and what comes next with a file
        theirs.sendmsg([second], rights_of([other]))
        return True

    lost, other = sealed(4096), sealed(4096)
    theirs.sendmsg([first[:-1]], rights_of([lost]))
    channel = Channel(ours, wait)
    close(lost)
    with ExitStack() as full, pytest.raises(WireError, match=TOO_MANY):
        full.enter_context(no_more_files())
        channel.receive()
    close(other)
    channel.close()
    theirs.close()


def frame_with(note: object) -> bytes:
    """Return a frame with a note that nobody has checked."""
    first = json.dumps([None, note]).encode()
    header = struct.pack("<4sBBHIQ", b"ubat", 1, 6, 1, 0, len(first))
    return header + struct.pack("<Q", len(first)) + first


def rights_of(fds: list[int]) -> Rights:
    return [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]


def raw(note: object, fds: list[int] = []) -> Channel:
    """Return a channel to which a note has been sent that nobody has checked."""
    ours, theirs = socketpair()
    theirs.sendmsg([frame_with(note)], rights_of(fds) if fds else [])
    theirs.close()
    return Channel(ours, wait_for, largest=1 << 20)


def sealed(size: int, seals: bool = True) -> int:
    """Return a file of shared memory."""
    import fcntl

    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize(
    "note",
    [
        [[], 0, None, [0], [[0, 10]]],  # no such segment
        [[], 0, 4096, [0], [[0, 10]]],  # whose file did not come
        [[]] * 2,
        [1],
        [[], 0, None, 0, 0],
        [[], [], None, [], []],
        [[], 0, "x", [], []],
        [{}, 1, 2, 3, 4, 5],
    ],
    ids=str,
)
def test_a_note_that_makes_no_sense_is_refused(note: object) -> None:
    """With a WireError, whatever is in it."""
    channel = raw(note)
    with pytest.raises(WireError):
        channel.receive(timeout=5.0)
    channel.close()


@pytest.mark.parametrize(
    ("size", "seals", "note"),
    [
        (4096, False, [[], 0, 4096, [0], [[0, 10]]]),  # it could be cut short
        (4096, True, [[], 0, 4097, [0], [[0, 10]]]),  # it is shorter than is said
        (4096, True, [[], 0, 2**70, [0], [[0, 10]]]),
        (4096, True, [[], 0, -1, [0], [[0, 10]]]),
        (4096, True, [[], SEGMENTS, 4096, [0], [[0, 10]]]),
        (4096, True, [[], 0, 4096, [0], [[4090, 10]]]),  # beyond its end
        (4096, True, [[], 0, 4096, [0], [[-10, 5]]]),
        (4096, True, [[], 0, 4096, [0], [[0, -5]]]),
        (4096, True, [[], 0, 4096, [0, 1], [[0, 10]]]),
        (4096, True, [[], 0, 4096, ["x"], [[0, 10]]]),
        (4096, True, [[], 0, 4096, [0], [["a", 10]]]),
        (1 << 21, True, [[], 0, 1 << 21, [0], [[0, 1 << 21]]]),  # more than is allowed
    ],
    ids=str,
)
def test_memory_that_is_not_as_is_said_is_refused(
    size: int, seals: bool, note: object
) -> None:
    """Nobody can have this process read what is not there, or will not be."""
    fd = sealed(size, seals)
    channel = raw(note, [fd])
    close(fd)
    with pytest.raises(WireError):
        channel.receive(timeout=5.0)
    channel.close()


def test_descriptors_that_nobody_speaks_of_are_closed() -> None:
    """However many a client sends, no file of it stays open."""
    files = len(os.listdir("/proc/self/fd"))
    fd = sealed(4096)
    channel = raw([[]], [fd] * (2 * FEW))
    close(fd)
    assert channel.receive(timeout=5.0) is not None
    channel.close()
    assert files == len(os.listdir("/proc/self/fd"))
