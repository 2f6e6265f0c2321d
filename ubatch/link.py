"""What goes over the connection from a process to a model server?

Many asks at once. Each waits for its own answers, which may come in any order, and not
all together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from ubatch.calling import Answered, Ask, Refused, read_answers, write_ask
from ubatch.channel import Channel
from ubatch.origin import Found, Sent
from ubatch.parcel import unpack_error
from ubatch.wire import Frame, Kind, Part, WireError

if TYPE_CHECKING:
    from ubatch.backends.base import Backend

GONE = "the model server is gone"

STALLED = 10.0
"""Seconds for which a server may take nothing of what it is sent."""

HELD = 3600.0
"""Seconds for which an ask is waited for, and then again. A link is waited for idly; it
is the timer of this that keeps a loop from running empty while an answer is to come."""

NUMBERS = 1 << 32
"""Of asks; 50 days of a thousand in a second, and then again from the first."""


class LinkLost(Exception):
    """The connection has ended."""


class Asked:
    """Some calls of a batch that are under way.

    Owner: all of it changes under ``_lock``: the link's reader adds answers, callers
    leave, and the strand waits until nobody is left who could be told anything.
    """

    def __init__(self, sent: Sent, found: Found, backend: Backend) -> None:
        self.sent = sent
        self.number = 0
        self.link: Link | None = None
        self.unread: list[int] = []  # calls that the handler's side could not load
        self.lost: LinkLost | None = None
        self.untaken = False  # the server was about to end, and has none of it
        self._found = found
        self._lock = backend.lock()
        self._latch = backend.latch_here()
        self._left = set(range(len(sent.calls)))  # places without an answer

    def add(self, answers: Answered | Refused) -> None:
        """Take some answers in."""
        # Race (half_told): 1. an answer comes; 2. the only other caller leaves, so that
        #       nobody is left, and the strand goes on; 3. the answer is put down. So a
        #       place is taken out of what is waited for when its answer is there.
        with self._lock:
            picks = answers.picks if isinstance(answers, Answered) else answers.places
            where = dict(zip(answers.places, picks))
            places = [place for place in where if place in self._left]
        calls = [self.sent.calls[place] for place in places]
        if isinstance(answers, Refused):
            self._found.refuse(calls, unpack_error(answers.error))
        elif answers.answers.unread and len(self.sent.calls) > 1:
            self.unread += calls
        else:
            picked = [where[place] for place in places]
            self._found.add(calls, answers.answers, picked)
        with self._lock:
            self._left.difference_update(places)
            last = not self._left
        if last:
            self._latch.set()

    def leave(self, calls: list[int]) -> list[int]:
        """Have nobody wait for some calls; return the places of those that did."""
        with self._lock:
            places = [place for place in self._left if self.sent.calls[place] in calls]
            self._left.difference_update(places)
        if self.over:
            self._latch.set()
            if self.link is not None:
                self.link.forget(self.number)
        return places

    def lose(self, error: LinkLost, untaken: bool = False) -> None:
        """Give up what has no answer: the link has ended, or its server is about to."""
        with self._lock:
            if self._left:
                self.lost = error
                self.untaken = untaken
                self._latch.set()

    @property
    def over(self) -> bool:
        """Nothing more is waited for."""
        return not self._left

    def wait(self) -> None:
        """Wait until each call has an answer, is left by its caller, or lost."""
        while not (self.over or self.lost):
            self._latch.wait(HELD)

    def lost_calls(self) -> list[int]:
        """Return those that were lost, once that has been waited for."""
        if self.lost is None:
            return []
        return [self.sent.calls[place] for place in sorted(self._left)]


class Link:
    """One connection to a server.

    Owner: one greenlet or thread reads; those that send take turns. ``_leaves`` and
    ``_telling`` change under ``_lock``.
    Race (late_ask): 1. a strand finds the link alive; 2. the reader finds its end, and
    loses all that is under way; 3. the strand puts one more ask under way. So that is
    put in before it is sent: to send it fails, or the reader loses it.
    """

    def __init__(self, channel: Channel, backend: Backend, most: int) -> None:
        """Take a channel to a server whose batches have *most* calls."""
        self.most = most
        self.alive = True
        self.leaving = False  # the server takes no more calls
        self._channel = channel
        self._turnstile = backend.mutex()
        self._numbers = count()
        self._under_way: dict[int, Asked] = {}
        self._backend = backend
        self._lock = backend.lock()
        self._leaves: deque[tuple[int, list[int]]] = deque()  # to be told
        self._telling = False  # a strand is there that tells them
        self._why = GONE

    @property
    def usable(self) -> bool:
        """More may be asked."""
        return self.alive and not self.leaving

    def ask(self, asked: Asked, make: Callable[[], Ask]) -> None:
        """Send an ask, made when it is its turn. Blocks until it is on its way.

        Raises:
            LinkLost: The link has ended, and the server has not got all of it.
            WireError: It is more than a server takes.
        """
        asked.link, asked.number = self, 1 + next(self._numbers) % (NUMBERS - 1)
        self._under_way[asked.number] = asked
        try:
            self._send(lambda: (Kind.CALLS, asked.number, *write_ask(make())))
        except BaseException:
            self.forget(asked.number)
            raise

    def leave(self, number: int, places: list[int]) -> None:
        """Have the server told that nobody waits for some calls. Does not block.

        A strand of its own tells it: that has to wait until the server takes it.
        """
        with self._lock:
            self._leaves.append((number, places))
            if self._telling or not self.alive:
                return
            with suppress(RuntimeError):  # no thread is to be had; the next one tries
                self._backend.spawn(self._tell, lambda _: None)
                self._telling = True

    def forget(self, number: int) -> None:
        """Have nothing more to do with an ask."""
        self._under_way.pop(number, None)

    def read(self) -> None:
        """Take answers in, until the link ends."""
        try:
            while (frame := self._channel.receive()) is not None:
                if frame.kind is Kind.ANSWERS:
                    self._take(frame)
                elif frame.kind is Kind.BYE:
                    self._say_goodbye(frame.ident)
                elif frame.kind is Kind.REFUSE:
                    self._why = (
                        f"the model server has ended the connection: {frame.head}"
                    )
                del frame  # and what is in it
        except WireError as error:
            self._why = f"what the model server says is {error}"
        except OSError:
            pass
        finally:
            self.end()
            for asked in list(self._under_way.values()):
                asked.lose(LinkLost(self._why))
            with self._turnstile:  # nobody sends
                self._channel.close()

    def end(self) -> None:
        """End the connection. Does not block."""
        self.alive = False
        self._channel.end()

    def _take(self, frame: Frame) -> None:
        asked = self._under_way.get(frame.ident)
        if asked is not None:  # or all of its callers have left
            asked.add(read_answers(frame))
            if asked.over:
                self.forget(frame.ident)
        self._maybe_end()

    def _say_goodbye(self, number: int) -> None:
        """Ask nothing more; one ask came too late perhaps, and is not taken."""
        self.leaving = True
        untaken = self._under_way.pop(number, None)
        if untaken is not None:
            untaken.lose(LinkLost(GONE), untaken=True)
        self._maybe_end()

    def _maybe_end(self) -> None:
        """End the link once all is answered, if the server waits for that."""
        if self.leaving and not self._under_way:
            with self._turnstile:  # or somebody would be about to ask
                if not self._under_way:
                    self.end()

    def _tell(self) -> None:
        """Tell the server who has left, until nobody has."""
        while True:
            with self._lock:
                if not self._leaves:
                    self._telling = False
                    return
                number, places = self._leaves.popleft()
            with suppress(LinkLost, WireError):
                self._send(lambda: (Kind.LEAVE, number, places, []))

    def _send(self, what: Callable[[], tuple[Kind, int, Any, list[Part]]]) -> None:
        with self._turnstile:
            if not self.alive:
                raise LinkLost(self._why)
            try:
                self._channel.send(*what(), STALLED)
            except WireError:
                raise
            except TimeoutError:
                self._why = f"the model server has taken nothing for {STALLED:g} s"
                self.end()
                raise LinkLost(self._why) from None
            except OSError:
                self.end()
                raise LinkLost(GONE) from None
            except BaseException:  # the strand was killed in the middle of a frame
                self.end()
                raise
