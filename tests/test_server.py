"""Does the model server serve all processes of a host, and let none harm another?

The clients here speak to it byte by byte; what batchers make of that: test_remote.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_STREAM, SOL_SOCKET, socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fcntl import F_ADD_SEALS, F_SEAL_SHRINK, fcntl
from pathlib import Path
from struct import pack as pack_struct
from typing import Any

import psutil
import pytest

from tests.children import ROOT, FileGate, environment, once
from tests.serving import ModelServer, Raw
from ubatch import (
    BackendError,
    DeadlineExceeded,
    QueueFull,
    RemoteError,
    UBatch,
    address,
)
from ubatch.cli import FILES
from ubatch.memory import WORTH
from ubatch.parcel import pack_columns
from ubatch.wire import HEADER, MAGIC, VERSION, Frame, Kind, encode

pytestmark = [once, pytest.mark.server]


class Held:
    """A server whose handler is held in its first batch, and who asked for that."""

    def __init__(self, server: ModelServer, gate: FileGate, holder: Raw) -> None:
        self.server = server
        self.gate = gate
        self._holder = holder

    def client(self, stack: ExitStack) -> Raw:
        """Return one more client, that has said hello."""
        raw = stack.enter_context(Raw(self.server.path))
        raw.hello()
        return raw

    def release(self) -> None:
        """Have the handler go on; the first one is answered."""
        self.gate.open()
        assert ["hold"] == self._holder.answers(1)[0]["row"]


@contextmanager
def held(home: Path, *options: str, **more: Any) -> Iterator[Held]:
    """Have a server hold what comes until it is told to go on."""
    with FileGate(home / "gate") as gate, ModelServer(
        home, "obey", *options, GATE=gate.path, **more
    ) as server, Raw(server.path) as holder:
        holder.hello()
        holder.ask(1, ["hold"], [600.0])
        server.until(lambda: server.handled())
        yield Held(server, gate, holder)
        assert not server.noise(), server.log


def test_serves_whoever_connects(tmp_path: Path) -> None:
    """What one client asks for is answered; the status tells of it."""
    with ModelServer(tmp_path) as server, Raw(server.path) as raw:
        hello = raw.hello()
        assert (server.pid, server.factory) == (hello["pid"], hello["name"])
        raw.ask(1, ["a", "b"])
        answers = raw.answers(2)
        assert [["a"], ["b"]] == [answers[place]["row"] for place in range(2)]
        status = server.status()
        assert server.pid == status["pid"] and status["results_total"] == 2
        assert server.models() == [answers[0]["pid"]]
        assert not server.noise()


# Batches


def test_clients_share_batches_in_order_of_arrival(tmp_path: Path) -> None:
    """What three clients ask for goes to the handler together, first come first."""
    with held(tmp_path, "--max-size", "8") as here, ExitStack() as stack:
        raws = [here.client(stack) for _ in range(3)]
        for turn in range(2):
            for number, raw in enumerate(raws):
                raw.ask(turn, [f"{turn} of {number}"])
                wanted = 3 * turn + number + 1
                here.server.until(lambda: here.server.pending() == wanted)
        here.release()
        answers = [
            raw.answers(1)[0] if turn else raw.answers(1)[0]
            for turn in range(2)
            for raw in raws
        ]
        assert {(1, 6)} == {(each["batch"], each["size"]) for each in answers}
        order = [f"'{turn} of {number}'" for turn in range(2) for number in range(3)]
        assert [["'hold'"], order] == here.server.handled()


def test_an_ask_of_more_than_max_size_is_split(tmp_path: Path) -> None:
    """Batches are capped; the first part is answered while the second still runs."""
    with FileGate(tmp_path / "gate") as gate, ModelServer(
        tmp_path, "obey", "--max-size", "4", GATE=gate.path
    ) as server, Raw(server.path) as raw:
        raw.hello()
        items = [*range(4), "hold", *range(5, 10)]
        raw.ask(1, items)
        first = raw.answers(4)
        assert {0, 1, 2, 3} == first.keys()
        assert server.status()["running"] == 4 and server.pending() == 2
        gate.open()
        found = {**first, **raw.answers(6)}
        assert [[item] for item in items] == [found[n]["row"] for n in range(10)]
        assert [4] * 8 + [2] * 2 == [found[n]["size"] for n in range(10)]
        status = server.status()
        assert (3, 3.33) == (status["batches_total"], status["mean_batch_size"])


def test_calls_of_other_shapes_share_no_batch(tmp_path: Path) -> None:
    """Calls whose arguments differ in number or names go to the handler apart."""
    with held(tmp_path) as here, ExitStack() as stack:
        first, second = here.client(stack), here.client(stack)
        shapes: list[tuple[int, list[str]]] = [
            (1, []),
            (2, []),
            (1, ["mode"]),
            (1, ["other"]),
            (0, ["mode"]),
            (0, ["mode", "other"]),
        ]
        for number, (count, names) in enumerate(shapes):
            for raw in first, second:
                args, kwargs = [["x"]] * count, {name: [name] for name in names}
                head = [count, names, 1, None]
                raw.send(Kind.CALLS, number, head, pack_columns(args, kwargs))
        here.server.until(lambda: here.server.pending() == 12)
        here.release()
        seen = []
        for raw in first, second:
            answers = [raw.answers(1)[0] for _ in shapes]
            seen.append([(one["args"], one["names"]) for one in answers])
            assert {2} == {one["size"] for one in answers}
        assert seen == [[(count, names) for count, names in shapes]] * 2


# Deadlines, limits and errors


def test_what_has_expired_never_reaches_the_handler(tmp_path: Path) -> None:
    """Calls whose deadlines pass while they wait are answered, and not run."""
    with held(tmp_path) as here, ExitStack() as stack:
        raw = here.client(stack)
        raw.ask(1, ["soon", "late", "never", "past"], [0.05, 60.0, None, -1.0])
        found = raw.answers(2)
        assert {0, 3} == found.keys()
        assert all(type(error) is DeadlineExceeded for error in found.values())
        here.release()
        assert {1, 2} == raw.answers(2).keys()
        assert [["'hold'"], ["'late'", "'never'"]] == here.server.handled()
        raw.ask(2, ["past"], [0.0])  # though the handler is free
        assert DeadlineExceeded is type(raw.answers(1)[0])
        assert 2 == len(here.server.handled())


def test_the_server_has_a_deadline_for_those_without(tmp_path: Path) -> None:
    """--deadline holds for calls that come without one."""
    with held(tmp_path, "--deadline", "0.2") as here, ExitStack() as stack:
        raw = here.client(stack)
        raw.ask(1, ["without", "with"], [None, 60.0])
        assert DeadlineExceeded is type(raw.answers(1)[0])
        here.gate.open()
        assert ["with"] == raw.answers(1)[1]["row"]


def test_too_many_calls_are_refused(tmp_path: Path) -> None:
    """Beyond --max-pending a call gets QueueFull, with the figures of the server."""
    with held(tmp_path, "--max-pending", "3") as here, ExitStack() as stack:
        first, second = here.client(stack), here.client(stack)
        first.ask(1, ["a", "b"])
        here.server.until(lambda: here.server.pending() == 2)
        second.ask(1, ["c", "d", "e"])
        found = second.answers(2)
        for place in 1, 2:
            error = found[place]
            assert type(error) is QueueFull
            assert (3, 3) == (error.pending, error.max_pending)
            assert error.retry_after > 0
        assert here.server.status()["rejected_total"] == 2
        here.release()
        assert ["c"] == second.answers(1)[0]["row"]
        assert {0, 1} == first.answers(2).keys()


def test_one_bad_call_fails_its_batch(tmp_path: Path) -> None:
    """What the handler raises reaches all calls of the batch, and is logged once."""
    with held(tmp_path) as here, ExitStack() as stack:
        first, second = here.client(stack), here.client(stack)
        first.ask(1, ["good"])
        second.ask(1, [["raise", "bad item"]])
        here.server.until(lambda: here.server.pending() == 2)
        here.release()
        for raw in first, second:
            error = raw.answers(1)[0]
            assert (ValueError, "bad item") == (type(error), str(error))
            assert "in _do" in str(error.__cause__)
        server = here.server
        errors = [line for line in server.lines() if "failed" in line]
        assert [
            f"{server.factory}: a batch of 2 calls failed: ValueError"
        ] == errors, server.log


def test_isolate_finds_the_bad_call(tmp_path: Path) -> None:
    """With --on-error isolate only the bad call fails, whoever asked for the rest."""
    with held(tmp_path, "--on-error", "isolate") as here, ExitStack() as stack:
        first, second = here.client(stack), here.client(stack)
        first.ask(1, ["a", "b", "c"])
        second.ask(1, ["d", ["raise", "bad item"], "e"])
        here.server.until(lambda: here.server.pending() == 6)
        here.release()
        good, mixed = first.answers(3), second.answers(3)
        assert [["a"], ["b"], ["c"]] == [good[place]["row"] for place in range(3)]
        assert (["d"], ["e"]) == (mixed[0]["row"], mixed[2]["row"])
        assert ValueError is type(mixed[1])


def test_each_call_has_its_own_error(tmp_path: Path) -> None:
    """An error among the results, or a result that cannot be sent, harms no other."""
    with ModelServer(tmp_path) as server, Raw(server.path) as raw:
        raw.hello()
        raw.ask(1, ["good", ["error", 7], ["odd"], "fine"])
        found = raw.answers(4)
        assert (["good"], ["fine"]) == (found[0]["row"], found[3]["row"])
        assert RemoteError is type(found[1])  # its module is not imported here
        assert ("tests.apps.served.Mine", "tests.apps.served.Mine: code 7") == (
            found[1].kind,
            str(found[1]),
        )
        assert TypeError is type(found[2]) and "cannot be sent" in str(found[2])


def test_an_ask_that_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    """What the model process cannot load harms nobody in the same batch."""
    with held(tmp_path) as here, ExitStack() as stack:
        first, second, third = (here.client(stack) for _ in range(3))
        first.ask(1, ["good"])
        second.send(Kind.CALLS, 1, [1, [], 1, None], [b"cno_such_module\nName\n."])
        third.send(Kind.CALLS, 1, [2, [], 1, None], pack_columns([["one"]], {}))
        here.server.until(lambda: here.server.pending() == 3)
        here.release()
        assert ["good"] == first.answers(1)[0]["row"]
        assert ModuleNotFoundError is type(second.answers(1)[0])
        assert IndexError is type(third.answers(1)[0])


def test_what_clients_may_send_does_not_limit_answers(tmp_path: Path) -> None:
    """An answer may be larger than --max-frame, which is for the clients."""
    with ModelServer(tmp_path, "obey", "--max-frame", "1000") as server:
        with Raw(server.path) as raw:
            assert 1000 == raw.hello()["largest"]
            raw.ask(1, [["large", 200_000]])
            assert bytes(200_000) == raw.answers(1)[0]


def test_an_answer_that_is_too_large_fails_alone(tmp_path: Path) -> None:
    """What does not fit into a frame is an error of those calls; the client stays."""
    with held(tmp_path, largest=100_000) as here, ExitStack() as stack:
        raw, other = here.client(stack), here.client(stack)
        raw.ask(1, [["large", 200_000]])
        raw.ask(2, ["small"])
        other.ask(1, ["other"])
        here.server.until(lambda: here.server.pending() == 3)
        here.release()
        error = raw.answers(1)[0]
        assert BackendError is type(error) and "100000 are allowed" in str(error)
        assert ["small"] == raw.answers(1)[0]["row"]
        assert ["other"] == other.answers(1)[0]["row"]


def test_asks_that_are_too_large_together_are_run_apart(tmp_path: Path) -> None:
    """What clients ask for at once may be more than one frame to the model holds."""
    with held(tmp_path, largest=100_000) as here, ExitStack() as stack:
        raws = [here.client(stack) for _ in range(3)]
        for number, raw in enumerate(raws):
            raw.ask(1, [bytes(60_000), number])
        more = here.client(stack)
        more.ask(1, [bytes(60_000), bytes(60_000)])  # is too large by itself
        here.server.until(lambda: here.server.pending() == 8)
        here.release()
        for number, raw in enumerate(raws):
            assert [number] == raw.answers(2)[1]["row"]
        for error in more.answers(2).values():
            assert BackendError is type(error)
            assert "100000 are allowed" in str(error)


# Clients that leave


def test_a_client_may_take_calls_back(tmp_path: Path) -> None:
    """Calls that nobody waits for any longer are not run; the others of it are."""
    with held(tmp_path) as here, ExitStack() as stack:
        raw = here.client(stack)
        raw.ask(1, ["a", "b", "c"])
        raw.ask(2, ["d"])
        raw.send(Kind.LEAVE, 1, [0, 2, 2, 99, "x", None, [1]])
        raw.send(Kind.LEAVE, 2, [0])
        raw.send(Kind.LEAVE, 77, [0])
        here.server.until(lambda: here.server.pending() == 1)
        here.release()
        assert ["b"] == raw.answers(1)[1]["row"]
        raw.ask(2, ["again"])
        assert ["again"] == raw.answers(1)[0]["row"]
        assert [["'hold'"], ["'b'"], ["'again'"]] == here.server.handled()


def test_a_call_that_runs_may_be_taken_back(tmp_path: Path) -> None:
    """Its answer goes to nobody, and the others of its batch have theirs."""
    with held(tmp_path) as here, ExitStack() as stack:
        raw = here.client(stack)
        raw.ask(1, ["hold", "b", "c"])
        here.server.until(lambda: here.server.pending() == 3)
        here.release()
        found = raw.answers(3)
        assert {0, 1, 2} == found.keys()
        raw.ask(2, ["d"])
        raw.send(Kind.LEAVE, 2, [0])
        raw.ask(3, ["e"])
        answers = raw.answers(1)[0]
        while answers["row"] != ["e"]:  # d may have been quicker
            answers = raw.answers(1)[0]


def test_a_client_that_is_gone_is_not_worked_for(tmp_path: Path) -> None:
    """Its calls are dropped before they run, and nobody else's."""
    with held(tmp_path) as here, ExitStack() as stack:
        gone, other = Raw(here.server.path), here.client(stack)
        gone.hello()
        gone.ask(1, ["a", "b"])
        other.ask(1, ["c"])
        here.server.until(lambda: here.server.pending() == 3)
        gone.close()
        here.server.until(lambda: here.server.pending() == 1)
        here.release()
        assert (["c"], 1) == (
            (found := other.answers(1)[0])["row"],
            found["size"],
        )
        assert [["'hold'"], ["'c'"]] == here.server.handled()


