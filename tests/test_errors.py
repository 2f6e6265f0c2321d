"""Does each caller get the right error, its own, and is it told why?"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import sys
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gevent
import numpy
import pytest

from tests.fakes import Gate, Recorder, World
from ubatch import (
    BackendError,
    BadBatchOutput,
    BadBatchOutputSize,
    HandlerExit,
    QueueFull,
    UBatch,
    UBatchError,
)


class OnlyByName(Exception):
    """An error whose constructor does not take its own args."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def raising(error: BaseException) -> Callable[[list[Any]], Any]:
    def handler(items: list[Any]) -> Any:
        raise error

    return handler


@pytest.mark.parametrize("executor", ["threadpool", "inline"])
def test_the_handlers_error_keeps_its_class(world: World, executor: Any) -> None:
    """A caller catches what the handler raised, with its attributes and cause."""
    error = OnlyByName(code=7)
    error.__cause__ = ValueError("why")
    with UBatch(
        1, 0.0, handler=raising(error), backend=world.backend, executor=executor
    ) as ub:
        with pytest.raises(OnlyByName, match="code 7") as caught:
            ub.ubatch(1)
    assert caught.value is not error
    assert 7 == caught.value.code
    assert "why" == str(caught.value.__cause__)


@dataclass(frozen=True)
class TooLong(Exception):
    """An error whose class lets nobody set an attribute."""

    limit: int


@pytest.mark.parametrize("executor", ["threadpool", "inline"])
@pytest.mark.parametrize("raised", [True, False], ids=["raised", "returned"])
def test_an_error_that_lets_nobody_change_it_is_like_others(
    world: World, executor: Any, raised: bool
) -> None:
    """Each caller has a copy, with the traceback; good calls are answered."""
    cause = LookupError("why")

    def handler(items: list[int]) -> list[Any]:
        if raised:
            raise TooLong(5) from cause
        return [TooLong(item) if item else item for item in items]

    with UBatch(
        *(3, 60.0),
        handler=handler,
        backend=world.backend,
        executor=executor,
        linger="full",
    ) as ub:
        calls = [ub.submit(item) for item in (0, 5, 0)]
        errors: list[Any] = [call.exception(20) for call in calls]
    failed = errors if raised else errors[1:2]
    assert [TooLong(5)] * len(failed) == failed
    assert raised or [0, None, 0] == [calls[0].result(), errors[2], calls[2].result()]
    assert len(failed) == len({id(error) for error in failed})
    for error in failed if raised else ():
        assert error.__cause__ is cause
        assert "handler" == traceback.extract_tb(error.__traceback__)[-1].name


def test_an_error_whose_slots_cannot_be_set_is_copied(world: World) -> None:
    """What a class keeps in slots is copied past it, too."""

    @dataclass(frozen=True)
    class Slotted(Exception):
        __slots__ = ("limit",)
        limit: int

    with UBatch(
        2, 60.0, handler=raising(Slotted(5)), backend=world.backend, linger="full"
    ) as ub:
        mine, other = (call.exception(20) for call in [ub.submit(1), ub.submit(2)])
    assert mine == other == Slotted(5) and mine is not other


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors take no notes")
def test_a_note_that_one_caller_adds_is_not_shown_to_another(world: World) -> None:
    """Each has the notes of the handler, and a list of its own for more."""
    error = ValueError("bad")
    error.add_note("by the handler")
    with UBatch(2, 0.0, handler=raising(error), backend=world.backend) as ub:
        calls = [ub.submit(n) for n in range(2)]
        mine, other = (call.exception(20) for call in calls)
    assert mine is not None and other is not None
    mine.add_note("request 1")
    assert ["by the handler", "request 1"] == mine.__notes__
    assert ["by the handler"] == other.__notes__ == error.__notes__


