"""What model processes are told to run: factories, which return handlers.

A test knows what happened in another process by the record that its handler writes,
and holds it there at a gate, a FIFO: each gets the path of one.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.apps.inside import Record
from ubatch import ProcessExecutor, UBatch, ubatch_decorator
from ubatch.channel import Channel
from ubatch.spawn import FD

Handler = Callable[..., Any]


def entries(path: str) -> list[tuple[int, Any]]:
    """Return what was recorded, and by whom, in order."""
    try:
        with open(path) as record:
            return [tuple(json.loads(line)) for line in record]
    except FileNotFoundError:
        return []


def wait_at(gate: str) -> None:
    """Wait until a gate is opened."""
    os.close(os.open(gate, os.O_RDONLY))


def echo() -> Handler:
    """Answer each item with itself."""
    return list


def obey() -> Handler:
    """Take each item for a function and its arguments; answer what it returns."""
    return lambda items: [do(*args) for do, *args in items]


def give() -> Handler:
    """Take the first item for a function, which returns all answers."""
    return lambda items: items[0][0](*items[0][1:])


def says_goodbye(record: str, gate: str) -> Handler:
    """Note the end of the process, where it gets so far, past the gate."""

    def goodbye() -> None:
        wait_at(gate)
        Record(record).add(["goodbye"])

    atexit.register(goodbye)
    return list


def gated(record: str, gate: str) -> Handler:
    """Note each batch; hold one at the gate that has an item that begins so."""
    noted = Record(record)

    def handler(items: list[str]) -> list[str]:
        noted.add(items)
        if any(item.startswith("wait") for item in items):
            wait_at(gate)
        return [item.upper() for item in items]

    return handler


def holding_on(record: str, gate: str) -> Handler:
    """Do as gated(), and have a child that keeps open what this process has open."""
    if not os.fork():
        wait_at(gate)
        os._exit(0)
    return gated(record, gate)


def slow(record: str, gate: str, other: str) -> Handler:
    """Be ready once the gate is open; then do as gated(), with another one."""
    Record(record).add(["loads"])
    wait_at(gate)
    return gated(record, other)


def broken(record: str, mended: str) -> Handler:
    """Fail, until a file is there."""
    Record(record).add(["fails"])
    if not os.path.exists(mended):
        raise LookupError("the weights are gone")
    return list


def dying(record: str, mended: str) -> Handler:
    """End the process, until a file is there."""
    Record(record).add(["dies"])
    if not os.path.exists(mended):
        os._exit(3)
    return list


def exiting() -> Handler:
    """Exit like a program."""
    sys.exit("no device")


def uncallable() -> Any:
    """Return what is no handler."""
    return 42


def itself(items: list[int]) -> list[int]:
    """Be a handler, which somebody takes for a factory."""
    return items


def mistaken() -> Handler:
    """Call something else in a wrong way."""
    return itself()  # type: ignore[call-arg, return-value]


def forgetful() -> Any:
    """Make a handler, and return nothing."""


async def later() -> Handler:
    """Return a handler to who awaits it."""
    return list


def mute() -> Handler:
    """Fail, with an error that has no text."""
    raise Mute


def isolated(record: str) -> Handler:
    """Note each batch; fail those that have an item that is bad."""
    noted = Record(record)

    def handler(items: list[str]) -> list[str]:
        noted.add(items)
        if "bad" in items:
            raise ValueError("bad")
        return [item.upper() for item in items]

    return handler


def keywords() -> Handler:
    """Answer with all arguments."""
    return lambda rows, scale, mode: list(zip(rows, scale, mode))


def busy(record: str) -> Handler:
    """Keep the interpreter for as many seconds as each item says, in pure Python."""
    noted = Record(record)

    def handler(items: list[float]) -> list[float]:
        noted.add(items)
        until = time.perf_counter() + sum(items)
        while time.perf_counter() < until:
            pass
        return items

    return handler


@ubatch_decorator(8, 0.0)
def doubled(items: list[int]) -> list[int]:
    """Double; for who calls it with a list."""
    return [2 * item for item in items]


def decorated() -> Handler:
    """Return a function that is batched where it is written."""
    return doubled


@ubatch_decorator(8, 0.0, executor=ProcessExecutor("tests.apps.models:squared_itself"))
def squared(items: list[int]) -> list[int]:
    """Square, in a model process."""
    return [item * item for item in items]


def squared_itself() -> Handler:
    """Return the function that is to run here, as it is batched elsewhere."""
    return squared


class Factories:
    """Where a factory is an attribute of something else."""

    @staticmethod
    def echo() -> Handler:
        """Do as the function of that name."""
        return list

    class Callable:
        """A factory that is no function."""

        def __call__(self) -> Handler:
            return list


not_callable = UBatch


# What items are, or tell obey() to do.


def same(value: Any) -> Any:
    """Return what it is given."""
    return value


def fail(error: BaseException) -> Any:
    """Raise what it is given."""
    raise error


def fail_deeply(text: str) -> Any:
    """Raise, in a frame whose name is to be seen."""

    def far_below() -> Any:
        raise KeyError(text)

    return far_below()


def give_lambda() -> Any:
    """Return what cannot be pickled."""
    return lambda: None


def give_size(size: int) -> bytes:
    """Return much."""
    return bytes(size)


def limit_frames(size: int) -> None:
    """Send no frames of more bytes."""
    for found in gc.get_objects():
        if isinstance(found, Channel):
            found.largest_sent = size


def note(record: str, *items: Any) -> None:
    """Note that this runs, and with how much."""
    Record(record).add([len(item) for item in items])


def note_and_end(record: str, *items: Any) -> None:
    """Do so, and have the process end before it reads the next batch."""
    from ubatch import model

    note(record, *items)
    model._run_next = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore


def hang_up(gate: str) -> None:
    """Close the socket, and go on."""
    os.close(FD)
    wait_at(gate)


def die(pid: int) -> Any:
    """End the process, unless it is that one."""
    if os.getpid() != pid:
        os._exit(7)


def _load_in(pid: int) -> OnlyIn:
    if os.getpid() != pid:
        raise ImportError("this class is not to be had here")
    return OnlyIn()


class OnlyIn:
    """Can be loaded only in the process that made it."""

    def __reduce__(self) -> Any:
        return _load_in, (os.getpid(),)


class ExitsWhenLoaded:
    """Ends who loads it like a program."""

    def __reduce__(self) -> Any:
        return sys.exit, ("when it was loaded",)


class ExitsWhenSent:
    """Ends who pickles it like a program."""

    def __reduce__(self) -> Any:
        sys.exit("when it was sent")


class KillsWhenSent:
    """Pickled while somebody kills the greenlet that does it."""

    def __reduce__(self) -> Any:
        from gevent import GreenletExit

        raise GreenletExit


class MuteWhenSent:
    """Cannot be pickled, and nobody can tell why."""

    def __reduce__(self) -> Any:
        raise Mute


class NowAndThen:
    """Can be pickled every second time."""

    tries = 0

    def __reduce__(self) -> Any:
        NowAndThen.tries += 1
        if NowAndThen.tries % 2:
            raise ValueError("not now")
        return int, ()


class ExitsWhenTold(Exception):
    """An error that ends who pickles it, or shows it."""

    def __reduce__(self) -> Any:
        sys.exit("when it was sent")

    def __str__(self) -> str:
        sys.exit("when it was shown")


class ExitsWhenShown(BaseException):
    """What is no Exception, and ends who shows it, but for who made it."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def __repr__(self) -> str:
        if self.pid != os.getpid():
            sys.exit("when it was shown")
        return "ExitsWhenShown()"


class Mute(Exception):
    """Can be pickled, but not shown."""

    def __str__(self) -> str:
        raise RuntimeError("not even this")


@dataclass(frozen=True)
class TooLong(Exception):
    """Lets nobody set anything."""

    limit: int


def raise_too_long(limit: int) -> Any:
    """Raise that: it cannot be an item."""
    raise TooLong(limit)


class TwoArguments(Exception):
    """Cannot be loaded: its constructor wants other arguments than it keeps."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Unprintable(Exception):
    """Cannot be pickled, nor shown."""

    def __init__(self) -> None:
        self.hold = lambda: None

    def __str__(self) -> str:
        raise RuntimeError("not even this")


class WithNumber(Exception):
    """Has an attribute that its text does not show."""

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.number = number
