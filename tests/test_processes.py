"""Do handlers run in processes of their own, and does nobody suffer when those die?"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import numpy
import psutil
import pytest

from tests.apps import models
from tests.apps.models import OnlyIn, entries, obey
from tests.children import KILLED, FileGate, Program, fate, once
from tests.fakes import World
from ubatch import (
    BackendError,
    BadBatchOutput,
    BadBatchOutputSize,
    DeadlineExceeded,
    HandlerExit,
    ProcessExecutor,
    RemoteError,
    Stopped,
    UBatch,
    UBatchError,
    WorkerLost,
    backoff,
    keeper,
    processes,
    spawn,
    ubatch_decorator,
)
from ubatch.backends import load, thread
from ubatch.errors import RemoteTraceback
from ubatch.forward import ForwardingExecutor

NAMED = "tests.apps.models:"

WANTED = "a factory must return the handler, a function that takes lists"
NO_HANDLER = "a factory takes no arguments and returns the handler"


class Site:
    """What a test and its model processes share; no process is left after it."""

    def __init__(self, world: World, path: Path) -> None:
        self.world = world
        self.path = path
        self.record = str(path / "record")
        self.gate = FileGate(path / "gate")
        self.other = FileGate(path / "other")
        self._before = children()
        self._made: list[UBatch[Any, Any]] = []

    def batcher(
        self,
        factory: Any,
        max_size: int = 8,
        timeout: float = 0.0,
        *,
        processes: int = 1,
        retry: bool = False,
        **options: Any,
    ) -> UBatch[Any, Any]:
        """Return a batcher, started, whose handler a factory makes elsewhere."""
        executor = ProcessExecutor(factory, processes, retry=retry)
        options = {"backend": self.world.backend, "name": "model", **options}
        ub: UBatch[Any, Any] = UBatch(max_size, timeout, executor=executor, **options)
        self._made.append(ub)
        return ub.start()

    def gated(self, *args: Any, **options: Any) -> UBatch[Any, Any]:
        """Return one whose handler can be held, and notes its batches."""
        factory = partial(models.gated, self.record, self.gate.path)
        return self.batcher(factory, *args, **options)

    def noted(self) -> list[Any]:
        """Return what was noted, in order."""
        return [items for _, items in entries(self.record)]

    def pids(self) -> set[int]:
        """Return the model processes that are there now, also dead ones."""
        return children() - self._before

    def until_noted(self, items: Any) -> int:
        """Wait until something is noted; return by which process."""

        def found() -> list[int]:
            return [pid for pid, noted in entries(self.record) if noted == items]

        self.world.until(found)
        return found()[-1]

    def end(self) -> None:
        """Stop what was made, and see that no process is left."""
        for gate in (self.gate, self.other):
            if gate._writer is None:
                gate.open()
        for ub in self._made:
            ub.stop(timeout=10.0)
        self.world.until(lambda: not self.pids())
        self.gate.__exit__()
        self.other.__exit__()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture
def site(world: World, tmp_path: Path) -> Iterator[Site]:
    """A place for batchers of this backend."""
    made = Site(world, tmp_path)
    yield made
    made.end()


def call(do: Callable[..., Any], *args: Any) -> Any:
    """Return an item that tells obey() to call a function."""
    return (do, *args)


def together(ub: UBatch[Any, Any], items: list[Any]) -> list[Any]:
    """Have some items answered; what failed is answered with its error."""
    return ub.map(items, return_exceptions=True)


# The factory, and where it is called.


def test_nothing_is_started_before_the_first_call(site: Site) -> None:
    """Construction and start() make no process; a call makes as many as there are."""
    ub = site.batcher(NAMED + "echo", processes=2)
    repr(ub), ub.stats()
    assert set() == site.pids()
    assert 1 == ub.ubatch(1)
    site.world.until(lambda: len(site.pids()) == 2)
    assert 2 == ub.ubatch(2)
    assert 2 == len(site.pids())


@pytest.mark.parametrize(
    "factory",
    [
        NAMED + "echo",
        NAMED + "Factories.echo",
        models.echo,
        models.Factories.echo,
        models.Factories.Callable(),
        partial(models.echo),
    ],
    ids=["name", "dotted", "function", "method", "object", "partial"],
)
def test_a_factory_is_named_or_given(site: Site, factory: Any) -> None:
    """A name of anything callable does, and whatever can be pickled."""
    ub = site.batcher(factory)
    assert [1, "b"] == ub.map([1, "b"])


def test_the_factory_runs_there_and_its_module_is_not_imported_here(
    site: Site,
) -> None:
    """The web process needs nothing that the model needs."""
    ub = site.batcher("tests.apps.heavy:factory")
    pids = ub.map(["a", "b"])
    assert {*pids} == site.pids() and os.getpid() not in pids
    assert "tests.apps.heavy" not in sys.modules


@pytest.mark.parametrize("name", ["", "x", "a.b", "a:", ":b", "a b:c", "a:b:c", "1:a"])
def test_a_malformed_name_is_refused(name: str) -> None:
    """ValueError says how a name is written."""
    with pytest.raises(ValueError, match="'package.module:factory'"):
        ProcessExecutor(name)


def of_main() -> Any:
    """Is made to look like a function of the program."""
    return list


@pytest.mark.parametrize(
    "factory, why",
    [
        (lambda: list, "cannot be pickled"),
        (threading.Lock().acquire, "cannot be pickled"),
        (None, "not None"),
        (7, "not 7"),
    ],
)
def test_what_is_no_factory_is_refused(factory: Any, why: str) -> None:
    """TypeError says what would do."""
    with pytest.raises(TypeError, match=why) as caught:
        ProcessExecutor(factory)
    assert "package.module:factory" in str(caught.value)


def test_a_function_of_the_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process would import the name ``__main__``, and find itself."""
    monkeypatch.setattr(of_main, "__module__", "__main__")
    for factory in (of_main, partial(of_main), partial(partial(of_main), 1)):
        with pytest.raises(TypeError, match="factory of_main .* put it into a module"):
            ProcessExecutor(factory)


def test_a_factory_is_shown_by_its_name() -> None:
    """Also where it is given with arguments: log lines and stats() show that."""
    named = "tests.apps.models:gated"
    for factory in (named, models.gated, partial(models.gated, "a", "b")):
        assert f"ProcessExecutor({named!r}, processes=1)" == repr(
            ProcessExecutor(factory)
        )
    assert named == UBatch(1, 0.0, executor=ProcessExecutor(models.gated)).name


@pytest.mark.parametrize("value", [0, -1])
def test_a_senseless_number_of_processes_is_refused(value: int) -> None:
    """There is at least one."""
    with pytest.raises(ValueError, match="processes must be at least 1"):
        ProcessExecutor(models.echo, value)
    with pytest.raises(TypeError, match="processes must be a whole number"):
        ProcessExecutor(models.echo, "two")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="retry must be True or False"):
        ProcessExecutor(models.echo, retry=1)  # type: ignore[arg-type]