def test_a_server_that_ends_sends_all_of_its_answers(tmp_path: Path) -> None:
    """It takes nobody for answered whose answers are still on their way."""
    with ModelServer(tmp_path) as server, Raw(server.path) as raw:
        raw.hello()
        for number in range(20):
            raw.ask(number, [["large", 1_000_000]])
        server.until(lambda: server.status()["results_total"] == 20)
        server.signal(signal.SIGTERM)
        server.until(lambda: "ends, once" in server.log)
        time.sleep(0.2)  # in which it could hang up
        for _ in range(20):
            assert bytes(1_000_000) == raw.answers(1)[0]
        assert Kind.BYE is received(raw).kind
        raw.ask(1, ["late"])
        untaken = received(raw)
        assert (Kind.BYE, 1) == (untaken.kind, untaken.ident)
        raw.close()
        assert 0 == server.end()
        assert not server.noise()


def received(raw: Raw) -> Frame:
    frame = raw.receive()
    assert frame is not None
    return frame


# Clients that misbehave


def frame(kind: Kind, head: object, *parts: bytes, note: Any = ((),)) -> bytes:
    """Return a frame number 1, whatever it says."""
    return b"".join(encode(kind, 1, head, parts, note))


def calls(head: object, *parts: bytes) -> bytes:
    return frame(Kind.CALLS, head, *parts)


