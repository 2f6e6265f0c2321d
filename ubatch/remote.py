"""How does a process ask a model server?

Over one connection, on which many asks are under way: each is one batch of the batcher
here, that goes as soon as there is one. Whatever a strand does, it waits for its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from ubatch import address as where
from ubatch import options, process
from ubatch.batch import Batch, Job
from ubatch.calling import Ask
from ubatch.channel import Channel
from ubatch.errors import BackendError, WorkerLost
from ubatch.executors import (
    NOBODY_WAITS,
    Changed,
    Elsewhere,
    Executor,
    Outcome,
    Usual,
    outcome_of,
)
from ubatch.link import Asked, Link, LinkLost
from ubatch.log import tell
from ubatch.options import Options
from ubatch.origin import Found, Sent, pack_calls
from ubatch.wire import Kind, VersionError, WireError

if TYPE_CHECKING:
    from ubatch.backends.base import Backend

logger = logging.getLogger(__name__)

IN_FLIGHT = 256
"""Asks that may be under way at once; what comes beyond them goes in larger ones."""

MOST_AT_ONCE = 1024
"""Calls in one ask; as many more go in the next one, which does not wait for it."""

PATIENCE = 3.0
"""Seconds for which calls wait for a server that is not there: it may be restarting."""

AGAIN = 0.05
"""Seconds between two looks for it."""

GREETING = 0.25
"""Seconds that it has to say who it is, however little is left of that patience."""

DECIDED_THERE: dict[str, tuple[object, str]] = {
    "workers": (1, "leave it out, and use 'ubatch serve --processes {}'"),
    "linger": ("adaptive", "use 'ubatch serve --linger {}'"),
    "on_error": ("fail", "use 'ubatch serve --on-error {}'"),
    "handler_timeout": (None, "use 'ubatch serve --handler-timeout {:g}'"),
}
"""Options that are the server's: what a batcher here has, and how to have another."""


class ServerExecutor(Elsewhere):
    """Has a model server run the handler: ``ubatch serve`` on this host.

    What the greenlets or threads of this process ask for at once is sent at once; the
    server joins it with what others sent. ``timeout``, ``linger`` and what is to be
    done about errors are the server's; ``deadline`` is kept on both sides. Linux only.

    Args:
        address: ``"unix:PATH"``: where it listens.
        retry: Ask again, once, for what a server had that was lost; for handlers that
            may be run again. Otherwise those calls get WorkerLost.

    Raises:
        ValueError: The address is none; or, of a batcher that is given this, one of
            the options that are the server's.
    """

    def __init__(self, address: str, *, retry: bool = False) -> None:
        self._path = where.path_of(address)
        self.label = address
        self._retry = options.flag("retry", retry)

    def fit(self, options: Options) -> Options:
        """Return a batcher's options as this needs them.

        Raises:
            ValueError: One of them is the server's to decide.
        """
        for name, (default, remedy) in DECIDED_THERE.items():
            value = getattr(options, name)
            if value != default:
                raise ValueError(
                    f"{name}={value!r} and executor={self!r}: the server decides that; "
                    f"{remedy.format(value)}"
                )
        return options._replace(
            workers=IN_FLIGHT,
            linger="now",
            shed=False,
            on_error="fail",
            handler_timeout=None,
        )

    def open(self, name: str, backend: Backend, changed: Changed) -> Executor:
        return Remote(self._path, self._retry, name, backend)

    def __repr__(self) -> str:
        return f"ServerExecutor({self.label!r})"