def test_options_that_contradict_are_refused() -> None:
    """A handler beside a factory, and workers that are not the processes."""
    executor = ProcessExecutor(models.echo, 2)
    with pytest.raises(ValueError, match="leave one of them out"):
        UBatch(8, 0.0, handler=list, executor=executor)
    with pytest.raises(ValueError, match="processes=3"):
        UBatch(8, 0.0, workers=3, executor=executor)
    UBatch(8, 0.0, workers=2, executor=executor)


# Results and errors.


def test_arguments_arrive_as_they_were_given(site: Site) -> None:
    """Several arguments, by position and by name, in one batch and in order."""
    ub = site.batcher(NAMED + "keywords", 3, 60.0, linger="full")
    futures = [ub.submit(n, mode=f"m{n}", scale=n / 2) for n in range(3)]
    assert [(n, n / 2, f"m{n}") for n in range(3)] == [f.result(20) for f in futures]
    assert {3: 1} == ub.stats().batch_sizes


def test_a_call_that_fails_alone_fails_alone(site: Site) -> None:
    """An exception among the answers is raised to its caller, with its attributes."""
    ub = site.batcher(obey, 3, 60.0, linger="full")
    odd = models.WithNumber("odd", 7)
    first, second, third = together(
        ub, [call(os.getpid), call(models.same, odd), call(os.getppid)]
    )
    assert {first} == site.pids() and os.getpid() == third
    assert isinstance(second, models.WithNumber) and ("odd", 7) == (
        str(second),
        second.number,
    )