ONE = [1, [], 1, None]


def noted(*note: Any) -> bytes:
    """Return an ask whose memory is described in some way."""
    return frame(Kind.CALLS, ONE, note=note)


def header(
    magic: bytes = MAGIC,
    version: int = VERSION,
    kind: int = Kind.CALLS,
    parts: int = 1,
    total: int = 1,
) -> bytes:
    return HEADER.pack(magic, version, kind, parts, 1, total)


NO_SENSE = "a CALLS that makes no sense"
NO_FIRST = "first part makes no sense"
NO_MEMORY = "whose memory makes no sense"
HOSTILE = {
    "garbage": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "no frame of ubatch's"),
    "another version": (header(version=VERSION + 1), "speaks version"),
    "an unknown kind": (header(kind=99), "a frame of kind 99"),
    "too large": (header(total=1 << 40), f"{1 << 30} are allowed"),
    "sizes": (header(parts=2, total=9) + pack_struct("<2Q", 4, 4), "do not add up"),
    "huge sizes": (
        header(parts=2, total=0) + pack_struct("<2Q", 1 << 63, 1 << 63),
        "do not add up",
    ),
    "no parts": (header(parts=0, total=0), "do not add up"),
    "half a frame": (header(total=100), "ends too early"),
    "half a header": (header()[:9], "ends too early"),
    "no JSON": (header(total=1) + pack_struct("<Q", 1) + b"{", NO_FIRST),
    "deep JSON": (
        header(total=200_000) + pack_struct("<Q", 200_000) + b"[" * 200_000,
        NO_FIRST,
    ),
    "a number": (header(total=1) + pack_struct("<Q", 1) + b"7", NO_FIRST),
    "no note": (frame(Kind.CALLS, ONE, note={}), NO_FIRST),
    "an empty note": (noted(), NO_MEMORY),
    "a note of nothing": (noted(7), NO_MEMORY),
    "half a note": (noted([], 0, None), NO_MEMORY),
    "no segment": (noted([], 0, None, [0], [[0, 1]]), "nobody has spoken of"),
    "a segment that is none": (noted([], [0], None, [0], [[0, 1]]), NO_MEMORY),
    "a segment to come": (noted([], 0, 4096, [0], [[0, 1]]), "did not come"),
    "too much memory": (noted([], 0, None, [0], [[0, 1 << 40]]), "of shared memory"),
    "places of no kind": (noted([], 0, None, [0], [["x", "y"]]), NO_MEMORY),
    "no parcel": (calls(ONE), NO_SENSE),
    "no calls": (calls([1, [], 0, None], b""), NO_SENSE),
    "no arguments": (calls([0, [], 1, None], b""), NO_SENSE),
    "a great many calls": (calls([1, [], 1 << 30, None], b""), NO_SENSE),
    "a great many arguments": (calls([1 << 30, [], 1, None], b""), NO_SENSE),
    "names twice": (calls([1, ["a", "a"], 1, None], b""), NO_SENSE),
    "names of no kind": (calls([1, [["a"]], 1, None], b""), NO_SENSE),
    "deadlines of others": (calls([1, [], 2, [1.0]], b""), NO_SENSE),
    "deadlines that are none": (calls([1, [], 1, [float("nan")]], b""), NO_SENSE),
    "a head of another kind": (calls("CALLS", b""), NO_SENSE),
    "an answer": (frame(Kind.ANSWERS, [[0]]), "a client does not send"),
    "hello again": (frame(Kind.HELLO, {}), "a client does not send"),
    "the same number twice": (
        calls(ONE, b"x") * 2,
        "which are under way already",
    ),
    "a leave": (
        calls(ONE, b"x") + frame(Kind.LEAVE, 5),
        "a LEAVE that makes no sense",
    ),
}


