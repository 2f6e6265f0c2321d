"""What does a model server do for one client?

It puts the client's calls into the one batcher of the server, each as itself: a call is
its own caller, and is told how it ended in place of a greenlet. What has ended by the
time the client's writer comes to it goes out together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ubatch.batch import Batch, Told
from ubatch.calling import (
    Answered,
    Ask,
    Refused,
    read_ask,
    write_answered,
    write_refused,
)
from ubatch.channel import Channel
from ubatch.errors import (
    BackendError,
    DeadlineExceeded,
    Failure,
    QueueFull,
    RemoteError,
    RemoteTraceback,
    Stopped,
)
from ubatch.options import SHORTEST_WAIT
from ubatch.parcel import Answers, PackedError, pack_error
from ubatch.wire import Frame, Kind, Part, WireError

if TYPE_CHECKING:
    from ubatch.backends.base import Backend
    from ubatch.collector import Collector

STALLED = 10.0
"""Seconds for which a client may take nothing of what it is sent, or stop in the middle
of what it sends."""

EXPIRED = "the call's deadline had passed when it reached the model server"


class Routed(NamedTuple):
    """The answer of one call: where it is in what the handler's process sent."""

    answers: Answers
    pick: int


class Forwarded(RemoteError):
    """An error from a model process, that is passed on as it is."""

    def __init__(self, packed: PackedError, unread: bool = False) -> None:
        super().__init__(f"{packed.kind}: {packed.text}", packed.kind)
        self.__cause__ = RemoteTraceback(packed.traceback)
        self.packed = packed
        self.unread = unread


class Call:
    """One call of a client's: the caller and the item of the server's batcher."""

    __slots__ = ("asking", "place", "batch")

    def __init__(self, asking: Asking, place: int) -> None:
        self.asking = asking
        self.place = place
        self.batch: Batch | None = None

    def switch(self, told: Told) -> None:
        """Take the answer; called where a greenlet would be switched to."""
        self.batch = None
        self.asking.ended(self.place, told[1])


class Asking:
    """One ask of a client, while calls of it have not ended."""

    def __init__(self, session: Session, number: int, ask: Ask) -> None:
        self.parcel = ask.parcel
        self.number = number
        self.calls = {place: Call(self, place) for place in range(ask.size)}
        self._session = session

    def ended(self, place: int, answer: Any) -> None:
        """Have an answer sent."""
        del self.calls[place]
        self._session.answer(self, place, answer)