class Remote(Usual):
    """The connection of one collector, and what runs its batches there.

    Owner: ``_link`` changes under the mutex ``_door``; strands that find none queue up
    there, and the first of them connects.
    """

    apart = True
    trouble: Exception | None = None
    vacant = True

    def __init__(self, path: str, retry: bool, name: str, backend: Backend) -> None:
        self.name = ServerExecutor.__name__
        self.places = self
        self._path = path
        self._retry = retry
        self._of = name
        self._backend = backend
        self._door = backend.mutex()
        self._link: Link | None = None
        # That one, those whose servers are leaving, and one that is being greeted.
        self._links: set[Link | Channel] = set()
        self._missed: float | None = None  # since when there is no server
        # When somebody last failed to connect, and what those get who waited for that.
        self._failed: tuple[float, Callable[[], BackendError]] = -inf, BackendError
        self._closed = False
        self._epoch = process.epoch
        self._under_way: dict[Batch, list[Asked]] = {}

    def claim(self, batch: Batch) -> None:
        pass

    def give_up(self, batch: Batch) -> None:
        # Only a stop() that has lost patience does, with all batches: so nobody is to
        # wait for a server any longer, to answer or to take what it is sent.
        for asked in self._under_way.get(batch, ()):
            asked.leave(asked.sent.calls)
        self.close()

    def left(self, batch: Batch, call: int) -> None:
        for asked in self._under_way.get(batch, ()):
            if call in asked.sent.calls:
                self._leave(asked, [call])

    def run(self, batch: Batch) -> Outcome:
        began = monotonic()
        job = batch.job()
        if job is None:
            return outcome_of(NOBODY_WAITS, began)
        # Each call is answered as soon as it can be, whatever becomes of the others.
        found = Found(job.size, partial(batch.collector.endings.answer, batch))
        try:
            self._run(batch, job, found)
        finally:
            self._under_way.pop(batch, None)
        return found.outcome(monotonic() - began, 0, None)

    def close(self) -> None:
        self._closed = True
        for link in list(self._links):
            link.end()

    def _run(self, batch: Batch, job: Job, found: Found) -> None:
        """Ask for all calls of a batch, and wait for their answers."""
        lost_before: set[int] = set()
        to_ask = [list(range(job.size))]
        while to_ask:
            under_way = self._under_way[batch] = []
            for calls in to_ask:
                self._send(batch, job, calls, found)
            to_ask = []
            for asked in under_way:
                asked.wait()
                to_ask += [[call] for call in asked.unread]
                calls = asked.lost_calls()
                if asked.untaken:
                    to_ask.append(calls)
                    continue
                again = []
                if self._retry and not self._closed:
                    again = [call for call in calls if call not in lost_before]
                    lost_before.update(again)
                gone = [call for call in calls if call not in again]
                if again:
                    to_ask.append(again)
                if gone:
                    found.refuse(gone, self._lost(f"{asked.lost} and had this call"))

    def _send(
        self, batch: Batch, job: Job, calls: list[int], found: Found, tries: int = 2
    ) -> None:
        """Put some calls under way; in several asks if they are too much for one."""
        try:
            link = self._linked()
        except BackendError as error:
            found.refuse(calls, error)
            return
        # Only now: while there was no server some of the callers may have left.
        calls = batch.still_wanted(calls)
        for sent in _packed(job, calls, found, link.most):
            asked = Asked(sent, found, self._backend)
            self._under_way[batch].append(asked)
            try:
                link.ask(asked, partial(_ask, batch, job, sent))
                continue
            except LinkLost as error:  # before it was all sent: it is not run
                refusal: BackendError = self._lost(str(error))
                parts, left = [sent.calls], tries - 1
            except WireError as error:  # it is more than a server takes
                refusal = BackendError(f"{self._of}: {error}")
                half = len(sent.calls) // 2
                parts, left = [sent.calls[:half], sent.calls[half:]], half and tries
            self._under_way[batch].remove(asked)
            if not left:
                found.refuse(sent.calls, refusal)
                continue
            for part in parts:
                self._send(batch, job, part, found, left)

    def _leave(self, asked: Asked, calls: list[int]) -> None:
        places = asked.leave(calls)
        if places and asked.link is not None:
            asked.link.leave(asked.number, places)

    # The connection.

    def _linked(self) -> Link:
        """Return the link; connect if there is none."""
        link = self._link
        if link is not None and link.usable:
            return link
        came = monotonic()
        with self._door:
            link = self._link
            if link is None or not link.usable:
                link = self._link = self._connect(came)
            return link

    def _connect(self, came: float) -> Link:
        """Connect, on behalf of one who came to the door then.

        Who came before another has failed to has waited with that one, and gets the
        same error: or each would wait for all that are before it.
        """
        if self._over():
            raise self._lost("stopped")
        failed, error_of_then = self._failed
        if came < failed:
            raise error_of_then()
        try:
            link = self._link_to(*self._find())
        except BackendError as error:  # without its frames, which hold a batch
            self._failed = monotonic(), partial(type(error), *error.args)
            raise
        return link

    def _find(self) -> tuple[Channel, int]:
        """Greet a server; look for one until there is none for too long."""
        began = monotonic()
        while True:
            missed = began if self._missed is None else self._missed
            try:
                left = round(missed + PATIENCE - monotonic(), 2)
                found = self._greet(max(left, GREETING))
                self._missed = None
                return found
            except (OSError, WireError) as error:
                missing, remedy = self._missing(error)
            if self._over():
                raise self._lost(missing)
            if self._missed is None:
                self._missed = began
                message = "%s: %s; calls wait up to %g s for it"
                told = logger, logging.WARNING, message, self._of, missing, PATIENCE
                # Not here: a log handler may itself ask, and come to the door.
                self._backend.defer(partial(tell, *told))
            if monotonic() - missed > PATIENCE:
                raise self._lost(f"{missing}; {remedy}")
            self._backend.wake().wait(AGAIN)

    def _missing(self, error: Exception) -> tuple[str, str]:
        """Return what to say where no server is to be had, and what to do then."""
        path = self._path
        with suppress(OSError):  # the folder that this process is in is gone
            path = os.path.abspath(path)
        if isinstance(error, PermissionError):
            user = f"this user, {os.geteuid()} ({error})"
            return (
                f"the socket {path} cannot be reached by {user}",
                "run 'ubatch serve' and its clients as one user",
            )
        return (
            f"no model server answers at {path} ({error})",
            f"is 'ubatch serve FACTORY --socket {path}' running?",
        )

    def _link_to(self, channel: Channel, most: int) -> Link:
        link = Link(channel, self._backend, most)
        self._links.add(link)
        if self._closed:
            link.end()
        try:
            self._backend.spawn(
                partial(self._read, link), lambda _: self._links.discard(link)
            )
        except RuntimeError as error:
            self._links.discard(link)
            channel.close()
            message = "cannot start what reads a model server's answers"
            raise BackendError(f"{self._of}: {message}") from error
        return link

    def _read(self, link: Link) -> None:
        """Take answers in; the life of the strand that does."""
        link.read()
        if not (link.leaving or self._over()):
            message = "%s: has lost the model server at %s"
            tell(logger, logging.WARNING, message, self._of, self._path)

    def _over(self) -> bool:
        """Tell whether nobody is to be asked: a fork has copied who wants to, say."""
        return self._closed or self._epoch is not process.epoch

    def _greet(self, patience: float) -> tuple[Channel, int]:
        """Return a channel to a server that has said who it is, and its max_size.

        Raises:
            OSError: There is none, or it says nothing.
            WireError: What it says makes no sense.
            BackendError: It will have nothing to do with us, or we with it.
        """
        channel = Channel(where.connect(self._path), self._wait_for)
        self._links.add(channel)
        if self._closed:
            channel.end()
        try:
            channel.send(Kind.HELLO, 0, {"pid": os.getpid()}, timeout=patience)
            frame = channel.receive(patience)
            if frame is None:
                raise ConnectionResetError("it hung up")
            if frame.kind is not Kind.HELLO:
                raise BackendError(f"{self._of}: {self._path}: {frame.head}")
            try:
                server = frame.head["pid"], self._path, frame.head["name"]
                channel.largest_sent = int(frame.head["largest"])
                most = max(1, int(frame.head["max_size"]))
            except (KeyError, TypeError, ValueError) as error:
                raise WireError("a HELLO that makes no sense") from error
            message = "%s: connected to the model server %d at %s, which runs %s"
            tell(logger, logging.INFO, message, self._of, *server)
        except VersionError as error:
            channel.close()
            raise BackendError(f"{self._of}: {self._path}: {error}") from None
        except BaseException:
            channel.close()
            raise
        finally:
            self._links.discard(channel)
        return channel, most

    def _wait_for(
        self, fd: int, write: bool = False, timeout: float | None = None
    ) -> bool:
        if write or timeout is not None:
            return self._backend.wait_for(fd, write, timeout)
        return self._backend.wait_idly(fd)  # see link.HELD

    def _lost(self, text: str) -> WorkerLost:
        return WorkerLost(f"{self._of}: {text}")


def _packed(job: Job, calls: list[int], found: Found, most: int) -> Iterator[Sent]:
    """Pack calls, no more together than may be in a batch there.

    A server sends all that was packed together with each batch that has some of it.
    """
    for start in range(0, len(calls), most):
        yield from pack_calls(job, calls[start : start + most], found)


def _ask(batch: Batch, job: Job, sent: Sent) -> Ask:
    """Return what is to be asked, with what is left of the deadlines now."""
    return Ask(
        *(len(job.args), sorted(job.kwargs), len(sent.calls)),
        *(batch.seconds_left(sent.calls, monotonic()), sent.parcel),
    )