def test_a_client_that_makes_no_sense_is_dropped_alone(tmp_path: Path) -> None:
    """It is told why, that is logged, and nobody else notices."""
    with held(tmp_path) as here, ExitStack() as stack:
        witness = here.client(stack)
        witness.ask(1, ["witness"])
        for what, (data, why) in HOSTILE.items():
            with Raw(here.server.path) as raw:
                raw.hello()
                raw.throw(data)
                raw.half_close()
                told = raw.ended()
            assert told and why in told, f"{what}: {told}"
            line = f"client {os.getpid()} is dropped: {told}"
            here.server.until(lambda: line in here.server.log)
            here.server.until(lambda: here.server.pending() == 1)
        here.release()
        assert ["witness"] == witness.answers(1)[0]["row"]
        dropped = here.server.lines("WARNING")
        assert len(HOSTILE) == len(dropped)
        memory = here.server.status()["memory_bytes"]
        assert memory < 200 << 20


def test_memory_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    """Who sends a segment that could be cut short, say, is dropped alone."""
    with held(tmp_path) as here, ExitStack() as stack:
        witness = here.client(stack)
        witness.ask(1, ["witness"])
        sealed = F_SEAL_SHRINK
        for seals, told, places, why in (
            (0, 4096, [[0, 1]], "not as it should be"),
            (sealed, 8192, [[0, 1]], "not as it should be"),
            (sealed, -1, [[0, 1]], "not as it should be"),
            (sealed, 1.5, [[0, 1]], NO_MEMORY),
            (sealed, 4096, [[4095, 2]], "not in its segment"),
            (sealed, 4096, [[-1, 1]], "not in its segment"),
            (sealed, 4096, [[0.5, 1]], NO_MEMORY),
            (sealed, 4096, [[0, 1], [0, 1]], NO_MEMORY),
        ):
            fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, 4096)
            fcntl(fd, F_ADD_SEALS, seals)
            with Raw(here.server.path) as raw:
                raw.hello()
                data = noted([], 0, told, [0], places)
                raw.sock.sendmsg(
                    [data], [(SOL_SOCKET, SCM_RIGHTS, pack_struct("i", fd))]
                )
                assert why in (raw.ended() or "")
            os.close(fd)
        with Raw(here.server.path) as raw:  # and more descriptors than anybody needs
            raw.hello()
            fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(30)]
            before = _open_files(here.server.pid)
            for _ in range(10):
                rights = pack_struct("30i", *fds)
                raw.sock.sendmsg(
                    [frame(Kind.LEAVE, [])], [(SOL_SOCKET, SCM_RIGHTS, rights)]
                )
            raw.ask(2, ["more"])
            here.server.until(lambda: here.server.pending() == 2)
            here.server.until(lambda: _open_files(here.server.pid) <= before + 8)
            for fd in fds:
                os.close(fd)
        here.server.until(lambda: _open_files(here.server.pid) < before)
        here.release()
        assert ["witness"] == witness.answers(1)[0]["row"]


