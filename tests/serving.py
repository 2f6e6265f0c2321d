"""A model server in a child, and clients that speak to it byte by byte."""

from __future__ import annotations

import json
import os
import re
import sys
from _socket import AF_UNIX, SHUT_RDWR, SHUT_WR, SOCK_STREAM, socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.children import Command
from tests.fakes import NativeCaller
from ubatch import address
from ubatch.backends.native import wait_for
from ubatch.calling import Answered, read_answers, read_ask, write_answered
from ubatch.channel import Channel
from ubatch.parcel import (
    Answers,
    pack_results,
    unpack_columns,
    unpack_error,
    unpack_results,
)
from ubatch.wire import LARGEST_FRAME, Frame, Kind, Part, pack

SERVED = "tests.apps.served"

OUR_LINE = re.compile(r"^\d{4}-\d\d-\d\d [:,\d]+ (INFO|WARNING|ERROR) ")

OTHER_LIMITS = """
import json, sys
import ubatch.channel, ubatch.server, ubatch.session
from ubatch.cli import main

stalled, largest = json.loads(sys.argv.pop(1))
if stalled is not None:
    ubatch.server.STALLED = ubatch.session.STALLED = stalled
if largest is not None:
    ubatch.channel.LARGEST_FRAME = largest
sys.exit(main())
"""


class ModelServer(Command):
    """``ubatch serve`` in a child, in a folder of its own.

    Its block begins when it listens.
    """

    def __init__(
        self,
        home: Path,
        factory: str = "obey",
        *options: str,
        stalled: float | None = None,
        largest: int | None = None,
        **env: str,
    ) -> None:
        """Start it.

        Args:
            stalled: For how long it has patience with a client.
            largest: The largest frame that it may send.
        """
        folder = home / "run"
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path = str(folder / "model.sock")
        self.address = f"unix:{self.path}"
        self.factory = f"{SERVED}:{factory}"
        self.journal = home / "journal"
        number = len(list(home.glob("server-*.log")))
        program = ["-m", "ubatch"]
        if stalled is not None or largest is not None:
            program = ["-c", OTHER_LIMITS, json.dumps([stalled, largest])]
        program += ["serve", self.factory, "--socket", self.path, *options]
        super().__init__(
            [sys.executable, "-W", "error", *program],
            home / f"server-{number}.log",
            **{"JOURNAL": str(self.journal), **env},
        )

    def __enter__(self) -> ModelServer:
        try:
            self.until(lambda: "serves" in self.log)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def status(self) -> dict[str, Any]:
        """Ask it how it is."""
        with Raw(self.path) as raw:
            raw.hello()
            raw.send(Kind.STATUS, 7, None)
            frame = raw.receive()
            assert frame is not None and (frame.kind, frame.ident) == (Kind.STATUS, 7)
            status: dict[str, Any] = frame.head
            return status

    def pending(self) -> int:
        """Calls that wait there."""
        return int(self.status()["pending"])

    def models(self) -> list[int]:
        """The processes of its model."""
        return [model["pid"] for model in self.status()["models"]]

    def handled(self) -> list[list[str]]:
        """What reached the handler, batch by batch: the items as they are shown."""
        if not self.journal.exists():
            return []
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def lines(self, *levels: str) -> list[str]:
        """What it has logged at some levels, or at all."""
        found = [line for line in self.log.splitlines() if OUR_LINE.match(line)]
        split = [line.split(" ", 3) for line in found]
        return [line[3] for line in split if not levels or line[2] in levels]

    def noise(self) -> list[str]:
        """What is in its log, and neither a line of ours nor the user's traceback."""
        found, expected = [], False
        for line in self.log.splitlines():
            if OUR_LINE.match(line):
                users = "a batch of" in line or "the factory failed" in line
                expected = users and "ERROR" in line
            elif not expected:
                found.append(line)
        return found