class Session:
    """One client, and what it has asked for.

    Owner: the hub's thread. serve() reads in one greenlet, write() writes in another.
    """

    def __init__(
        self,
        channel: Channel,
        pid: int,
        backend: Backend,
        collector: Callable[[], Collector],
        status: Callable[[], Any],
        deadline: float | None,
    ) -> None:
        """Take a client that has said hello.

        Args:
            collector: Tells what takes calls now.
            status: Tells how the server is.
            deadline: Seconds for calls that come without one.
        """
        self.pid = pid
        self.has_asked = False  # or it is here for the status alone
        self._channel = channel
        self._collector = collector
        self._status = status
        self._deadline = deadline
        self._asked: dict[int, Asking] = {}
        self._ended: dict[Asking, list[tuple[int, Any]]] = {}  # and not yet sent
        self._wake = backend.wake()  # there is something to write
        self._statuses: list[int] = []  # that were asked for
        self._untaken: list[int] = []  # asks that came too late for this server
        self._leaving = False  # the client is to be told to look for another server
        self._writing = False
        self._closed = False
        self._refusal: str | None = None

    @property
    def idle(self) -> bool:
        """Nothing of what it asked for is still to be answered."""
        return not (self._asked or self._ended or self._untaken or self._writing)

    def answer(self, asking: Asking, place: int, answer: Any) -> None:
        """Have one answer sent, with others that come at the same time."""
        if not asking.calls:
            self._asked.pop(asking.number, None)
        if not self._ended:
            self._wake.set()
        self._ended.setdefault(asking, []).append((place, answer))

    def say_goodbye(self) -> None:
        """Have the client ask another server from now on."""
        self._leaving = True
        self._wake.set()

    def read(self) -> None:
        """Take calls in, until the client is gone.

        Raises:
            WireError: What it says makes no sense.
            OSError: It is gone.
        """
        while (frame := self._channel.receive()) is not None:
            if frame.kind is Kind.CALLS:
                self._take(frame)
            elif frame.kind is Kind.LEAVE:
                self._leave(frame)
            elif frame.kind is Kind.STATUS:
                self._statuses.append(frame.ident)
                self._wake.set()
            else:
                raise WireError(f"a {frame.kind.name}, which a client does not send")
            del frame  # with all that is in it

    def write(self) -> None:
        """Send answers as calls end, until the session is closed.

        Raises:
            OSError: The client is gone, or takes nothing.
        """
        while not self._closed:
            self._wake.wait()
            self._writing = True
            while self._statuses:
                self._put(Kind.STATUS, self._statuses.pop(), self._status())
            while self._ended:
                asking = next(iter(self._ended))
                self._send(asking.number, self._ended.pop(asking))
            while self._untaken:
                self._put(Kind.BYE, self._untaken.pop(), None)
            if self._leaving:
                self._leaving = False
                self._put(Kind.BYE, 0, None)
            self._writing = False
        if self._refusal is not None:
            self._put(Kind.REFUSE, 0, self._refusal)

    def refuse(self, why: str) -> None:
        """Close it, and have the client told why; write() then returns."""
        self._refusal = why
        self._forget()

    def close(self) -> None:
        """Forget all that the client asked for: none of it is run, if it is not yet."""
        self._forget()
        self._channel.end()

    def _forget(self) -> None:
        self._closed = True
        self._wake.set()
        for asking in list(self._asked.values()):
            for call in list(asking.calls.values()):
                self._give_up(call)
        self._asked.clear()
        self._ended.clear()

    def _take(self, frame: Frame) -> None:
        ask = read_ask(frame)
        if frame.ident in self._asked:
            raise WireError(f"CALLS number {frame.ident}, which are under way already")
        self.has_asked = True
        asking = Asking(self, frame.ident, ask)
        self._asked[asking.number] = asking
        deadlines = ask.deadlines or [None] * ask.size
        refused: Exception | None = None
        for call, deadline in zip(list(asking.calls.values()), deadlines):
            if deadline is not None and deadline <= 0:
                asking.ended(call.place, Failure(DeadlineExceeded(EXPIRED)))
                continue
            if refused is None:
                refused = self._join(call, ask, deadline)
            elif isinstance(refused, QueueFull):  # nor is there room for the others
                self._collector().counters.rejected_total += 1
            if isinstance(refused, Stopped):  # and so is this server, for all of them
                del self._asked[asking.number]
                self._untaken.append(asking.number)
                self._wake.set()
                return
            if refused is not None:
                asking.ended(call.place, Failure(refused))

    def _join(self, call: Call, ask: Ask, deadline: float | None) -> Exception | None:
        """Put a call into the batcher; return why that cannot be done."""
        args, kwargs = (call,) * ask.columns, dict.fromkeys(ask.names, call)
        deadline = self._deadline if deadline is None else max(deadline, SHORTEST_WAIT)
        try:
            collector = self._collector()
            call.batch = collector.join(call, args, kwargs, deadline)
        except Exception as error:
            return error
        return None

    def _leave(self, frame: Frame) -> None:
        asking = self._asked.get(frame.ident)
        if asking is None:
            return
        places = frame.head
        if not isinstance(places, list):
            raise WireError("a LEAVE that makes no sense")
        for place in places:
            call = asking.calls.pop(place, None) if type(place) is int else None
            if call is not None:
                self._give_up(call)
        if not asking.calls:
            del self._asked[asking.number]

    def _give_up(self, call: Call) -> None:
        batch = call.batch
        if batch is not None:
            batch.gone.add(call)
            batch.collector.endings.leave(batch, call)

    def _send(self, number: int, ended: list[tuple[int, Any]]) -> None:
        """Send the answers of some calls of one ask."""
        routed: dict[int, tuple[Answers, list[int], list[int]]] = {}
        refused: dict[int, tuple[Exception, list[int]]] = {}
        for place, answer in ended:
            if isinstance(answer, Routed):
                key = id(answer.answers)
                _, places, picks = routed.setdefault(key, (answer.answers, [], []))
                places.append(place)
                picks.append(answer.pick)
            else:
                error = answer.error
                refused.setdefault(id(error), (error, []))[1].append(place)
        for answers, places, picks in routed.values():
            answered = Answered(places, picks, answers)
            try:
                self._put(Kind.ANSWERS, number, *write_answered(answered))
            except WireError as large:  # nothing was sent
                too_large = BackendError(f"the answer is {large}")
                refused[id(too_large)] = too_large, places
        for error, places in refused.values():
            self._put(Kind.ANSWERS, number, *_write_error(error, places))

    def _put(
        self, kind: Kind, number: int, head: object, parts: Sequence[Part] = ()
    ) -> None:
        self._channel.send(kind, number, head, parts, STALLED)


def _write_error(error: Exception, places: list[int]) -> tuple[Any, list[Any]]:
    if not isinstance(error, Forwarded):
        return write_refused(Refused(places, pack_error(error)))
    if not error.unread:
        return write_refused(Refused(places, error.packed))
    errors = dict.fromkeys(range(len(places)), error.packed)
    picks = list(range(len(places)))
    return write_answered(Answered(places, picks, Answers([], errors, True)))