def _open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("what", ["garbage", "another version", "half a frame"])
def test_who_does_not_say_hello_is_dropped(what: str, tmp_path: Path) -> None:
    """The first frame has to be a HELLO of this version."""
    data, why = HOSTILE[what]
    with ModelServer(tmp_path) as server:
        with Raw(server.path) as raw:
            raw.throw(data)
            raw.half_close()
            assert why in (raw.ended() or "")
        server.until(lambda: why in server.log)
        with Raw(server.path) as raw:
            raw.send(Kind.STATUS, 1, None)
            assert "has not said hello" in (raw.ended() or "")
        with Raw(server.path) as raw:  # and leaves at once
            pass
        assert server.status()["results_total"] == 0
        assert not server.noise()


def test_who_says_nothing_is_dropped(tmp_path: Path) -> None:
    """A client has to say hello within some seconds; then it may say nothing."""
    with ModelServer(tmp_path, stalled=0.3) as server:
        with Raw(server.path) as quiet, Raw(server.path) as mute:
            quiet.hello()
            assert mute.ended() is None or "nothing" in str(mute.ended())
            server.until(lambda: "has said nothing for" in server.log)
            quiet.ask(1, ["still there"])
            assert ["still there"] == quiet.answers(1)[0]["row"]
        assert 1 == len(server.lines("WARNING"))
        assert not server.noise()