@pytest.mark.concurrency
def test_a_thousand_callers_of_one_failed_batch(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Each its own error, tracebacks of one length, no frames kept, one log line."""
    gate = Gate()
    kept: list[weakref.ref[Any]] = []
    caught: list[BaseException] = []

    def handler(items: list[int]) -> list[int]:
        gate.wait()
        raise KeyError("model")

    class Local:
        pass

    def caller(ub: UBatch[int, int], n: int) -> None:
        local = Local()
        kept.append(weakref.ref(local))
        try:
            raise RuntimeError(f"context of {n}")
        except RuntimeError:
            try:
                ub.ubatch(n)
            except KeyError as error:
                caught.append(error)

    with UBatch(
        1000, 60.0, handler=handler, backend=world.backend, linger="full"
    ) as ub:
        callers = [world.spawn(caller, ub, n) for n in range(1000)]
        world.until(lambda: ub.stats().running == 1000)
        gate.open()
        for one in callers:
            one.result()
    assert 1000 == len(set(map(id, caught)))
    lengths = {len(traceback.extract_tb(e.__traceback__)) for e in caught}
    assert 1 == len(lengths)
    innermost = traceback.extract_tb(caught[0].__traceback__)[-1]
    assert "handler" == innermost.name
    contexts = {str(error.__context__) for error in caught}
    assert {f"context of {n}" for n in range(1000)} == contexts
    for error in caught[1:]:
        error.__traceback__ = error.__context__ = None
    del callers, error
    gc.collect()
    assert 1 >= sum(ref() is not None for ref in kept)
    lines = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert ["a batch of 1000 calls failed"] == [
        line.getMessage().split(": ")[1] for line in lines
    ]
    assert 1000 == ub.stats().failures_total


def test_an_error_that_cannot_be_copied_is_raised_as_it_is(world: World) -> None:
    """The same instance for all, whose traceback does not grow."""

    class Stubborn(Exception):
        made = False

        def __new__(cls, *args: Any) -> Any:
            if cls.made:
                raise TypeError("only one")
            cls.made = True
            return super().__new__(cls, *args)

    error = Stubborn("once")
    lengths = set()
    with UBatch(9, 0.0, handler=raising(error), backend=world.backend) as ub:
        for future in [ub.submit(n) for n in range(5)]:
            with pytest.raises(Stubborn) as caught:
                future.result(30)
            assert caught.value is error
            lengths.add(len(traceback.extract_tb(error.__traceback__)))
    assert 1 == len(lengths)


def test_no_callers_traceback_shows_the_items_of_others(world: World) -> None:
    """Of our frames none is in the traceback, where a crash report reads locals."""
    with UBatch(
        2, 9.0, handler=raising(ValueError()), backend=world.backend, linger="full"
    ) as ub:
        futures = [ub.submit("secret"), ub.submit("mine")]
        with pytest.raises(ValueError) as caught:
            futures[1].result(30)
        futures[0].exception(30)
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    ours = [f for f in frames if f.f_globals["__name__"].startswith("ubatch.")]
    assert ours
    assert not any("secret" in repr(frame.f_locals) for frame in ours)


@pytest.mark.parametrize("executor", ["threadpool", "inline"])
@pytest.mark.parametrize("error", [gevent.Timeout(1), gevent.GreenletExit("x")])
def test_what_is_not_an_exception_reaches_callers_as_one(
    hub: World, error: BaseException, executor: Any
) -> None:
    """A handler's Timeout or GreenletExit is not mistaken for the caller's own."""
    ub = UBatch(
        1, 0.0, handler=raising(error), backend="gevent", executor=executor
    ).start()
    with pytest.raises(HandlerExit) as caught:
        ub.ubatch(1)
    assert type(caught.value.__cause__) is type(error)
    ub.stop()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_handlers_exit_on_a_worker_thread_ends_neither_process_nor_batcher(
    world: World, error: BaseException, capfd: pytest.CaptureFixture[str]
) -> None:
    """SystemExit in a handler is an error of its batch, and prints nothing."""

    def handler(items: list[Any]) -> Any:
        if items == ["exit"]:
            raise error
        return items

    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        with pytest.raises(HandlerExit) as caught:
            ub.ubatch("exit")
        assert caught.value.__cause__ is error
        assert 1 == ub.ubatch(1)
    assert "" == capfd.readouterr().err


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (None, "None"),
        ((n for n in [1]), "generator"),
        ("x", "str"),
        (b"x", "bytes"),
        ({1: 1}, "dict"),
        ({1}, "set"),
        (numpy.array(5), "ndarray"),
        (5, "int"),
    ],
)
def test_an_output_that_answers_nobody_is_named(
    world: World, outputs: Any, message: str
) -> None:
    """BadBatchOutput names the type, and says what to return instead."""
    with UBatch(1, 0.0, handler=lambda _: outputs, backend=world.backend) as ub:
        with pytest.raises(BadBatchOutput, match=f"{message}.*one result per call"):
            ub.ubatch(1)


@pytest.mark.parametrize("outputs", [[], [1], [1, 2, 3]])
def test_too_few_and_too_many_results_fail_the_batch(
    world: World, outputs: list[int]
) -> None:
    """BadBatchOutputSize carries both sizes; nobody gets a neighbour's result."""
    with UBatch(
        2, 9.0, handler=lambda _: outputs, backend=world.backend, linger="full"
    ) as ub:
        futures = [ub.submit(n) for n in range(2)]
        for future in futures:
            with pytest.raises(BadBatchOutputSize) as caught:
                future.result(30)
            assert (2, len(outputs)) == (
                caught.value.input_size,
                caught.value.output_size,
            )
            assert str(caught.value) == caught.value.message


def test_a_length_that_lies_fails_the_batch(world: World) -> None:
    """What iterates otherwise than its length says does not shift the answers."""

    class Liar(list[int]):
        def __len__(self) -> int:
            return 1

    with UBatch(1, 0.0, handler=lambda _: Liar([1, 2]), backend=world.backend) as ub:
        with pytest.raises(BadBatchOutputSize):
            ub.ubatch(1)


def test_a_coroutine_returned_is_named_and_closed(world: World) -> None:
    """A function that returns a coroutine fails without a warning about await."""

    async def later() -> list[int]:
        return [1]

    with UBatch(1, 0.0, handler=lambda _: later(), backend=world.backend) as ub:
        with pytest.raises(BadBatchOutput, match="coroutine"):
            ub.ubatch(1)
    gc.collect()


def test_one_exception_among_results_is_its_callers_alone(world: World) -> None:
    """An element that is an Exception is raised to one caller; the others go on."""
    handler = Recorder(lambda n: ValueError("bad 1") if n == 1 else n)
    with UBatch(3, 9.0, handler=handler, backend=world.backend, linger="full") as ub:
        callers = [world.spawn(ub.ubatch, n) for n in range(3)]
        assert 0 == callers[0].result()
        with pytest.raises(ValueError, match="bad 1"):
            callers[1].result()
        assert 2 == callers[2].result()
        seen = ub.stats()
    assert (2, 1) == (seen.results_total, seen.failures_total)


def test_the_batcher_goes_on_after_a_failure(world: World) -> None:
    """One failed batch is one failed batch."""

    def handler(items: list[int]) -> list[float]:
        return [1 / item for item in items]

    with UBatch(1, 0.0, handler=handler, backend=world.backend) as ub:
        with pytest.raises(ZeroDivisionError):
            ub.ubatch(0)
        assert 0.5 == ub.ubatch(2)


@pytest.mark.concurrency
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "running"])
def test_killing_the_collector_fails_who_waits_and_the_next_call_works(
    hub: World, busy: bool
) -> None:
    """A dead collector is impossible to miss, and is replaced."""
    from ubatch.strands import Strands

    def strands() -> list[Any]:
        return [
            found
            for found in gc.get_objects()
            if isinstance(found, gevent.Greenlet)
            and not found.dead
            and found.args
            and isinstance(found.args[0], partial)
            and isinstance(found.args[0].func.__self__, Strands)
        ]

    gate = hub.gate()
    held = [busy]

    def handler(items: list[int]) -> list[int]:
        if held.pop() if held else False:
            gate.wait()
        return items

    with UBatch(
        9, 60.0, handler=handler, backend="gevent", linger="now" if busy else "full"
    ) as ub:
        if busy:
            running = hub.spawn(ub.ubatch, 0)
            hub.until(lambda: ub.stats().running == 1 and not held)
        waiting = hub.spawn(ub.ubatch, 1)
        hub.until(lambda: ub.stats().pending == 1)
        [strand] = strands()
        strand.kill()
        with pytest.raises(BackendError, match="killed"):
            waiting.result()
        if busy:
            with pytest.raises(BackendError, match="killed"):
                running.result()
        gate.open()
        future = ub.submit(2)
        if not busy:
            for n in range(8):
                ub.submit(n)
        assert 2 == future.result(30)


