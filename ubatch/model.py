"""What does a model process do?

It is started with a socket, is told over that which factory makes its handler, and
answers one batch after the other until the socket ends. It imports no gevent, and runs
the handler on its only thread.
"""

from __future__ import annotations

import os
import signal
import sys
from _socket import socket
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from importlib import import_module
from itertools import islice
from time import monotonic
from typing import Any

from ubatch.batch import Handler, Job
from ubatch.channel import Channel
from ubatch.errors import UBatchError
from ubatch.isolation import Answered, always, answer_apart, answer_whole
from ubatch.options import check_handler, shown
from ubatch.parcel import (
    Answers,
    Done,
    PackedError,
    Run,
    Work,
    pack_each,
    pack_error,
    pack_results,
    read_work,
    text_of,
    unpack_columns,
    write_done,
)
from ubatch.spawn import FD, UNWANTED, close_inherited, end_with_parent
from ubatch.wire import Frame, Kind, WireError, pack, unpack

GOODBYE = 5
"""Seconds that this process has to end by itself, once its socket has ended."""


def main() -> None:
    """Serve whoever has the other end of the socket, until that ends."""
    close_inherited(FD)
    for number in UNWANTED:
        signal.signal(number, _ignore)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    channel = Channel(socket(fileno=FD), None)
    with suppress(OSError):  # it is gone, and so is whoever would want to know
        setup = channel.receive()
        if setup is not None:
            end_with_parent(signal.SIGKILL)  # even in a handler
            here = os.getppid() == setup.head["parent"]  # or it was gone before
            handler = _begin(channel, setup) if here else None
            while handler is not None and _answer(channel, handler):
                pass
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GOODBYE)  # whatever the handler's libraries do at exit
    end_with_parent(0)  # who may be about to end as well
    channel.close()


def _ignore(*_: object) -> None:
    pass


def _begin(channel: Channel, setup: Frame) -> Handler | None:
    """Have the factory make the handler, and tell how that went."""
    began = monotonic()
    try:
        sys.path[:], factory = unpack(setup.parts)
        handler = _made(factory, setup.head["label"])
    except BaseException as error:  # SystemExit too
        channel.send(Kind.FAILED, 0, None, [pack(tuple(pack_error(error)))[0]])
        return None
    channel.send(Kind.READY, 0, {"seconds": monotonic() - began})
    return handler


def _made(factory: str | bytes, label: str) -> Handler:
    """Return what the factory makes, if that is a handler."""
    try:
        make = _resolve(factory)
    except ModuleNotFoundError as error:
        if f"{label.partition(':')[0]}.".startswith(f"{error.name}."):
            raise _not_found(error).with_traceback(error.__traceback__) from None
        raise
    handler = _call(make)
    if getattr(handler, "_elsewhere", None) is True:
        handler = handler.__wrapped__  # here is where it is to run
    if not callable(handler):
        what = shown(handler)
        if hasattr(handler, "cr_await"):
            handler.close()  # or Python warns that it was never awaited
            what = "a coroutine"
        raise TypeError(
            f"{label} returned {what}; a factory must return the handler, a function "
            "that takes lists"
        )
    check_handler(handler)
    return handler  # type: ignore[no-any-return]