def test_who_stops_reading_is_dropped(tmp_path: Path) -> None:
    """A client whose answers pile up is dropped, and nobody else waits for it."""
    with ModelServer(tmp_path, stalled=1.0) as server, ExitStack() as stack:
        deaf = stack.enter_context(Raw(server.path))
        deaf.hello()
        for number in range(20):
            deaf.ask(number, [["large", 1_000_000]])
        server.until(lambda: server.status()["results_total"] == 20)
        other = stack.enter_context(Raw(server.path))
        other.hello()
        other.ask(1, ["other"])
        assert ["other"] == other.answers(1)[0]["row"]
        line = f"client {os.getpid()} is dropped: the other side has taken nothing"
        server.until(lambda: line in server.log)
        server.until(lambda: server.status()["memory_bytes"] < 100 << 20)
        assert not server.noise()


def test_who_stops_in_the_middle_of_a_frame_is_dropped(tmp_path: Path) -> None:
    """It gets no memory for what it only speaks of, and nobody else waits for it."""
    size = 1 << 30
    with ModelServer(tmp_path, stalled=1.0) as server, ExitStack() as stack:
        other, half = (stack.enter_context(Raw(server.path)) for _ in range(2))
        other.hello()
        half.hello()
        header = HEADER.pack(MAGIC, VERSION, Kind.CALLS, 1, 1, size)
        half.throw(header + pack_struct("<Q", size))
        memory: list[int] = []

        def dropped() -> bool:
            memory.append(server.status()["memory_bytes"])
            other.ask(len(memory), ["other"])
            assert ["other"] == other.answers(1)[0]["row"]
            return "has said nothing for 1.0 seconds, in the middle" in server.log

        server.until(dropped)
        assert half.ended() is None
        assert max(memory) < 100 << 20
        (line,) = server.lines("WARNING")
        assert f"client {os.getpid()} is dropped: the other side" in line
        assert not server.noise()


def test_who_floods_the_server_does_not_hold_it(tmp_path: Path) -> None:
    """Others are served while one client sends as fast as it can."""
    with ModelServer(tmp_path) as server, ExitStack() as stack:
        flood = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", FLOOD, server.path],
                env=environment(),
                stdout=subprocess.PIPE,
            )
        )
        stack.callback(flood.kill)
        assert flood.stdout and flood.stdout.readline() == b"flooding\n"
        raw = stack.enter_context(Raw(server.path))
        for number in range(20):
            if not number:
                raw.hello()
            raw.ask(number, ["other"])
            assert ["other"] == raw.answers(1)[0]["row"]
        assert flood.poll() is None
        assert not server.noise()


FLOOD = """
import sys
from _socket import AF_UNIX, SOCK_STREAM, socket
from ubatch.wire import Kind, encode

sock = socket(AF_UNIX, SOCK_STREAM)
sock.connect(sys.argv[1])
sock.send(b"".join(encode(Kind.HELLO, 0, {})))
sock.recv(1000)
leave = b"".join(encode(Kind.LEAVE, 1, [1])) * 50_000
sent = 0
while True:
    sock.sendall(leave)
    sent += 1
    if sent == 3:
        print("flooding", flush=True)
"""