def test_the_root_catches_all_of_ours() -> None:
    """Every error of ours is a UBatchError."""
    import ubatch

    ours = [
        value
        for value in vars(ubatch).values()
        if isinstance(value, type) and issubclass(value, BaseException)
    ]
    assert len(ours) >= 9
    assert all(issubclass(error, UBatchError) for error in ours)


def test_a_handler_called_inline_with_ctrl_c_lets_it_through(hub: World) -> None:
    """KeyboardInterrupt in an inline handler reaches the main greenlet too."""
    ub = UBatch(
        1,
        0.0,
        handler=raising(KeyboardInterrupt()),
        backend="gevent",
        executor="inline",
    ).start()
    caller = hub.spawn(ub.ubatch, 1)
    with pytest.raises(KeyboardInterrupt):
        gevent.sleep(30)
    with pytest.raises(HandlerExit):
        caller.result()
    ub.stop()


@pytest.mark.timing
def test_an_inline_handler_that_keeps_the_hub_is_told_once(
    hub: World, caplog: pytest.LogCaptureFixture
) -> None:
    """More than 0.1 s without a turn of the loop: one warning, with the remedy."""
    from gevent import monkey

    sleep = monkey.get_original("time", "sleep")

    def handler(items: list[float]) -> list[float]:
        for item in items:
            (sleep if item > 0 else gevent.sleep)(abs(item))
        return items

    with UBatch(1, 0.0, handler=handler, backend="gevent", executor="inline") as ub:
        ub.ubatch(-0.15)  # it cooperates
        assert "kept the hub" not in caplog.text
        ub.ubatch(0.15)
        ub.ubatch(0.15)
    assert 1 == caplog.text.count("kept the hub")
    assert "executor='threadpool'" in caplog.text


def test_nothing_is_printed_for_an_error_in_a_pool(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """gevent prints what escapes a pool's thread; nothing does."""
    with UBatch(1, 0.0, handler=raising(ValueError("x")), backend=world.backend) as ub:
        with pytest.raises(ValueError):
            ub.ubatch(1)
    sys.stderr.flush()
    assert "" == capfd.readouterr().err


def test_a_full_queue_says_its_numbers_wherever_it_is_carried(world: World) -> None:
    """QueueFull keeps its numbers pickled, copied, and raised on by a handler."""
    full = QueueFull("no room", 7, 8, retry_after=2.5)
    with UBatch(1, 0.0, handler=raising(full), backend=world.backend) as ub:
        with pytest.raises(QueueFull) as caught:
            ub.ubatch(1)
    carried = pickle.loads(pickle.dumps(full)), copy.copy(full), caught.value
    for other in carried:
        assert other is not full
        assert "no room" == str(other)
        assert (7, 8, 2.5) == (other.pending, other.max_pending, other.retry_after)