def _call(factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise
        raise TypeError(  # of the call itself: it is the handler perhaps
            f"{text_of(error)}; a factory takes no arguments and returns the handler"
        ) from None


def _not_found(error: ModuleNotFoundError) -> ModuleNotFoundError:
    try:
        here = os.getcwd()
    except OSError:
        here = "the current folder, which is gone"
    looked = f"{here} and sys.path"
    if here not in sys.path:
        looked = f"sys.path, and not in {here}"
    return ModuleNotFoundError(
        f"{error}; looked in {looked}", name=error.name, path=error.path
    )


def _resolve(factory: str | bytes) -> Callable[[], Any]:
    if not isinstance(factory, str):
        return unpack([factory])  # type: ignore[no-any-return]
    module, _, path = factory.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    if not callable(found):
        raise TypeError(
            f"{factory} must be a function that returns the handler, not {shown(found)}"
        )
    return found  # type: ignore[no-any-return]


def _answer(channel: Channel, handler: Handler) -> bool:
    """Answer one batch; False when there will be none."""
    done = _run_next(channel, handler)
    if done is None:
        return False
    try:
        channel.send(Kind.OUTCOME, 0, *write_done(done))
    except WireError as error:  # more than may be sent
        done = Done(0.0, 0, [], pack_error(UBatchError(f"the results are {error}")))
        channel.send(Kind.OUTCOME, 0, *write_done(done))
    return True


def _run_next(channel: Channel, handler: Handler) -> Done | None:
    """Run one batch.

    A function of its own, so that nothing of what came, which may be in shared memory,
    is left when the answers go out.
    """
    frame = channel.receive()
    return None if frame is None else _run(handler, read_work(frame))


def _run(handler: Handler, work: Work) -> Done:
    args: list[list[Any]] = [[] for _ in range(work.columns)]
    kwargs: dict[str, list[Any]] = {name: [] for name in work.names}
    read = [_open(run, args, kwargs) for run in work.runs]
    sizes = [0 if error else len(run.places) for run, error in zip(work.runs, read)]
    job = Job(handler, sum(sizes), args, kwargs)
    began = monotonic()
    answered = Answered([], 0, None)
    failed: PackedError | None = None
    try:
        if job.size:
            answer = answer_apart if work.apart else answer_whole
            answered = Context().run(answer, job, always)
            failed = pack_error(answered.exit) if answered.exit else None
    except BaseException as error:
        failed = pack_error(error)
    seconds = monotonic() - began
    if failed is not None:
        runs = [
            _all(run, bad or failed, bool(bad)) for run, bad in zip(work.runs, read)
        ]
        return Done(seconds, answered.reruns, runs if any(read) else [], failed)
    answers = iter(answered.answers)
    runs = [
        _all(run, bad, True) if bad else _pack(list(islice(answers, size)))
        for run, size, bad in zip(work.runs, sizes, read)
    ]
    first = None if answered.first is None else pack_error(answered.first)
    return Done(seconds, answered.reruns, runs, first)


def _all(run: Run, error: PackedError, unread: bool) -> Answers:
    return Answers([], dict.fromkeys(range(len(run.places)), error), unread)


def _open(
    run: Run, args: list[list[Any]], kwargs: dict[str, list[Any]]
) -> PackedError | None:
    """Add the calls of a run to the columns; return why that cannot be done."""
    try:
        by_position, by_name = unpack_columns(run.parcel)
        found = [by_position[i] for i in range(len(args))]
        found += [by_name[name] for name in kwargs]
        picked = [[column[place] for place in run.places] for column in found]
    except BaseException as error:  # a class that is not to be had here, or SystemExit
        return pack_error(error)
    for column, more in zip((*args, *kwargs.values()), picked):
        column += more
    return None


def _pack(answers: list[Any]) -> Answers:
    """Pack the answers of a run; one that cannot be sent harms no other."""
    packed: dict[int, PackedError] = {}  # where many have the same
    errors = {}
    for place, answer in enumerate(answers):
        if issubclass(type(answer), Exception):
            if id(answer) not in packed:
                packed[id(answer)] = pack_error(answer)
            errors[place] = packed[id(answer)]
    for place in errors:
        answers[place] = None
    try:
        return Answers(pack_results(answers), errors)
    except BaseException:  # SystemExit too: it is a result's
        results, odd = pack_each(answers)
    for place, why in odd.items():
        errors[place] = pack_error(_not_sent(answers[place], why))
    return Answers(results, errors)


def _not_sent(result: Any, why: str) -> TypeError:
    kind = type(result).__name__
    return TypeError(
        f"the handler's result, a {kind}, cannot be sent to another process: {why}"
    )