class Raw:
    """A client that says what it is told to."""

    def __init__(self, path: str) -> None:
        self.sock = socket(AF_UNIX, SOCK_STREAM)
        self.sock.connect(path)
        self._channel = Channel(self.sock, wait_for)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def send(
        self, kind: Kind, ident: int, head: object, parts: Iterable[Part] = ()
    ) -> None:
        self._channel.send(kind, ident, head, list(parts), 20.0)

    def throw(self, data: bytes) -> None:
        """Send bytes, whatever they are; as many as the server takes."""
        self.sock.setblocking(True)
        self.sock.settimeout(20.0)
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has seen enough
        finally:
            self.sock.setblocking(False)

    def half_close(self) -> None:
        self.sock.shutdown(SHUT_WR)

    def receive(self, timeout: float = 20.0) -> Frame | None:
        """Return the next frame; None at the end, of whatever kind."""
        try:
            return self._channel.receive(timeout)
        except ConnectionResetError:
            return None

    def hello(self) -> Any:
        """Say hello; return what the server says."""
        self.send(Kind.HELLO, 0, {"pid": os.getpid()})
        frame = self.receive()
        assert frame is not None and frame.kind is Kind.HELLO, frame
        return frame.head

    def ask(self, number: int, items: list[Any], deadlines: Any = None) -> None:
        """Ask for some items of one column."""
        head = [1, [], len(items), deadlines]
        self.send(Kind.CALLS, number, head, pack(([items], {})))

    def answers(self, count: int) -> dict[int, Any]:
        """Return the answers to some calls of one ask, by place; errors in full."""
        found: dict[int, Any] = {}
        while len(found) < count:
            frame = self.receive()
            assert frame is not None, "the server has hung up"
            if frame.kind is not Kind.ANSWERS:
                continue
            answers = read_answers(frame)
            for number, place in enumerate(answers.places):
                assert place not in found, "answered twice"
                if isinstance(answers, Answered):
                    pick = answers.picks[number]
                    error = answers.answers.errors.get(pick)
                    if error is None:
                        found[place] = unpack_results(answers.answers.results)[pick]
                        continue
                else:
                    error = answers.error
                found[place] = unpack_error(error)
        return found

    def ended(self) -> str | None:
        """Wait until the server hangs up; return why it says it does."""
        why = None
        while (frame := self.receive()) is not None:
            if frame.kind is Kind.REFUSE:
                why = str(frame.head)
        return why


class Scripted:
    """A server that does with each client what its script says, in a native thread."""

    def __init__(self, home: Path, script: Callable[[Channel], None]) -> None:
        folder = home / "run"
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path = str(folder / "model.sock")
        self.address = f"unix:{self.path}"
        self.clients = 0
        self._script = script
        self._listener = address.listen(self.path)
        self._thread = NativeCaller(self._run)

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        os.unlink(self.path)
        if self._thread.error is not None:
            raise self._thread.error

    def _run(self) -> None:
        while wait_for(self._listener.fileno()):
            try:
                fd, _ = self._listener._accept()  # type: ignore[attr-defined]
            except OSError:  # it was shut down
                return
            self.clients += 1
            channel = Channel(socket(fileno=fd), wait_for)
            try:
                self._script(channel)
            finally:
                channel.close()


def greet(channel: Channel, largest: int = LARGEST_FRAME, max_size: int = 1024) -> None:
    """Do as a server that has been connected to."""
    frame = channel.receive(20.0)
    assert frame is not None and frame.kind is Kind.HELLO
    hello = {"pid": os.getpid(), "name": "scripted", "largest": largest}
    hello["max_size"] = max_size
    channel.send(Kind.HELLO, 0, hello)


def received(channel: Channel) -> Frame:
    """Return the next frame, which has to come."""
    frame = channel.receive(20.0)
    assert frame is not None
    return frame


def answer_all(channel: Channel, asked: Frame) -> None:
    """Answer an ask: each call with its own item."""
    answer_some(channel, asked, list(range(read_ask(asked).size)))


def answer_some(channel: Channel, asked: Frame, places: list[int]) -> None:
    """Answer some calls of an ask."""
    (items,), _ = unpack_columns(read_ask(asked).parcel)
    answered = Answered(places, places, Answers(pack_results(list(items)), {}))
    channel.send(Kind.ANSWERS, asked.ident, *write_answered(answered))