def test_a_server_may_have_as_many_files_as_it_can(tmp_path: Path) -> None:
    """A shell's 1024 would not do for a host; and it goes no further than it may."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        server = ModelServer(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with server:
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    assert (min(before[1], FILES), before[1]) == limits


def test_who_has_no_file_left_for_a_segment_says_so(tmp_path: Path) -> None:
    """To its log, and to the client whose call it was."""
    with ModelServer(tmp_path) as server, Raw(server.path) as raw:
        raw.hello()
        files = {int(fd) for fd in os.listdir(f"/proc/{server.pid}/fd")}
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        lowest = min(set(range(len(files) + 1)) - files)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (lowest, hard))
        raw.ask(1, ["small"])
        assert ["small"] == raw.answers(1)[0]["row"]
        raw.ask(2, [bytes(WORTH)])
        why = f"process {server.pid} has too many files open; raise its RLIMIT_NOFILE"
        assert why in str(raw.ended())
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (hard, hard))
        server.until(lambda: why in server.log)
        assert not server.noise()


# The socket


def serve(path: Path | str, *options: str) -> subprocess.CompletedProcess[str]:
    """Have a server try to start; it is to fail."""
    command = [sys.executable, "-m", "ubatch", "serve", "tests.apps.served:obey"]
    return subprocess.run(
        [*command, "--socket", str(path), *options],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )


def refused(path: Path | str, *options: str) -> str:
    """Return why a server does not start, which is all that it says."""
    ended = serve(path, *options)
    assert 1 == ended.returncode, ended
    (line,) = ended.stderr.splitlines()
    return line.removeprefix("ubatch serve: ")


def test_only_its_user_can_reach_the_socket(tmp_path: Path) -> None:
    """The socket has mode 600, whatever the umask, and a folder made for it 700."""
    folder = tmp_path / "run"
    mask = os.umask(0)
    try:
        with ModelServer(tmp_path) as server:
            assert 0o600 == stat.S_IMODE(os.stat(server.path).st_mode)
        folder.joinpath("model.sock").unlink()
        folder.rmdir()
        made = folder / "made"
        address.listen(f"{made}/model.sock").close()
        assert 0o700 == stat.S_IMODE(os.stat(made).st_mode)
    finally:
        os.umask(mask)


@pytest.mark.parametrize("mode", [0o710, 0o701, 0o755, 0o777])
def test_a_folder_that_others_can_enter_is_refused(mode: int, tmp_path: Path) -> None:
    """It says which folder, and what is to be done."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    line = refused(folder / "model.sock")
    assert line.startswith(f"{folder} can be reached by others (mode {mode:o}")
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """Its owner could put another socket there."""
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    assert "user 65534" in refused(folder / "model.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user_is_refused(tmp_path: Path) -> None:
    """Whoever gets at the socket all the same is asked for its user, both ways."""
    with ModelServer(tmp_path) as server:
        # The way in stands open while the child changes its user.
        ended = subprocess.run(
            [sys.executable, "-c", STRANGER, server.path],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (0, "") == (ended.returncode, ended.stderr)
        client, told = json.loads(ended.stdout)
        assert f"process {server.pid} runs as user 0, and this one as 65534" in client
        assert "runs as user 65534, and this one as 0" in told
        server.until(lambda: "runs as user 65534" in server.log)
        assert server.status()["results_total"] == 0
        assert not server.noise()


STRANGER = """
import json, os, sys
from _socket import AF_UNIX, SOCK_STREAM, socket
from ubatch import BackendError, address
from ubatch.backends.native import wait_for
from ubatch.channel import Channel
from ubatch.wire import Kind

path = sys.argv[1]
folder = os.open(os.path.dirname(path), os.O_RDONLY)
os.fchdir(folder)
os.chmod("model.sock", 0o666)
os.chmod(".", 0o755)
os.setuid(65534)
name = "model.sock"  # the folders above cannot be entered by that user
try:
    address.connect(name)
except BackendError as error:
    client = str(error)
sock = socket(AF_UNIX, SOCK_STREAM)
sock.connect(name)
channel = Channel(sock, wait_for)
frame = channel.receive(20.0)
assert frame.kind is Kind.REFUSE
assert channel.receive(20.0) is None
print(json.dumps([client, frame.head]))
"""


def test_a_second_server_at_a_path_is_refused(tmp_path: Path) -> None:
    """The first one goes on."""
    with ModelServer(tmp_path) as server:
        line = refused(server.path)
        assert f"a model server listens at {server.path} already" in line
        assert server.status()["pid"] == server.pid


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """What a killed server has left does not keep the next one from starting."""
    with ModelServer(tmp_path) as first:
        first.signal(signal.SIGKILL)
        first.end()
        assert os.path.exists(first.path)
        with ModelServer(tmp_path) as second:
            assert second.status()["pid"] == second.pid != first.pid


def test_of_servers_that_start_at_once_one_is_served(tmp_path: Path) -> None:
    """Whatever each of them finds there, the path is one server's, the others fail."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    path = str(folder / "model.sock")
    for _ in range(5):
        Path(path).unlink(missing_ok=True)
        stale = socket(AF_UNIX, SOCK_STREAM)
        stale.bind(path)
        stale.close()
        crowd = [
            subprocess.Popen(
                [sys.executable, "-c", LISTEN, path],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        assert ["ready\n"] * 4 == [one.stdout.readline() for one in crowd if one.stdout]
        for one in crowd:
            assert one.stdin
            one.stdin.write("go\n")
            one.stdin.flush()
        told = [one.stdout.readline() for one in crowd if one.stdout]
        address.connect(path).close()
        for one in crowd:
            one.kill()
            one.communicate()
        assert ["already\n"] * 3 + ["listens\n"] == sorted(told)


LISTEN = """
import sys
from ubatch import BackendError, address

print("ready", flush=True)
sys.stdin.readline()
try:
    listener = address.listen(sys.argv[1])
    print("listens", flush=True)
except BackendError as error:
    print("already" if "already" in str(error) else error, flush=True)
sys.stdin.readline()
"""


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    """A path that is too long, taken by something else, or no path: a clear error."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    long = folder / ("x" * 100)
    assert "is too long: a path may have 107 bytes" in refused(long)
    for make in (Path.touch, Path.mkdir):
        taken = folder / make.__name__
        make(taken)
        assert f"{taken} is there, and is no socket; use another path" == refused(taken)
        assert taken.exists()
    assert "File exists" in refused(folder / "touch" / "model.sock")
    for wrong in ("--max-frame", "0"), ("--grace", "-1"), ("--processes", "0"):
        assert wrong[0].strip("-").replace("-", "_") in refused(folder / "s", *wrong)


# The status


def status_of(path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ubatch", "status", path],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_the_status_tells_how_a_server_is(tmp_path: Path) -> None:
    """ubatch status prints JSON; it does not count itself among the clients."""
    with held(tmp_path, "--processes", "2") as here, ExitStack() as stack:
        raw = here.client(stack)
        raw.ask(1, ["hold", ["raise", "bad"]])
        here.server.until(lambda: here.server.status()["running"] == 3)
        raw.ask(2, ["a", "b", "c"])
        raw.send(Kind.LEAVE, 2, [2])
        here.server.until(lambda: here.server.pending() == 2)
        ended = status_of(here.server.path)
        assert (0, "") == (ended.returncode, ended.stderr)
        seen = json.loads(ended.stdout)
        models = seen.pop("models")
        assert here.server.models() == [model["pid"] for model in models]
        for one in models + [seen]:
            real = psutil.Process(one["pid"]).memory_info().rss
            assert 0.5 * real < one.pop("memory_bytes") < 2 * real
        assert 0 < seen.pop("uptime_seconds") < 60
        assert seen == {
            "factory": here.server.factory,
            "pid": here.server.pid,
            "clients": 2,
            "pending": 2,
            "running": 3,
            "calls_total": 6,
            "results_total": 0,
            "cancelled_total": 1,
            "reruns_total": 0,
            "stuck_total": 0,
            "trouble": None,
            "failures_total": 0,
            "expired_total": 0,
            "rejected_total": 0,
            "batches_total": 2,
            "mean_batch_size": 1.5,
            "handler_seconds": 0.0,
        }


def test_a_factory_beside_the_command_is_found(tmp_path: Path) -> None:
    """In the folder where it is started, as a script has its own folder first."""
    factory = (
        "def make():\n    return lambda items: [(item, 'here') for item in items]\n"
    )
    (tmp_path / "beside_it.py").write_text(factory)
    path = tmp_path / "run" / "model.sock"
    script = "import sys; sys.path.remove(''); from ubatch.cli import main; main()"
    command = [sys.executable, "-c", script, "serve", "beside_it:make"]
    command += ["--socket", f"unix:{path}"]  # as it is written for connect()
    env = environment(PYTHONPATH=str(ROOT))
    with subprocess.Popen(command, cwd=tmp_path, env=env) as process:
        try:
            ub = UBatch[int, Any].connect(f"unix:{path}", backend="thread")
            assert (1, "here") == ub.ubatch(1)
            ub.stop()
            assert 0 == status_of(f"unix:{path}").returncode
        finally:
            process.terminate()


def test_the_status_of_none(tmp_path: Path) -> None:
    """Where nobody listens it says so, and ends with 1."""
    path = tmp_path / "model.sock"
    ended = status_of(str(path))
    assert 1 == ended.returncode and "" == ended.stdout
    assert ended.stderr.startswith(
        f"ubatch status: no model server answers at {path}: "
    )
    assert 1 == len(ended.stderr.splitlines())