def test_a_batch_that_fails_fails_each_with_its_own_copy(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Each has the traceback of the model process as its cause; it is logged once."""
    ub = site.batcher(obey, 3, 60.0, linger="full")
    do = [call(os.getpid), call(models.fail_deeply, "gone"), call(os.getpid)]
    errors = together(ub, do)
    assert [KeyError("gone").args] * 3 == [error.args for error in errors]
    assert 3 == len({id(error) for error in errors})
    for error in errors:
        assert isinstance(error, KeyError)
        assert isinstance(error.__cause__, RemoteTraceback)
        text = str(error.__cause__)
        assert "in far_below" in text and "models.py" in text
        assert "ubatch/model.py" not in text and "ubatch/batch.py" not in text
    failed = "model: a batch of 3 calls failed: KeyError"
    site.world.until(lambda: failed in caplog.messages)
    assert 1 == caplog.messages.count(failed)
    assert (3, 0, 3) == seen_ends(ub)


def seen_ends(ub: UBatch[Any, Any]) -> tuple[int, int, int]:
    seen = ub.stats()
    return seen.calls_total, seen.results_total, seen.failures_total


@pytest.mark.parametrize(
    "do, kind, text",
    [
        (call(models.fail, SystemExit(3)), HandlerExit, "SystemExit"),
        (call(models.fail, KeyboardInterrupt()), HandlerExit, "KeyboardInterrupt"),
        (call(models.fail, models.TwoArguments(1, 2)), RemoteError, "1 and 2"),
        (call(models.fail, ValueError("\ud800")), ValueError, "\ud800"),
    ],
    ids=["exit", "interrupt", "two arguments", "no Unicode"],
)
def test_errors_of_any_kind_arrive(site: Site, do: Any, kind: Any, text: str) -> None:
    """As what they are, if that can be; else as one that tells of them."""
    ub = site.batcher(obey)
    if kind is RemoteError:
        do = (models.TwoArguments, 1, 2)
    with pytest.raises(kind, match=text) as caught:
        ub.ubatch(do)
    assert type(caught.value) is kind
    if kind is RemoteError:
        assert "tests.apps.models.TwoArguments" == caught.value.kind
    before = site.pids()
    assert {ub.ubatch(call(os.getpid))} == before, "the process goes on"


@pytest.mark.parametrize("raised", [False, True], ids=["returned", "raised"])
def test_an_error_that_lets_nobody_change_it_arrives(site: Site, raised: bool) -> None:
    """As itself, with its traceback; a good call beside one is answered."""
    ub = site.batcher(obey, 3, 60.0, linger="full")
    pid = together(ub, [call(os.getpid)] * 3)[0]
    bad = call(models.raise_too_long if raised else models.TooLong, 5)
    found = together(ub, [call(os.getpid), bad, call(os.getpid)])
    too_long = models.TooLong(5)
    assert ([too_long] * 3 if raised else [pid, too_long, pid]) == found
    assert not raised or "in raise_too_long" in str(found[1].__cause__)
    assert {pid} == site.pids()


def test_an_error_that_resists_everything_is_told_of(site: Site) -> None:
    """It can be neither pickled nor shown; its caller is told its class."""
    ub = site.batcher(obey)
    with pytest.raises(RemoteError, match="models.Unprintable: an error that cannot"):
        ub.ubatch((models.Unprintable,))


def test_an_exit_that_exits_when_it_is_shown_is_told_of(site: Site) -> None:
    """The process goes on."""
    ub = site.batcher(obey)
    pid = ub.ubatch(call(os.getpid))
    with pytest.raises(RemoteError, match="SystemExit: when it was shown"):
        ub.ubatch(call(models.fail, models.ExitsWhenShown()))
    assert pid == ub.ubatch(call(os.getpid))


def test_an_error_whose_class_is_not_here_is_told_of(site: Site) -> None:
    """RemoteError names it, and its module is not imported for that."""
    ub = site.batcher("tests.apps.heavy:factory", 2, 60.0, linger="full")
    error, pid = together(ub, ["one", "pid"])
    assert isinstance(error, RemoteError) and {pid} == site.pids()
    assert "tests.apps.heavy.OutOfMemory" == error.kind
    assert "tests.apps.heavy.OutOfMemory: no room" == str(error)
    for error in together(ub, ["all", "all"]):
        assert isinstance(error, RemoteError) and "no room for all" in str(error)
        assert "in handler" in str(error.__cause__)
    assert "tests.apps.heavy" not in sys.modules


@pytest.mark.parametrize(
    "answers, kind",
    [
        (None, BadBatchOutput),
        ("abc", BadBatchOutput),
        ([1, 2], BadBatchOutputSize),
        ([], BadBatchOutputSize),
    ],
)
def test_bad_outputs_are_named(site: Site, answers: Any, kind: Any) -> None:
    """What cannot answer the calls one by one fails them, as in one process."""
    ub = site.batcher(NAMED + "give", 3, 60.0, linger="full")
    errors = together(ub, [call(models.same, answers)] * 3)
    assert [kind] * 3 == [type(error) for error in errors]
    if kind is BadBatchOutputSize:
        assert (3, len(answers)) == (errors[0].input_size, errors[0].output_size)


def test_an_item_that_cannot_be_sent_fails_alone(site: Site) -> None:
    """One that cannot be pickled, and one that cannot be loaded there."""
    ub = site.batcher(NAMED + "echo", 4, 60.0, linger="full")
    first, second, third, fourth = together(ub, [1, lambda: None, OnlyIn(), 4])
    assert [1, 4] == [first, fourth]
    assert isinstance(second, TypeError) and "cannot be sent" in str(second)
    assert isinstance(third, ImportError) and "not to be had here" in str(third)
    assert (4, 2, 2) == seen_ends(ub)
    assert 1 == ub.stats().batches_total
    first, second, *rest = together(ub, [1, OnlyIn(), 3, 4])
    assert [1, 3, 4] == [first, *rest] and isinstance(second, ImportError)
    assert 2 == ub.stats().batches_total


@pytest.mark.parametrize(
    "item, kind, text",
    [
        (models.ExitsWhenLoaded(), RemoteError, "SystemExit: when it was loaded"),
        (models.ExitsWhenSent(), TypeError, "be sent .*SystemExit: when it was sent"),
        (models.MuteWhenSent(), TypeError, "Mute: an error that cannot be shown"),
    ],
    ids=["exits there", "exits here", "mute"],
)
def test_an_odd_item_fails_alone(site: Site, item: Any, kind: Any, text: str) -> None:
    """Whatever is raised to pickle or to load it, others and the process go on."""
    ub = site.batcher(NAMED + "echo", 3, 60.0, linger="full")
    assert [1, 2, 3] == ub.map([1, 2, 3])
    before = site.pids()
    first, second, third = together(ub, [1, item, 3])
    assert [1, 3] == [first, third]
    assert kind is type(second) and re.search(text, str(second))
    assert [4, 5, 6] == ub.map([4, 5, 6]) and before == site.pids()


@pytest.mark.concurrency
def test_a_strand_that_is_killed_while_it_packs_ends(
    hub: World, tmp_path: Path
) -> None:
    """That is not the item's fault, nor an answer; the next call has another one."""
    site = Site(hub, tmp_path)
    ub = site.batcher(NAMED + "echo", 2, 60.0, linger="full")
    for lost in [ub.submit(item) for item in (1, models.KillsWhenSent())]:
        with pytest.raises(BackendError, match="was killed from outside"):
            lost.result(20)

    def served() -> bool:
        try:
            return bool([3, 4] == ub.map([3, 4]))
        except BackendError:  # it had not ended yet
            return False

    hub.until(served)
    site.end()


@pytest.mark.parametrize(
    "make, kind, text",
    [
        (models.ExitsWhenSent, TypeError, "be sent .*SystemExit: when it was sent"),
        (models.MuteWhenSent, TypeError, "Mute: an error that cannot be shown"),
        (models.ExitsWhenTold, RemoteError, "ExitsWhenTold: an error that cannot"),
        (models.NowAndThen, None, "0"),
    ],
    ids=["exits", "mute", "error", "now and then"],
)
def test_an_odd_result_fails_alone(site: Site, make: Any, kind: Any, text: str) -> None:
    """Whatever is raised to pickle it; one that can be pickled once arrives."""
    ub = site.batcher(obey, 3, 60.0, linger="full")
    first, second, third = together(ub, [call(os.getpid), call(make), call(os.getpid)])
    assert {first, third} == site.pids() and first == third
    if kind is None:
        assert 0 == second
    else:
        assert kind is type(second) and re.search(text, str(second))


def test_arrays_beside_an_odd_result_arrive(site: Site) -> None:
    """Small and large: what could not go with the others goes without them."""
    ub = site.batcher(obey, 3, 60.0, linger="full")
    sent = [numpy.arange(3), numpy.zeros(100_000)]
    do = [*(call(models.same, each) for each in sent), call(models.give_lambda)]
    *found, odd = together(ub, do)
    assert isinstance(odd, TypeError)
    assert all(numpy.array_equal(*pair) for pair in zip(sent, found, strict=True))


def test_results_that_exit_when_they_are_loaded_are_errors(site: Site) -> None:
    """What they raise here ends nothing, nor does one that has no text."""
    ub = site.batcher(obey)
    with pytest.raises(BadBatchOutput, match="SystemExit: when it was loaded"):
        ub.ubatch((models.ExitsWhenLoaded,))
    assert {ub.ubatch(call(os.getpid))} == site.pids()


def test_a_result_that_cannot_be_sent_fails_alone(site: Site) -> None:
    """One that cannot be pickled is its caller's error."""
    ub = site.batcher(obey, 3, 60.0, linger="full")
    do = [call(os.getpid), call(models.give_lambda), call(os.getpid)]
    first, second, third = together(ub, do)
    assert {first, third} == site.pids()
    assert isinstance(second, TypeError) and "result, a function, cannot" in str(second)
    assert (3, 2, 1) == seen_ends(ub)


def test_results_that_cannot_be_loaded_here_are_errors(site: Site) -> None:
    """Nobody hangs for them, and the process goes on."""
    ub = site.batcher(obey)
    with pytest.raises(BadBatchOutput, match="not to be had here"):
        ub.ubatch((OnlyIn,))
    assert {ub.ubatch(call(os.getpid))} == site.pids()


# Arrays.

DTYPE = numpy.dtype([("id", "i4"), ("at", "f8", (2,))])
MADE: dict[str, Callable[[int], Any]] = {
    "small": lambda n: numpy.arange(n, n + 64.0),
    "large": lambda n: numpy.full((256, 1024), n, numpy.float32),
    "at the limit": lambda n: numpy.full(16 * 1024, n, numpy.uint8),
    "not contiguous": lambda n: numpy.arange(n, n + 100)[::3],
    "large and not contiguous": lambda n: numpy.full((400, 400), float(n))[::2, ::2],
    "Fortran": lambda n: numpy.asfortranarray(numpy.full((5, 3), n)),
    "large Fortran": lambda n: numpy.asfortranarray(numpy.full((300, 301), float(n))),
    "transposed": lambda n: numpy.arange(n, n + 6).reshape(2, 3).T,
    "objects": lambda n: numpy.array([n, "x", None], object),
    "no dimension": lambda n: numpy.array(n),
    "no dimension, structured": lambda n: numpy.array((n, (0.5, n)), DTYPE),
    "empty": lambda n: numpy.zeros((0, 3), numpy.int16),
    "mixed shapes": lambda n: numpy.arange(n),
    "mixed types": lambda n: numpy.arange(3, dtype="i2" if n % 2 else "i4"),
    "mixed kinds": lambda n: numpy.arange(3) if n % 2 else numpy.float64(n),
    "structured": lambda n: numpy.array([(n, (1, 2)), (n + 1, (3, 4))], DTYPE),
    "big endian": lambda n: numpy.arange(n, n + 3, dtype=">i4"),
    "dates": lambda n: numpy.array([f"2024-01-0{n + 1}"], "M8[D]"),
    "text": lambda n: numpy.array(["a", f"{n}b"]),
    "bytes": lambda n: numpy.array([b"a", b"bc"]),
    "bool": lambda n: numpy.array([True, n % 2 == 0]),
    "float64": numpy.float64,
    "int8": numpy.int8,
    "bool scalar": lambda n: numpy.bool_(n % 2),
    "complex": lambda n: numpy.complex64(n + 1j),
    "duration": lambda n: numpy.timedelta64(n, "ms"),
    "date": lambda n: numpy.datetime64(f"2024-01-0{n + 1}"),
    "text scalar": lambda n: numpy.str_(f"{n}"),
    "record": lambda n: numpy.array([(n, (1, 2))], DTYPE)[0],
    "masked": lambda n: numpy.ma.masked_array([n, 2], [True, False]),
    "matrix": lambda n: numpy.arange(n, n + 4).reshape(2, 2).view(numpy.recarray),
}


@pytest.mark.parametrize("size", [1, 6])
def test_arrays_arrive_equal_and_of_the_same_type(site: Site, size: int) -> None:
    """There and back, alone and where they travel as one."""
    ub = site.batcher(NAMED + "echo", size, 60.0, linger="full")
    for what, make in MADE.items():
        sent = [make(n) for n in range(size)]
        for item, back in zip(sent, ub.map(sent), strict=True):
            assert type(item) is type(back), what
            assert item.dtype == back.dtype and item.shape == back.shape, what
            assert numpy.array_equal(item, back), what
    assert {size: len(MADE)} == ub.stats().batch_sizes


def test_an_array_that_may_not_be_written_arrives(site: Site) -> None:
    """Small and large, and it may not be written there either when it is large."""
    ub = site.batcher(obey, 2, 60.0, linger="full")
    sent = [numpy.arange(3), numpy.zeros(100_000)]
    for each in sent:
        each.flags.writeable = False
    for item, back in zip(sent, ub.map([call(models.same, each) for each in sent])):
        assert numpy.array_equal(item, back)


def test_results_of_one_caller_are_not_in_those_of_another(site: Site) -> None:
    """Who writes into what it got changes nobody else's."""
    ub = site.batcher(NAMED + "echo", 6, 60.0, linger="full")
    first, *rest = ub.map([numpy.zeros(8) for _ in range(6)])
    first[:] = 1
    assert not any(each.any() for each in rest)


# A process that dies.


@pytest.mark.concurrency
@pytest.mark.timing
@pytest.mark.parametrize("factory", [models.gated, models.holding_on])
def test_calls_of_a_process_that_is_killed_end_within_a_second(
    site: Site, factory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a child of it holds its socket; the next call has another process."""
    ub = site.batcher(partial(factory, site.record, site.gate.path))
    lost = site.world.spawn(ub.ubatch, "wait")
    pid = site.until_noted(["wait"])
    waiting = site.world.spawn(ub.ubatch, "next")
    site.world.until(lambda: ub.stats().pending)
    began = time.monotonic()
    with caplog.at_level(logging.INFO, "ubatch"):
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match=f"{pid} {KILLED} while it"):
            lost.result()
        assert time.monotonic() - began < 1.0
        assert "NEXT" == waiting.result()
    assert pid != site.until_noted(["next"])
    assert (2, 1, 1) == seen_ends(ub)
    (again,) = [text for text in caplog.messages if "starting another in" in text]
    killed = fate(r"was killed by SIGKILL \(out of memory\? see the kernel log\)")
    text = f"model: the model process {pid} {killed}; starting another in 0.1 s"
    assert re.fullmatch(text, again)


@pytest.mark.concurrency
def test_a_process_that_ends_by_itself_is_lost_too(site: Site) -> None:
    """Its caller is told how it ended."""
    ub = site.batcher(obey)
    told = fate("ended with exit code 7")
    with pytest.raises(WorkerLost, match=f"{told} while it had this"):
        ub.ubatch(call(models.die, 0))
    assert 5 == ub.ubatch(call(models.same, 5))


@pytest.mark.concurrency
def test_a_process_that_hangs_up_is_ended(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """What it goes on to do is of no use to anybody; the log says who did it."""
    ub = site.batcher(obey)
    pid = ub.ubatch(call(os.getpid))
    with pytest.raises(WorkerLost, match=f"{pid} {KILLED} while it had"):
        ub.ubatch(call(models.hang_up, site.gate.path))
    assert pid != ub.ubatch(call(os.getpid))
    told = f"process {pid} was killed by ubatch, since it had closed its socket; start"
    assert told in caplog.text and "out of memory" not in caplog.text


@pytest.mark.concurrency
def test_a_signal_that_has_no_name_is_told_by_its_number(site: Site) -> None:
    """Real-time signals end a process like others."""
    ub = site.gated()
    lost = site.world.spawn(ub.ubatch, "wait")
    os.kill(site.until_noted(["wait"]), signal.SIGRTMIN + 2)
    told = fate(f"was killed by signal {signal.SIGRTMIN + 2}")
    with pytest.raises(WorkerLost, match=f"{told} while it"):
        lost.result()


@pytest.mark.concurrency
def test_what_a_lost_process_had_is_run_again_once(site: Site) -> None:
    """With retry=True; a second loss is the caller's."""
    ub = site.gated(retry=True)
    lucky = site.world.spawn(ub.ubatch, "wait 1")
    first = site.until_noted(["wait 1"])
    os.kill(first, signal.SIGKILL)
    site.world.until(lambda: site.noted() == [["wait 1"]] * 2)
    unlucky = site.world.spawn(ub.ubatch, "wait 2")
    site.gate.open()
    assert "WAIT 1" == lucky.result()
    assert "WAIT 2" == unlucky.result()


@pytest.mark.concurrency
def test_what_is_lost_twice_is_not_run_a_third_time(site: Site) -> None:
    """At most once again, even with retry=True."""
    ub = site.gated(retry=True)
    lost = site.world.spawn(ub.ubatch, "wait")
    os.kill(site.until_noted(["wait"]), signal.SIGKILL)
    site.world.until(lambda: site.noted() == [["wait"]] * 2)
    os.kill(site.until_noted(["wait"]), signal.SIGKILL)
    with pytest.raises(WorkerLost):
        lost.result()
    assert "NEXT" == ub.ubatch("next")
    assert [["wait"], ["wait"], ["next"]] == site.noted()


@pytest.mark.concurrency
def test_without_retry_nothing_is_run_again(site: Site) -> None:
    """The handler may have done half of it."""
    ub = site.gated()
    lost = site.world.spawn(ub.ubatch, "wait")
    os.kill(site.until_noted(["wait"]), signal.SIGKILL)
    with pytest.raises(WorkerLost):
        lost.result()
    assert "NEXT" == ub.ubatch("next")
    assert [["wait"], ["next"]] == site.noted()


@pytest.mark.concurrency
def test_a_batch_that_went_in_halves_is_not_run_again(site: Site) -> None:
    """One half has been run: that its process did not read the other, is no news."""
    ub = site.batcher(obey, 2, 60.0, linger="full")
    together(ub, [call(os.getpid)] * 2)
    for model in executor_of(ub)._up:
        model.process.channel.largest_sent = 100_000
    do = [
        call(models.note_and_end, site.record, bytes(60_000)),
        call(models.note, site.record, bytes(60_001)),
    ]
    errors = together(ub, do)
    assert [WorkerLost] * 2 == [type(error) for error in errors]
    assert [[60_000]] == site.noted()


@pytest.mark.concurrency
def test_batches_run_in_as_many_processes_and_one_death_harms_one(
    site: Site,
) -> None:
    """With processes=2 two run at once, a third waits; one is killed, two answered."""
    ub = site.gated(max_size=1, processes=2)
    callers = {item: site.world.spawn(ub.ubatch, item) for item in ("wait a", "wait b")}
    pids = {item: site.until_noted([item]) for item in callers}
    assert 2 == len({*pids.values()})
    third = site.world.spawn(ub.ubatch, "third")
    site.world.until(lambda: ub.stats().pending)
    os.kill(pids["wait a"], signal.SIGKILL)
    with pytest.raises(WorkerLost):
        callers["wait a"].result()
    assert "THIRD" == third.result()
    site.gate.open()
    assert "WAIT B" == callers["wait b"].result()


@pytest.mark.concurrency
def test_an_idle_process_that_dies_costs_nobody_a_call(site: Site) -> None:
    """What it had not read is run by another, without retry: nothing ran yet."""
    ub = site.gated()
    assert "FIRST" == ub.ubatch("first")
    for number in range(3):
        (pid,) = {pid for pid, _ in entries(site.record)[-1:]}
        os.kill(pid, signal.SIGKILL)
        assert f"NEXT {number}" == ub.ubatch(f"next {number}")
    assert 4 == len(site.noted())


@pytest.mark.concurrency
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_does_not_end_the_model(
    site: Site, number: int
) -> None:
    """Who started it decides: what is under way is answered."""
    ub = site.gated()
    caller = site.world.spawn(ub.ubatch, "wait")
    pid = site.until_noted(["wait"])
    os.kill(pid, number)
    site.gate.open()
    assert "WAIT" == caller.result()
    assert "NEXT" == ub.ubatch("next") and pid == site.until_noted(["next"])


@pytest.mark.concurrency
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_while_a_process_starts_does_not_end_it(
    site: Site, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come before it can say that it wants none; its children get them."""
    start, pids = spawn.start_process, []

    def start_and_signal(*args: Any, **kwargs: Any) -> int:
        pids.append(start(*args, **kwargs))
        os.kill(pids[0], number)
        return pids[0]

    monkeypatch.setattr(spawn, "start_process", start_and_signal)
    ub = site.batcher(obey)
    assert pids == ub.map([call(os.getpid)])
    assert not ub.ubatch(call(signal.pthread_sigmask, signal.SIG_BLOCK, []))


# A process that is not there yet.


@pytest.mark.concurrency
def test_calls_wait_for_a_slow_factory_in_open_batches(site: Site) -> None:
    """Those that come while it loads are one batch; deadlines are kept meanwhile."""
    factory = partial(models.slow, site.record, site.gate.path, site.other.path)
    ub = site.batcher(factory)
    first = site.world.spawn(ub.ubatch, "a")
    site.until_noted(["loads"])
    with pytest.raises(DeadlineExceeded):
        ub.with_options(deadline=0.01).ubatch("late")
    rest = [site.world.spawn(ub.ubatch, item) for item in "bcd"]
    site.world.until(lambda: ub.stats().pending == 4)
    site.gate.open()
    assert list("ABCD") == [caller.result() for caller in (first, *rest)]
    assert [["loads"], list("abcd")] == site.noted()
    seen = ub.stats()
    assert (5, 4, 1) == (seen.calls_total, seen.results_total, seen.expired_total)
    assert {4: 1} == seen.batch_sizes


@pytest.mark.concurrency
def test_a_factory_that_fails_is_told_of_and_tried_again(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers get its error at once; a line for each attempt, each later; then all is
    well."""
    monkeypatch.setattr(backoff, "FIRST_PAUSE", 0.02)
    mended = site.path / "mended"
    ub = site.batcher(partial(models.broken, site.record, str(mended)))
    caplog.set_level(logging.INFO, "ubatch")
    with pytest.raises(BackendError, match="the factory failed: .*weights are gone"):
        ub.ubatch(1)
    with pytest.raises(BackendError, match="LookupError: the weights are gone") as told:
        ub.ubatch(2)
    assert "in broken" in str(told.value.__cause__)
    with pytest.raises(BackendError):
        ub.submit(3)
    site.world.until(lambda: caplog.text.count("the factory failed") >= 3)
    mended.touch()
    site.world.until(lambda: any("is ready" in text for text in caplog.messages))
    assert 4 == ub.ubatch(4)
    tried = [text for text in caplog.messages if "the factory failed" in text]
    assert len(site.noted()) == 1 + len(tried)
    assert 1 == caplog.text.count("in broken"), "its traceback is told once"
    pauses = [float(text.rpartition(" in ")[2].removesuffix(" s")) for text in tried]
    assert [0.0, 0.0, 0.1] == pauses[:3] and pauses == sorted(pauses)


@pytest.mark.concurrency
def test_a_process_that_dies_while_it_loads_is_told_of(site: Site) -> None:
    """Callers are told how it ended, at once."""
    mended = site.path / "mended"
    ub = site.batcher(partial(models.dying, site.record, str(mended)))
    told = fate("ended with exit code 3")
    with pytest.raises(WorkerLost, match=f"{told} while it loaded"):
        ub.ubatch(1)
    mended.touch()

    def served() -> bool:
        try:
            return bool(2 == ub.ubatch(2))
        except WorkerLost:
            return False

    site.world.until(served)


@pytest.mark.parametrize(
    "factory, text",
    [
        (NAMED + "exiting", "SystemExit: no device"),
        (NAMED + "mute", "Mute: an error that cannot be shown"),
        (NAMED + "uncallable", f"TypeError: {NAMED}uncallable returned 42; {WANTED}"),
        (NAMED + "forgetful", f"TypeError: {NAMED}forgetful returned None; {WANTED}"),
        (NAMED + "later", f"TypeError: {NAMED}later returned a coroutine; {WANTED}"),
        (models.forgetful, f"TypeError: {NAMED}forgetful returned None; {WANTED}"),
        (
            NAMED + "itself",
            rf"TypeError: itself\(\) missing 1 .*'items'; {NO_HANDLER}$",
        ),
        (NAMED + "mistaken", r"TypeError: itself\(\) missing 1 .*'items'$"),
        (NAMED + "nothing", "AttributeError: .*nothing"),
        (NAMED + "NAME.x", "AttributeError: .*NAME"),
        pytest.param(
            "tests.apps.no_such:x",
            rf"No module .*no_such'; looked in {re.escape(os.getcwd())} and sys.path$",
            id="no module",
        ),
    ],
)
def test_what_makes_no_handler_is_told_of(site: Site, factory: Any, text: str) -> None:
    """Whatever is wrong with it, its text reaches who calls."""
    ub = site.batcher(factory)
    with pytest.raises(BackendError, match=f"the factory failed: .*{text}"):
        ub.ubatch(1)


def test_a_module_that_is_not_found_may_be_in_a_folder_that_is_not_looked_into(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the one that a server was started in; what a module needs is not it."""
    (tmp_path / "mine.py").write_text("import tests.apps.no_such")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    looked = f"looked in sys.path, and not in {re.escape(str(tmp_path))}"
    with pytest.raises(BackendError, match=f"No module named 'mine'; {looked}$"):
        site.batcher("mine:factory").ubatch(1)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(BackendError, match="No module named 'tests.apps.no_such'$"):
        site.batcher("mine:factory").ubatch(1)


@pytest.mark.concurrency
def test_a_process_that_keeps_dying_is_started_later_and_later(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls wait for a short pause, and are told before a long one."""
    monkeypatch.setattr(keeper, "WAITED_FOR", 0.15)
    ub = site.batcher(obey)
    for _ in range(2):
        with pytest.raises(WorkerLost, match="while it had this call"):
            ub.ubatch(call(models.die, 0))
    site.world.until(lambda: "in 0.2 s" in caplog.text)
    told = fate("ended with exit code 7")
    with pytest.raises(WorkerLost, match=f"model: the model process .* {told}$"):
        ub.ubatch(call(models.same, 1))

    def served() -> bool:
        try:
            return bool(1 == ub.ubatch(call(models.same, 1)))
        except WorkerLost:
            return False

    site.world.until(served)


@pytest.mark.concurrency
def test_without_a_process_callers_are_told_and_later_ones_served(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process is to be had for a while."""

    def refuse(*args: Any, **kwargs: Any) -> int:
        raise OSError("no more processes")

    ub = site.batcher(NAMED + "echo")
    with monkeypatch.context() as patch:
        patch.setattr("ubatch.spawn.start_process", refuse)
        with pytest.raises(WorkerLost, match="can be started: no more processes"):
            ub.ubatch(1)

    def served() -> bool:
        try:
            return bool(2 == ub.ubatch(2))
        except WorkerLost:
            return False

    site.world.until(served)


@pytest.mark.concurrency
def test_without_a_thread_for_each_process_those_that_are_there_serve(
    threads: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is refused for the others, which are started when there are threads."""
    site, starts = Site(threads, tmp_path), [0]
    start = thread.start_thread

    def limited(run: Callable[[], None]) -> None:
        starts[0] += 1
        if starts[0] > 2:  # a worker, and a keeper
            raise RuntimeError("can't start new thread")
        start(run)

    ub = site.batcher(obey, max_size=1, processes=2)
    with monkeypatch.context() as patch:
        patch.setattr(thread, "start_thread", limited)
        assert 1 == ub.ubatch(call(models.same, 1))
        assert starts[0] > 2 and 1 == len(site.pids())
    assert 2 == ub.ubatch(call(models.same, 2))
    threads.until(lambda: len(site.pids()) == 2)
    site.end()


@pytest.mark.concurrency
def test_no_process_is_started_once_all_is_closed(site: Site) -> None:
    """Not even one that is to replace another."""
    ub = site.batcher(NAMED + "echo")
    assert 1 == ub.ubatch(1)
    executor_of(ub).close()
    executor_of(ub).reload()
    site.world.until(lambda: not site.pids())
    site.world.until(lambda: not executor_of(ub)._keepers)


@pytest.mark.concurrency
def test_a_process_that_cannot_be_waited_for_is_not_left(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many files are open: it is ended, and its callers are told."""

    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    ub = site.batcher(NAMED + "echo")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", refuse)
        with pytest.raises(WorkerLost, match="can be started: .*Too many open files"):
            ub.ubatch(1)
        site.world.until(lambda: not site.pids())
    ub.stop()


@pytest.mark.concurrency
@pytest.mark.parametrize("forgetful", [False, True])
def test_a_process_may_be_waited_for_by_somebody_else(
    hub: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: bool
) -> None:
    """As gevent does for all children, at times: its end is noticed, and its number,
    which may be another's by now, is not used. A kernel may know how it ended."""

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")

    site = Site(hub, tmp_path)
    ub = site.gated()
    lost = hub.spawn(ub.ubatch, "wait")
    pid = site.until_noted(["wait"])
    (model,) = executor_of(ub)._up
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", pytest.fail)
        if forgetful:
            patch.setattr(spawn, "ioctl", refuse)
        signal.pidfd_send_signal(model.process._pidfd, signal.SIGKILL)
        gevent.monkey.get_original("os", "waitpid")(pid, 0)
        told = "has ended" if forgetful else KILLED
        with pytest.raises(WorkerLost, match=f"{told} while it had this call"):
            lost.result()
    assert "NEXT" == ub.ubatch("next")
    site.end()


# Handlers that are slow, bad or stuck.


@pytest.mark.concurrency
def test_a_stuck_process_is_killed_and_replaced(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """handler_timeout: its callers get DeadlineExceeded, others another process."""
    ub = site.gated(handler_timeout=0.3)
    stuck = site.world.spawn(ub.ubatch, "wait")
    pid = site.until_noted(["wait"])
    waiting = site.world.spawn(ub.ubatch, "next")
    with pytest.raises(DeadlineExceeded, match="handler_timeout=0.3"):
        stuck.result()
    assert "NEXT" == waiting.result()
    assert pid != site.until_noted(["next"])
    site.world.until(lambda: pid not in site.pids())
    site.world.until(lambda: not ub.stats().stuck)
    seen = ub.stats()
    assert (2, 1, 1) == (seen.calls_total, seen.results_total, seen.expired_total)
    assert 1 == seen.stuck_total
    why = "was killed by ubatch, since its handler ran past handler_timeout"
    told = f"model: the model process {pid} {why}; starting another in 0.1 s"
    assert told in caplog.messages


@pytest.mark.concurrency
def test_however_often_one_is_stuck_the_next_comes_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that was killed as stuck was sound: nobody else is told of that."""
    monkeypatch.setattr(keeper, "WAITED_FOR", 0.15)
    ub = site.gated(handler_timeout=0.3)
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            ub.ubatch("wait")
        assert "NEXT" == ub.ubatch("next")
    assert 3 == caplog.text.count("starting another in 0.1 s")


@pytest.mark.concurrency
def test_a_stuck_batch_is_not_run_again(site: Site) -> None:
    """Nobody waits for it: retry is for those that are lost."""
    ub = site.gated(handler_timeout=0.3, retry=True)
    with pytest.raises(DeadlineExceeded):
        ub.ubatch("wait")
    assert "NEXT" == ub.ubatch("next")
    assert [["wait"], ["next"]] == site.noted()


@pytest.mark.concurrency
def test_a_deadline_is_kept_while_the_handler_runs(site: Site) -> None:
    """Who waited goes; the others of the batch get their answers."""
    ub = site.gated(2, 60.0, linger="full")
    caller = site.world.spawn(ub.ubatch, "wait")
    site.world.until(lambda: ub.stats().pending)
    with pytest.raises(DeadlineExceeded):
        ub.with_options(deadline=0.3).ubatch("late")
    site.gate.open()
    assert "WAIT" == caller.result()
    seen = ub.stats()
    assert (2, 1, 1) == (seen.calls_total, seen.results_total, seen.expired_total)
    assert 1 == len(site.noted())


def test_isolate_finds_the_bad_calls(site: Site) -> None:
    """Only they fail; the handler is run again no more than is said."""
    factory = partial(models.isolated, site.record)
    ub = site.batcher(factory, 8, 60.0, linger="full", on_error="isolate")
    found = together(ub, ["a", "b", "bad", "d", "e", "f", "bad", "h"])
    assert ["A", "B", "D", "E", "F", "H"] == [x for x in found if isinstance(x, str)]
    assert [ValueError] * 2 == [type(found[n]) for n in (2, 6)]
    seen = ub.stats()
    assert (8, 6, 2) == seen_ends(ub)
    assert len(site.noted()) - 1 == seen.reruns_total <= 2 * 2 * 3
    found = together(ub, ["bad"] * 8)
    assert [ValueError] * 8 == [type(error) for error in found]
    assert 2 * 3 + 1 == len(site.noted()) - 1 - seen.reruns_total


def test_isolate_counts_besides_items_that_cannot_be_sent(site: Site) -> None:
    """What the handler never saw is not its fault."""
    factory = partial(models.isolated, site.record)
    ub = site.batcher(factory, 4, 60.0, linger="full", on_error="isolate")
    first, second, third, fourth = together(ub, ["a", lambda: None, "bad", OnlyIn()])
    assert "A" == first
    kinds = [TypeError, ValueError, ImportError]
    assert kinds == [type(error) for error in (second, third, fourth)]
    assert ["a", "bad"] == site.noted()[0]


def test_what_is_too_large_for_the_wire_is_refused(site: Site) -> None:
    """One item that is fails alone; as many as are, go in several batches; of results
    all fail."""
    ub = site.batcher(obey, 3, 60.0, linger="full")
    together(ub, [call(models.limit_frames, 100_000)] * 3)
    for model in executor_of(ub)._up:
        model.process.channel.largest_sent = 100_000
    do = [call(len, b"1"), call(len, bytes(200_000)), call(len, b"22")]
    first, second, third = together(ub, do)
    assert [1, 2] == [first, third]
    assert isinstance(second, BackendError) and "100000 are allowed" in str(second)
    assert (6, 5, 1) == seen_ends(ub)
    do = [call(len, bytes(60_000)), call(len, bytes(60_001)), call(os.getpid)]
    assert [60_000, 60_001] == together(ub, do)[:2]
    do = [call(models.give_size, 200_000), call(os.getpid), call(os.getpid)]
    for error in together(ub, do):
        assert isinstance(error, UBatchError) and "100000 are allowed" in str(error)
    assert {*together(ub, [call(os.getpid)] * 3)} == site.pids()


def executor_of(ub: UBatch[Any, Any]) -> Any:
    collector: Any = ub._collector
    return collector._executor


# The end.


@pytest.mark.concurrency
def test_stop_runs_what_was_accepted_and_leaves_no_process(site: Site) -> None:
    """A batch that runs is waited for, and so is one that waits."""
    ub = site.gated()
    running = site.world.spawn(ub.ubatch, "wait")
    site.until_noted(["wait"])
    waiting = site.world.spawn(ub.ubatch, "next")
    site.world.until(lambda: ub.stats().pending)
    stopping = site.world.spawn(ub.stop)
    site.world.until(lambda: "stop" in repr(ub))
    assert site.pids()
    site.gate.open()
    assert ["WAIT", "NEXT"] == [running.result(), waiting.result()]
    stopping.result()
    site.world.until(lambda: not site.pids())
    with pytest.raises(Stopped):
        ub.ubatch("late")
    ub.start()
    assert "AGAIN" == ub.ubatch("again")


@pytest.mark.concurrency
@pytest.mark.parametrize("retry", [False, True])
def test_stop_gives_a_handler_up_that_hangs(
    site: Site, retry: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its process is killed; nobody is left waiting, and nothing is run again."""
    ub = site.gated(retry=retry)
    hangs = site.world.spawn(ub.ubatch, "wait")
    site.until_noted(["wait"])
    waiting = site.world.spawn(ub.ubatch, "next")
    site.world.until(lambda: ub.stats().pending)
    ub.stop(timeout=0.05)
    for caller in (hangs, waiting):
        with pytest.raises(Stopped):
            caller.result()
    site.world.until(lambda: not site.pids())
    assert [["wait"]] == site.noted()
    assert "handler_timeout" not in caplog.text


@pytest.mark.concurrency
def test_stop_ends_a_process_that_loads(site: Site) -> None:
    """It need not be ready first."""
    factory = partial(models.slow, site.record, site.gate.path, site.other.path)
    ub = site.batcher(factory)
    waiting = site.world.spawn(ub.ubatch, "a")
    site.until_noted(["loads"])
    ub.stop(timeout=0.05)
    with pytest.raises(Stopped):
        waiting.result()
    site.world.until(lambda: not site.pids())


@pytest.mark.concurrency
def test_stop_ends_the_pause_before_another_process(site: Site) -> None:
    """Nobody waits for one that is not wanted any more."""
    ub = site.batcher(NAMED + "exiting")
    with pytest.raises(BackendError):
        ub.ubatch(1)
    ub.stop()
    site.world.until(lambda: not executor_of(ub)._keepers)


def use_once(backend: str, record: str, gate: str) -> int:
    """Make one call, stop, and end."""
    from functools import partial
    from typing import Any

    from tests.apps import models
    from ubatch import ProcessExecutor, UBatch

    chosen: Any = backend
    executor = ProcessExecutor(partial(models.says_goodbye, record, gate))
    with UBatch[int, int](8, 0.0, executor=executor, backend=chosen) as ub:
        return ub.ubatch(1)


@once
@pytest.mark.parametrize("backend", ["gevent", "thread"])
def test_a_model_process_may_clean_up(backend: str, tmp_path: Path) -> None:
    """It is given some seconds, also where the program ends at once."""
    record = str(tmp_path / "record")
    with FileGate(tmp_path / "gate") as gate:
        program = Program(use_once, backend, record, gate.path)
        program.wait()
        gate.open()
        deadline = time.monotonic() + 20.0
        while not entries(record):
            assert time.monotonic() < deadline, "it was killed"
            time.sleep(0.01)
        assert 1 == program.end().value


@pytest.mark.concurrency
def test_a_forgotten_batcher_leaves_no_process(world: World) -> None:
    """It need not be stopped."""
    before = children()
    ub: UBatch[int, int] = UBatch(
        8, 0.0, executor=ProcessExecutor(models.echo), backend=world.backend
    )
    assert 1 == ub.start().ubatch(1)
    assert children() - before
    del ub
    world.until(lambda: not children() - before)


@pytest.mark.concurrency
def test_nothing_is_left_of_many_lives_and_deaths(site: Site) -> None:
    """Files, threads and greenlets are as many as before."""
    ub = site.batcher(obey, retry=True)
    this = psutil.Process()

    def live() -> None:
        (pid,) = ub.map([call(os.getpid)])
        os.kill(pid, signal.SIGKILL)
        assert pid != ub.ubatch(call(os.getpid))
        ub.stop()
        site.world.until(lambda: not site.pids())
        ub.start()

    live()
    before = this.num_fds()
    for _ in range(8):
        live()
    site.world.until(lambda: this.num_fds() <= before)


def hang_then_be_killed(backend: str, record: str, gate: str, hang: bool) -> None:
    """Have a model process, and be killed; while a handler runs, or not."""
    import os
    import signal
    from functools import partial

    from tests.apps import models
    from tests.fakes import World
    from ubatch import ProcessExecutor, UBatch

    world = World(backend)
    ub: UBatch[str, str] = UBatch(
        8,
        0.0,
        executor=ProcessExecutor(partial(models.gated, record, gate)),
        backend=backend,  # type: ignore[arg-type]
    ).start()
    ub.ubatch("first")
    if hang:
        world.spawn(ub.ubatch, "wait")
        world.until(lambda: models.entries(record)[1:])
    os.kill(os.getpid(), signal.SIGKILL)


@once
@pytest.mark.concurrency
@pytest.mark.parametrize("hang", [False, True])
def test_a_model_process_does_not_outlive_who_started_it(
    world: World, hang: bool, tmp_path: Path
) -> None:
    """kill -9 of that ends it too, even in a handler."""
    record = str(tmp_path / "record")
    with FileGate(tmp_path / "gate") as gate:
        program = Program(hang_then_be_killed, world.backend, record, gate.path, hang)
        try:
            program._process.wait(30)
            (pid, _), *_ = entries(record)
            world.until(lambda: not psutil.pid_exists(pid))
        finally:
            ended = program.end()
    assert (-signal.SIGKILL, "") == (ended.returncode, ended.stderr)


def exit_with_a_model(backend: str, record: str, gate: str) -> int:
    """End like any program, with a model process that was not stopped."""
    from functools import partial

    from tests.apps import models
    from ubatch import ProcessExecutor, UBatch

    ub: UBatch[str, str] = UBatch(
        8,
        0.0,
        executor=ProcessExecutor(partial(models.gated, record, gate)),
        backend=backend,  # type: ignore[arg-type]
    ).start()
    assert ub.ubatch("first") == "FIRST"
    return models.entries(record)[0][0]


@once
def test_a_program_ends_beside_its_model_process(world: World, tmp_path: Path) -> None:
    """It exits in silence, and at once; no process is left."""
    with FileGate(tmp_path / "gate") as gate:
        path = str(tmp_path / "record")
        program = Program(exit_with_a_model, world.backend, path, gate.path)
        pid = program.end(timeout=20).value
    world.until(lambda: not psutil.pid_exists(pid))


# What stands beside it.


def test_the_decorator_asks_the_model_process(site: Site) -> None:
    """Its function stands for the name and the types; lists are answered as well."""

    @ubatch_decorator(
        8, 0.0, executor=ProcessExecutor(models.keywords), backend=site.world.backend
    )
    def predict(rows: list[int], scale: list[int], mode: list[str]) -> list[Any]:
        raise AssertionError("it is never called")

    assert (1, 2, "m") == predict.ubatch(1, scale=2, mode="m")
    assert [(1, 2, "m"), (3, 4, "n")] == predict([1, 3], [2, 4], mode=["m", "n"])
    assert [] == predict([], [], [])
    with pytest.raises(ValueError):
        predict([1, 2], [3], ["m", "n"])
    assert "predict" in predict.stats().name
    predict.stop()
    site.world.until(lambda: not site.pids())


def test_a_batched_function_can_be_the_handler(site: Site) -> None:
    """A factory may return what is decorated where it is written."""
    ub = site.batcher(NAMED + "decorated")
    assert [2, 4, 6] == ub.map([1, 2, 3])
    assert 1 == len(site.pids())


def test_a_function_can_be_the_handler_of_its_own_batcher(hub: World) -> None:
    """Decorated for a model process, whose factory returns it: it runs there, not in
    the next one, and that in the next one."""
    before = children()
    try:
        squared = models.squared.with_options(deadline=10.0)
        assert [4, 9] == squared.map([2, 3])
        (pid,) = children() - before
        assert [] == psutil.Process(pid).children()
        assert [16] == models.squared([4])
    finally:
        models.squared.stop(timeout=1.0)
    hub.until(lambda: not children() - before)


def test_a_folder_that_is_gone_is_not_looked_into(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may have been started where there is nothing any more."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "gone").rmdir()
    ub = site.batcher(NAMED + "echo")
    assert 1 == ub.ubatch(1)


@pytest.mark.concurrency
def test_the_hub_runs_while_handlers_are_busy(hub: World, tmp_path: Path) -> None:
    """Four slow calls in pure Python are out; greenlets run as if there were none."""
    site = Site(hub, tmp_path)
    ub = site.batcher(partial(models.busy, site.record), max_size=1)
    ub.ubatch(0.0)
    slow = [hub.spawn(ub.ubatch, 0.25) for _ in range(4)]
    site.until_noted([0.25])
    beats, worst, last = 0, 0.0, time.perf_counter()
    while not all(caller.ended for caller in slow):
        gevent.sleep(0.001)
        now = time.perf_counter()
        beats, worst, last = beats + 1, max(worst, now - last), now
    assert beats > 100 and worst < 0.25
    assert [0.25] * 4 == [caller.result() for caller in slow]
    site.end()


@pytest.mark.concurrency
def test_a_process_is_taken_by_one_batch_though_two_see_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many callers, few processes, one of which dies now and then: all have an end."""
    ub = site.batcher(obey, max_size=1, processes=2, retry=True)
    first = ub.ubatch(call(os.getpid))
    callers = [site.world.spawn(ub.ubatch, call(models.same, n)) for n in range(200)]
    os.kill(first, signal.SIGKILL)
    for number, caller in enumerate(callers):
        assert number == caller.result()


def test_callers_are_not_let_before_a_batch_that_waits_for_no_gil(site: Site) -> None:
    """Where batches beside calls are slow, they are: but not for each other's GIL.

    One worker with a random forest in a process answered 1,293 requests/s with 64
    connections while its callers went first, and 1,740 since they do not.
    """
    ub = site.batcher(NAMED + "echo")
    assert 1 == ub.ubatch(1)
    strands = ub._here().strands
    assert strands._observer is not None
    strands._observer._gap, strands._observer._drag = 0.001, 0.01
    assert strands._observer.contended
    assert not strands._callers_first()


@pytest.mark.parametrize("processors, beside", [(1, False), (2, True)])
def test_handlers_overlap_with_callers_where_both_have_processors(
    monkeypatch: pytest.MonkeyPatch, backend: str, processors: int, beside: bool
) -> None:
    """By what calls and what is called: this process, or a server's clients."""
    monkeypatch.setattr(processes, "PROCESSORS", processors)
    made = load(backend)[0]  # type: ignore[arg-type]
    here = ProcessExecutor("a:b").open("here", made, print)
    assert (beside, False) == (here.overlaps, here.far)

    clients = [1]
    executor = ForwardingExecutor("a:b")
    executor.clients = lambda: clients[0]
    there = executor.open("there", made, print)
    assert (beside, True) == (there.overlaps, there.far)
    clients[0] = 2
    assert not there.overlaps
