"""Is a batcher that a model server answers like any other, whatever becomes of that?"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import numpy
import psutil
import pytest

from tests.apps.models import ExitsWhenLoaded, ExitsWhenSent, TooLong
from tests.children import FileGate, Program, not_on_libuv, once, run
from tests.fakes import PATIENCE, GreenletCaller, World
from tests.serving import ModelServer, Raw, Scripted, answer_all, greet, received
from ubatch import (
    BackendError,
    DeadlineExceeded,
    QueueFull,
    RemoteError,
    ServerExecutor,
    Stopped,
    UBatch,
    WorkerLost,
    link,
    remote,
    ubatch_decorator,
)
from ubatch.backends.native import wait_for
from ubatch.calling import read_ask
from ubatch.channel import Channel
from ubatch.memory import SEGMENTS
from ubatch.wire import HEADER, MAGIC, VERSION, Frame, Kind

pytestmark = pytest.mark.server


class Here:
    """A server whose handler waits at a gate for items that say so, and a client."""

    def __init__(
        self, world: World, server: ModelServer, gate: FileGate, ub: UBatch[Any, Any]
    ) -> None:
        self.world = world
        self.server = server
        self.gate = gate
        self.ub = ub

    def hold(self) -> Any:
        """Have the handler wait in a batch of its own; return who asked for that."""
        caller = self.world.spawn(self.ub.ubatch, "hold")
        self.world.until(self.server.handled)
        return caller

    def pending(self, count: int) -> None:
        """Wait until as many calls wait in the server."""
        self.world.until(lambda: self.server.pending() == count)


@contextmanager
def here(
    world: World, home: Path, *options: str, factory: str = "obey", **more: Any
) -> Iterator[Here]:
    with FileGate(home / "gate") as gate, ModelServer(
        home, factory, *options, GATE=gate.path
    ) as server, connect(world, server.address, **more) as ub:
        try:
            yield Here(world, server, gate, ub)
        finally:
            gate.open()  # or a test that fails would hang
        assert not server.noise(), server.log


def connect(world: World, address: str, **options: Any) -> UBatch[Any, Any]:
    return UBatch.connect(address, backend=world.backend, **options)


def row(answer: Any) -> Any:
    """Return what the handler got for one call."""
    return answer["row"]


def refused(call: Callable[[], Any], kind: type[BaseException]) -> Any:
    """Return the error of a call, which is of that very class."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    return caught.value


# What it is for


def test_answers_as_any_other(world: World, tmp_path: Path) -> None:
    """All ways to call, several arguments and names among them."""
    with here(world, tmp_path) as the:
        ub = the.ub
        assert ["a"] == row(ub.ubatch("a"))
        assert ["a", "b", 3] == row(ub.ubatch("a", "b", mode=3))
        assert [7] == row(ub.ubatch(item=7))
        assert ["b"] == row(ub.submit("b").result(timeout=20.0))
        assert [[n] for n in range(100)] == [row(one) for one in ub.map(range(100))]
        assert ["c"] == row(ub.with_options(deadline=20.0).ubatch("c"))
        seen = ub.stats()
        assert (105, 105, 0) == (seen.calls_total, seen.results_total, seen.pending)
        assert "ServerExecutor" == seen.executor
        assert (world.backend, the.server.address) == (seen.backend, ub.name)


def test_arrays_arrive_as_they_are(world: World, tmp_path: Path) -> None:
    """Small ones, which are stacked, large ones, and those that are not contiguous."""
    with here(world, tmp_path) as the:
        arrays = [numpy.random.rand(64) for _ in range(10)]
        arrays += [numpy.random.rand(300, 300)[:, ::2], numpy.zeros((0, 3))]
        arrays += [numpy.arange(500_000)]
        for sent, got in zip(arrays, the.ub.map(arrays)):
            (array,) = row(got)
            assert sent.dtype == array.dtype and numpy.array_equal(sent, array)


def test_the_decorator_too(world: World, tmp_path: Path) -> None:
    """A decorated function has a server answer; called with lists as well."""
    with ModelServer(tmp_path) as server:

        @ubatch_decorator(
            8, 0.01, executor=ServerExecutor(server.address), backend=world.backend
        )
        def predict(items: list[str], mode: Any = None) -> list[Any]:
            raise AssertionError("the function itself is not run")

        assert ["a"] == row(predict.ubatch("a"))
        assert [["a"], ["b"]] == [row(one) for one in predict(["a", "b"])]
        rows = [row(one) for one in predict(["a", "b"], mode=[1, 2])]
        assert [["a", 1], ["b", 2]] == rows
        assert [["c"]] == [row(one) for one in predict.map(["c"])]
        assert "predict" in predict.stats().name
        predict.stop()


@pytest.mark.parametrize(
    ("chosen", "remedy"),
    [
        ({"workers": 3}, "workers=3 .* leave it out, .*'ubatch serve --processes 3'"),
        ({"linger": "full"}, "linger='full' .*'ubatch serve --linger full'"),
        ({"on_error": "isolate"}, "'isolate' .*'ubatch serve --on-error isolate'"),
        ({"handler_timeout": 1}, "=1.0 .*'ubatch serve --handler-timeout 1'"),
    ],
)
def test_what_the_server_decides_is_refused_here(
    chosen: dict[str, Any], remedy: str
) -> None:
    """An option that would be dropped is refused with the way out."""
    executor = ServerExecutor("unix:model.sock")
    with pytest.raises(ValueError, match=remedy):
        UBatch(4, 0.01, executor=executor, **chosen)
    with pytest.raises(ValueError, match=remedy):
        ubatch_decorator(4, 0.01, executor=executor, **chosen)(lambda items: items)
    usual: dict[str, Any] = {"workers": 1, "linger": "adaptive", "on_error": "fail"}
    UBatch(4, 0.01, executor=executor, handler_timeout=None, **usual)


def ask(address: str, backend: str, item: Any) -> Any:
    """Ask a server from a process of one's own."""
    from ubatch import UBatch

    with UBatch.connect(address, backend=backend) as ub:  # type: ignore[arg-type]
        return ub.ubatch(item)


@pytest.mark.concurrency
def test_processes_share_a_batch(world: World, tmp_path: Path) -> None:
    """What two processes ask for at the same time is one batch of the handler."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        callers = [world.spawn(the.ub.ubatch, n) for n in range(3)]
        the.pending(3)
        others = [Program(ask, the.server.address, world.backend, n) for n in (3, 4)]
        the.pending(5)
        the.gate.open()
        answers = [caller.result() for caller in callers]
        answers += [other.end().value for other in others]
        assert [[n] for n in range(5)] == [row(answer) for answer in answers]
        assert {5} == {answer["size"] for answer in answers}
        assert 1 == len({answer["batch"] for answer in answers})
        holder.result()


def test_nothing_is_connected_before_the_first_call(
    world: World, tmp_path: Path
) -> None:
    """Nor need there be a server until then."""
    before = os.listdir("/proc/self/fd")
    ub = connect(world, f"unix:{tmp_path}/run/model.sock")
    assert before == os.listdir("/proc/self/fd")
    seen = ub.stats()
    assert (None, "ServerExecutor") == (seen.backend, seen.executor)
    with ModelServer(tmp_path) as server:
        assert 0 == server.status()["clients"]
        assert ["a"] == row(ub.ubatch("a"))
        assert 1 == server.status()["clients"]
        ub.stop()
        world.until(lambda: server.status()["clients"] == 0)


def test_more_than_one_frame_holds_goes_in_several(
    world: World, tmp_path: Path
) -> None:
    """A batch that is too large for one frame is split; one call that is fails."""
    with here(world, tmp_path, "--max-frame", "100000") as the:
        items = [bytes([n]) * 30_000 for n in range(10)]
        assert [[item] for item in items] == [row(one) for one in the.ub.map(items)]
        found = the.ub.map(["a", bytes(200_000), "b"], return_exceptions=True)
        assert (["a"], ["b"]) == (row(found[0]), row(found[2]))
        assert BackendError is type(found[1]) and "100000 are allowed" in str(found[1])


def test_more_calls_than_a_server_takes_at_once(world: World, tmp_path: Path) -> None:
    """A batcher with a large max_size sends them in several asks."""
    with ModelServer(tmp_path) as server, UBatch[Any, Any](
        1 << 21,
        0.0,
        executor=ServerExecutor(server.address),
        backend=world.backend,
    ) as ub:
        names = {f"n{n}": n for n in range(1023)}
        calls = [ub.submit(n, **names) for n in range(1030)]
        for number, call in enumerate(calls):
            assert [number, 0] == row(call.result(timeout=60.0))[:2]


def test_no_answer_waits_for_those_of_other_calls(world: World, tmp_path: Path) -> None:
    """What was called together may be answered apart; so may what cannot be sent."""
    with here(world, tmp_path, "--max-size", "1", "--processes", "2") as the:
        slow, quick = the.ub.submit("hold"), the.ub.submit("quick")
        unsent = the.ub.submit(lambda: None)
        assert ["quick"] == row(quick.result(timeout=20.0))
        with pytest.raises(TypeError, match="the item cannot be sent"):
            unsent.result(timeout=20.0)
        assert not slow.done()
        the.gate.open()
        assert ["hold"] == row(slow.result(timeout=20.0))


# Errors


def test_errors_are_as_if_they_were_raised_here(world: World, tmp_path: Path) -> None:
    """They keep their class and text, and tell of the traceback."""
    with here(world, tmp_path) as the:
        error = refused(lambda: the.ub.ubatch(["raise", "bad item"]), ValueError)
        assert ("bad item",) == error.args
        assert "in _do" in str(error.__cause__)
        unknown = the.ub.map([["error", 7], "fine"], return_exceptions=True)
        assert ["fine"] == row(unknown[1])
        if type(unknown[0]) is RemoteError:  # or the module was imported here
            assert "tests.apps.served.Mine" == unknown[0].kind
        assert str(unknown[0]).endswith("code 7")


def test_an_error_that_lets_nobody_change_it_arrives(
    world: World, tmp_path: Path
) -> None:
    """As itself, for one call and for a batch; the others are answered."""
    with here(world, tmp_path) as the:
        good, bad, other = the.ub.map(
            ["a", ["too long", 5], "b"], return_exceptions=True
        )
        assert (["a"], TooLong(5), ["b"]) == (row(good), bad, row(other))
        error = refused(lambda: the.ub.ubatch(["raise too long", 6]), TooLong)
        assert 6 == error.limit and "in _do" in str(error.__cause__)
        assert ["c"] == row(the.ub.ubatch("c"))


def test_what_cannot_be_sent_fails_alone(world: World, tmp_path: Path) -> None:
    """An item that no pickle takes, in either direction."""
    with here(world, tmp_path) as the:
        items = ["a", lambda: None, "b", ["odd"], "c"]
        found = the.ub.map(items, return_exceptions=True)
        assert [["a"], ["b"], ["c"]] == [row(found[place]) for place in (0, 2, 4)]
        for place in 1, 3:
            assert TypeError is type(found[place])
            assert "cannot be sent to another process" in str(found[place])


def test_what_exits_when_it_is_sent_fails_alone(world: World, tmp_path: Path) -> None:
    """SystemExit as an item is pickled here, or loaded there, ends nothing."""
    with here(world, tmp_path) as the:
        the.ub.ubatch("a")
        (model,) = the.server.models()
        items = ["a", ExitsWhenSent(), "b", ExitsWhenLoaded(), "c"]
        found = the.ub.map(items, return_exceptions=True)
        assert [["a"], ["b"], ["c"]] == [row(found[place]) for place in (0, 2, 4)]
        assert [TypeError, RemoteError] == [type(found[place]) for place in (1, 3)]
        assert [model] == the.server.models()


class OnlyHere:
    """Is refused by all processes but the one that made it."""

    def __reduce__(self) -> Any:
        return _load, (os.getpid(),)


def _load(pid: int) -> OnlyHere:
    if os.getpid() != pid:
        raise LookupError(f"only for process {pid}")
    return OnlyHere()


def test_what_cannot_be_loaded_fails_alone(world: World, tmp_path: Path) -> None:
    """An item whose class is not to be had in the model process."""
    with here(world, tmp_path) as the:
        items = ["a", OnlyHere(), "b", OnlyHere()]
        found = the.ub.map(items, return_exceptions=True)
        assert (["a"], ["b"]) == (row(found[0]), row(found[2]))
        assert [LookupError] * 2 == [type(found[place]) for place in (1, 3)]
        refused(lambda: the.ub.ubatch(OnlyHere()), LookupError)


def test_too_many_are_refused(world: World, tmp_path: Path) -> None:
    """The server's --max-pending reaches the caller as QueueFull with its figures."""
    with here(world, tmp_path, "--max-pending", "2") as the:
        holder = the.hold()
        waiting = [world.spawn(the.ub.ubatch, n) for n in range(2)]
        the.pending(2)
        error = refused(lambda: the.ub.ubatch("x"), QueueFull)
        assert (2, 2) == (error.pending, error.max_pending) and error.retry_after > 0
        the.gate.open()
        assert [[0], [1]] == [row(caller.result()) for caller in waiting]
        holder.result()


def test_isolate_spares_the_others(world: World, tmp_path: Path) -> None:
    """With --on-error isolate the bad call of a batch fails alone."""
    with here(world, tmp_path, "--on-error", "isolate") as the:
        found = the.ub.map(["a", ["raise", "bad"], "b"], return_exceptions=True)
        assert (["a"], ["b"]) == (row(found[0]), row(found[2]))
        assert ValueError is type(found[1])


def test_a_handler_that_does_not_return_is_killed(world: World, tmp_path: Path) -> None:
    """With --handler-timeout its callers get DeadlineExceeded; the next are served."""
    with here(world, tmp_path, "--handler-timeout", "0.2") as the:
        refused(lambda: the.ub.ubatch("hold"), DeadlineExceeded)
        assert ["next"] == row(the.ub.ubatch("next"))


@pytest.mark.concurrency
def test_a_batch_that_went_in_halves_is_not_run_again(
    world: World, tmp_path: Path
) -> None:
    """What a model process had of it has been run; that it read no more, is no news."""
    full = ["--linger", "full", "--max-size", "2", "--timeout", "60"]
    small = [*full, "--max-frame", "100000"]
    with ModelServer(tmp_path, "obey", *small, largest=100_000) as server, connect(
        world, server.address
    ) as ub:
        items = [["last", bytes(60_000)], ["x", bytes(60_000)]]
        for error in ub.map(items, return_exceptions=True):
            assert WorkerLost is type(error), error
        (ran,) = server.handled()
        assert 1 == len(ran) and "last" in ran[0]


# Deadlines, and callers that leave


@pytest.mark.concurrency
def test_what_has_expired_never_reaches_the_handler(
    world: World, tmp_path: Path
) -> None:
    """The deadline of a call holds here and there."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        soon = the.ub.with_options(deadline=0.05)
        late = world.spawn(the.ub.with_options(deadline=60.0).ubatch, "late")
        refused(lambda: soon.ubatch("soon"), DeadlineExceeded)
        world.until(lambda: the.server.status()["expired_total"] == 1)
        the.gate.open()
        assert ["late"] == row(late.result())
        assert [["'hold'"], ["'late'"]] == the.server.handled()
        holder.result()


@pytest.mark.concurrency
def test_who_is_late_at_the_server_is_counted_as_late(
    world: World, tmp_path: Path
) -> None:
    """It may know a deadline that the client does not, or be the first to notice."""
    with here(world, tmp_path, "--deadline", "0.2") as the:
        refused(lambda: the.ub.ubatch("hold"), DeadlineExceeded)
        seen = the.ub.stats()
        assert (1, 0) == (seen.expired_total, seen.failures_total)


def test_the_time_it_takes_to_connect_counts(world: World, tmp_path: Path) -> None:
    """A call whose deadline passes before there is a server is never run."""
    ub = connect(world, f"unix:{tmp_path}/run/model.sock")
    callers = [
        world.spawn(ub.with_options(deadline=seconds).ubatch, seconds)
        for seconds in (0.1, 60.0)
    ]
    refused(callers[0].result, DeadlineExceeded)
    with ModelServer(tmp_path) as server:
        assert [60.0] == row(callers[1].result())
        assert [["60.0"]] == server.handled()
        ub.stop()


@pytest.mark.concurrency
def test_a_caller_that_leaves_is_not_worked_for(world: World, tmp_path: Path) -> None:
    """A cancelled future, or a caller that is killed: its call is not run."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        calls = [the.ub.submit(n) for n in range(3)]
        the.pending(3)
        # Here, all of them run; a server may still be told that nobody waits.
        stays = world.spawn(the.ub.ubatch, "stays")
        the.pending(4)
        if world.is_gevent:
            killed = GreenletCaller(the.ub.ubatch, "killed")
            left = GreenletCaller(_leave_after, the.ub, "left")
            the.pending(6)
            killed.greenlet.kill()
            left.join()
            the.pending(4)
        the.gate.open()
        assert [[0], [1], [2]] == [row(call.result(timeout=20.0)) for call in calls]
        assert ["stays"] == row(stays.result())
        holder.result()
        handled = [item for batch in the.server.handled() for item in batch]
        assert ["'hold'", "0", "1", "2", "'stays'"] == handled


def _leave_after(ub: UBatch[Any, Any], item: Any) -> None:
    with gevent.Timeout(0.05, False):
        ub.ubatch(item)


@pytest.mark.concurrency
def test_who_leaves_while_it_connects_is_not_worked_for(
    hub: World, tmp_path: Path
) -> None:
    """A call that was given up before there was a server is not sent."""
    ub = connect(hub, f"unix:{tmp_path}/run/model.sock")
    killed = GreenletCaller(ub.ubatch, "killed")
    stays = GreenletCaller(ub.ubatch, "stays")
    hub.until(lambda: ub.stats().running == 2)
    killed.greenlet.kill()
    with ModelServer(tmp_path) as server:
        assert ["stays"] == row(stays.result())
        assert [["'stays'"]] == server.handled()
        ub.stop()


@pytest.mark.concurrency
def test_a_killed_client_is_not_worked_for(world: World, tmp_path: Path) -> None:
    """kill -9 of a process that waits: its calls are dropped, and nobody else's."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        mine = world.spawn(the.ub.ubatch, "mine")
        the.pending(1)
        other = Program(ask, the.server.address, world.backend, "other")
        the.pending(2)
        os.kill(other._process.pid, signal.SIGKILL)
        the.pending(1)
        other.end()
        the.gate.open()
        assert ["mine"] == row(mine.result())
        assert [["'hold'"], ["'mine'"]] == the.server.handled()
        holder.result()


def leave_a_child(address: str) -> None:
    """Ask, with a child that has this process's files, and lives on."""
    import os
    import time

    from ubatch import UBatch

    ub = UBatch.connect(address, backend="thread")
    calls = [ub.submit("first")]
    while ub._here()._executor._link is None:
        time.sleep(0.001)
    if not os.fork():
        time.sleep(600.0)
        os._exit(0)
    calls += [ub.submit("second"), ub.submit("third")]
    for call in calls:
        call.result()


@pytest.mark.concurrency
def test_a_killed_client_is_not_worked_for_on_behalf_of_its_child(
    world: World, tmp_path: Path
) -> None:
    """A child has the client's socket, too; the server sees the client's end."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        other = Program(leave_a_child, the.server.address)
        try:
            the.pending(3)
            os.kill(other._process.pid, signal.SIGKILL)
            the.pending(0)
            assert 1 == the.server.status()["clients"]
        finally:
            os.killpg(other._process.pid, signal.SIGKILL)  # there is one: the child
            other.end()
        the.gate.open()
        assert ["hold"] == row(holder.result())
        assert [["'hold'"]] == the.server.handled()


# What may be lost


@pytest.mark.concurrency
def test_a_killed_model_is_a_loss_of_what_it_had(world: World, tmp_path: Path) -> None:
    """kill -9 of the model process: WorkerLost for its batch, within a second."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        waits = world.spawn(the.ub.ubatch, "waits")
        the.pending(1)
        (model,) = the.server.models()
        began = time.monotonic()
        os.kill(model, signal.SIGKILL)
        error = refused(holder.result, WorkerLost)
        assert time.monotonic() - began < 1.0
        assert f"the model process {model} was killed by SIGKILL" in str(error)
        assert ["waits"] == row(waits.result())
        assert (after := the.server.models()) and model not in after
        lost = [line for line in the.server.lines("ERROR") if "starting" in line]
        assert 1 == len(lost) and "was killed by SIGKILL" in lost[0]


@pytest.mark.concurrency
def test_the_server_may_run_it_again(world: World, tmp_path: Path) -> None:
    """With --retry what a lost process had is run once more, and not twice."""
    with here(world, tmp_path, "--retry") as the:
        dies = ["die once", str(tmp_path / "died")]
        assert [dies] == row(the.ub.ubatch(dies))
        assert 2 == len(the.server.handled())
        error = refused(lambda: the.ub.ubatch("die"), WorkerLost)
        assert "SIGKILL" in str(error)
        assert 4 == len(the.server.handled())


@pytest.mark.concurrency
def test_a_killed_server_is_a_loss_of_what_it_had(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """kill -9 of the server: WorkerLost for what it had; then one finds another."""
    told = f"has lost the model server at {tmp_path}"
    with here(world, tmp_path) as the:
        holder = the.hold()
        waits = world.spawn(the.ub.ubatch, "waits")
        the.pending(1)
        began = time.monotonic()
        the.server.signal(signal.SIGKILL)
        for caller in holder, waits:
            error = refused(caller.result, WorkerLost)
            assert "the model server is gone and had this call" in str(error)
        assert time.monotonic() - began < 1.0
        the.server.end()
        later = world.spawn(the.ub.ubatch, "later")
        with ModelServer(tmp_path) as other:
            assert ["later"] == row(later.result())
            assert [["'hold'"], ["'later'"]] == other.handled()
            the.ub.stop()  # which is no loss
    assert 1 == caplog.text.count(told)


@pytest.mark.concurrency
def test_calls_are_asked_again_once(world: World, tmp_path: Path) -> None:
    """With retry=True what a lost server had is asked of the next one; and no more."""
    with here(world, tmp_path, retry=True) as the:
        holder = the.hold()
        the.server.signal(signal.SIGKILL)
        the.server.end()
        with ModelServer(tmp_path, GATE=the.gate.path) as second:
            world.until(lambda: len(second.handled()) == 2)
            second.signal(signal.SIGKILL)
            refused(holder.result, WorkerLost)
        assert [["'hold'"]] * 2 == the.server.handled()


def test_without_a_server_calls_wait_some_seconds(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then they get WorkerLost with the remedy, and later ones at once."""
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    with connect(world, f"unix:{tmp_path}/run/model.sock") as ub:
        began = time.monotonic()
        callers = [world.spawn(ub.ubatch, n) for n in range(5)]
        for caller in callers:
            error = refused(caller.result, WorkerLost)
            assert "is 'ubatch serve FACTORY --socket" in str(error)
        assert 0.5 < time.monotonic() - began < 2.0
        began = time.monotonic()
        for _ in range(20):
            refused(lambda: ub.ubatch("x"), WorkerLost)
        assert time.monotonic() - began < 0.5
        with ModelServer(tmp_path):
            assert ["back"] == row(ub.ubatch("back"))


class Door:
    """Counts who comes to the door of a batcher's connection."""

    def __init__(self, ub: UBatch[Any, Any]) -> None:
        self.came = 0
        remote: Any = ub._here()._executor
        self._mutex, remote._door = remote._door, self

    def __enter__(self) -> None:
        self.came += 1
        self._mutex.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._mutex.__exit__(*error)


@pytest.mark.concurrency
def test_a_frozen_server_keeps_nobody_longer_than_none(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be connected to, and does not answer: all callers wait together."""
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    with ModelServer(tmp_path) as server, connect(world, server.address) as ub:
        server.signal(signal.SIGSTOP)
        began = time.monotonic()
        callers = _apart(world, ub, 20)
        for caller in callers:
            error = refused(caller.result, WorkerLost)
            assert f"no model server answers at {server.path}" in str(error)
        assert 0.4 < time.monotonic() - began < 3.0
        began = time.monotonic()
        for _ in range(3):
            refused(lambda: ub.ubatch("x"), WorkerLost)
        assert time.monotonic() - began < 2.0
        server.signal(signal.SIGCONT)
        world.until(lambda: _answers(ub))


def _apart(world: World, ub: UBatch[Any, Any], count: int) -> list[Any]:
    """Have callers ask, each in a batch of its own."""
    callers: list[Any] = []
    while len(callers) < count:
        callers.append(world.spawn(ub.ubatch, len(callers)))
        world.until(lambda: ub.stats().running == len(callers))
    return callers


def _answers(ub: UBatch[Any, Any]) -> bool:
    try:
        return bool(ub.ubatch("back"))
    except WorkerLost:
        return False


@pytest.mark.concurrency
def test_all_who_wait_to_be_connected_share_a_refusal(
    world: World, tmp_path: Path
) -> None:
    """A server that refuses one, after a while, is not asked by each of the others."""
    refuse = world.gate()

    def script(channel: Channel) -> None:
        channel.receive(20.0)
        refuse.wait()
        channel.send(Kind.REFUSE, 0, "not today")

    with Scripted(tmp_path, script) as server, connect(world, server.address) as ub:
        door = Door(ub)
        callers = _apart(world, ub, 5)
        world.until(lambda: door.came == 5 and server.clients == 1)
        refuse.open()
        for caller in callers:
            assert "not today" in str(refused(caller.result, BackendError))
        assert 1 == server.clients
        assert "not today" in str(refused(lambda: ub.ubatch("x"), BackendError))
        assert 2 == server.clients


def _stuck(world: World, server: ModelServer, ub: UBatch[Any, Any]) -> list[Any]:
    """Ask a frozen server for more than its socket takes; return the futures."""
    assert [0] == row(ub.ubatch(0))
    server.signal(signal.SIGSTOP)
    calls = []
    while len(calls) < 12:
        calls.append(ub.submit(bytes(100_000)))
        world.until(lambda: ub.stats().running == len(calls))  # each in its own ask
    world.until(remote_link(ub)._turnstile.locked)
    return calls


@pytest.mark.concurrency
def test_a_server_that_takes_nothing_is_lost(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends does not wait for a frozen server for ever."""
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    monkeypatch.setattr(link, "STALLED", 0.3, raising=False)
    with ModelServer(tmp_path) as server, connect(world, server.address) as ub:
        errors = [call.exception(timeout=10.0) for call in _stuck(world, server, ub)]
        assert {WorkerLost} == {type(error) for error in errors}
        assert "taken nothing for 0.3 s and had this call" in str(errors[0])
        server.signal(signal.SIGCONT)
        world.until(lambda: _answers(ub))


@pytest.mark.concurrency
def test_stop_leaves_nobody_at_a_frozen_server(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When stop() has lost patience, whoever sends to it, or waits for it, ends."""
    monkeypatch.setattr(link, "STALLED", 600.0, raising=False)
    with ModelServer(tmp_path) as server:
        ub = connect(world, server.address)
        calls = _stuck(world, server, ub)
        collector = ub._here()
        ub.stop(timeout=0.01)
        for call in calls:
            error = refused(lambda: call.result(timeout=20.0), Stopped)
            assert "stop(timeout) ended before this call was answered" in str(error)
        world.until(lambda: collector.ended)
        assert "stopped; start() it again" in str(
            refused(lambda: ub.submit(1), Stopped)
        )


@pytest.mark.concurrency
def test_stop_leaves_nobody_who_greets_a_frozen_server(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that is not yet connected."""
    monkeypatch.setattr(remote, "PATIENCE", 600.0)
    with ModelServer(tmp_path) as server:
        ub = connect(world, server.address)
        server.signal(signal.SIGSTOP)
        call = ub.submit(1)
        collector: Any = ub._here()
        world.until(lambda: collector._executor._links)
        ub.stop(timeout=0.01)
        refused(lambda: call.result(timeout=20.0), Stopped)
        world.until(lambda: collector.ended)


@pytest.mark.concurrency
def test_who_leaves_a_frozen_server_keeps_no_callback_waiting(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To tell it that nobody waits may take long; a thread runs all callbacks."""
    monkeypatch.setattr(link, "STALLED", 600.0, raising=False)
    called: list[Any] = []
    with ModelServer(tmp_path) as server:
        ub = connect(world, server.address)
        first = _stuck(world, server, ub)[0]
        collector, batch = ub._here(), first._batch
        with collector.lock:  # as of a thread that a signal interrupts
            batch.gone.add(first)
            collector.endings.leave(batch, first)
        late = ub.with_options(deadline=0.05).submit("late")
        late.add_done_callback(called.append)
        world.until(lambda: called)
        ub.stop(timeout=0.01)
        world.until(lambda: collector.ended)


def test_that_there_is_no_server_is_told_of_at_once(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once for as long as there is none, though no caller waits to hear of it."""
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    monkeypatch.chdir(tmp_path)
    wanted = f"no model server answers at {tmp_path}/run/model.sock ("

    def told() -> list[str]:
        found = [one.getMessage() for one in caplog.records if one.levelname[0] == "W"]
        return [message for message in found if wanted in message]

    with connect(world, "unix:run/model.sock", name="mine") as ub:
        soon = ub.with_options(deadline=0.1)
        refused(lambda: soon.ubatch("x"), DeadlineExceeded)
        (message,) = told()
        assert message.startswith(f"mine: {wanted}[Errno 2]")
        assert message.endswith("; calls wait up to 0.5 s for it")
        for _ in range(3):
            assert wanted in str(refused(lambda: ub.ubatch("x"), WorkerLost))
        assert 1 == len(told())
        for count in 1, 2:
            assert count == len(told())
            with ModelServer(tmp_path) as server:
                assert ["a"] == row(ub.ubatch("a"))
            lost = remote_link(ub)
            world.until(lambda: not lost.alive)
            refused(lambda: ub.ubatch("x"), WorkerLost)
            world.until(lambda: len(told()) == count + 1)
        assert server.ended


def remote_link(ub: UBatch[Any, Any]) -> Any:
    executor: Any = ub._here()._executor
    return executor._link


def denied(address: str) -> list[str]:
    """Ask a server whose folder this user may not enter."""
    import logging
    import os
    from logging.handlers import BufferingHandler

    from ubatch import UBatch, WorkerLost, remote

    remote.PATIENCE = 0.1
    told = BufferingHandler(100)
    logging.getLogger("ubatch").addHandler(told)
    if not os.geteuid():
        os.seteuid(65534)
    with UBatch.connect(address, backend="thread") as ub:
        try:
            ub.ubatch("x")
        except WorkerLost as error:
            found = [str(error)]
    found += [one.getMessage() for one in told.buffer if one.levelname == "WARNING"]
    return found


@once
def test_a_socket_that_is_out_of_reach_is_told_from_none(tmp_path: Path) -> None:
    """To start a server would not help there."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0)
    try:
        seen = run(denied, f"unix:{folder}/model.sock")
    finally:
        folder.chmod(0o700)
    assert 2 == len(seen)
    for line in seen:
        assert f"the socket {folder}/model.sock cannot be reached by this user" in line
        assert "Permission denied" in line and "is 'ubatch serve" not in line


@pytest.mark.concurrency
def test_one_loss_of_many_asks_is_one_retry_of_each(
    world: World, tmp_path: Path
) -> None:
    """Calls that go alone, since one of them cannot be sent, are retried as well."""
    with here(world, tmp_path, "--processes", "1", retry=True) as the:
        holder = the.hold()
        calls = [world.spawn(_map, the.ub, ["a", _Odd(), "b"])]
        the.pending(2)
        the.server.signal(signal.SIGKILL)
        the.server.end()
        the.gate.open()
        with ModelServer(tmp_path, GATE=the.gate.path):
            found = calls[0].result()
            assert (["a"], ["b"]) == (row(found[0]), row(found[2]))
            assert ["hold"] == row(holder.result())


class _Odd:
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("not this one")


def _map(ub: UBatch[Any, Any], items: list[Any]) -> list[Any]:
    return ub.map(items, return_exceptions=True)


# Servers that come and go


class Load:
    """Callers that ask on and on, until they are told to stop."""

    def __init__(self, world: World, ub: UBatch[Any, Any], callers: int = 8) -> None:
        self.answers = 0
        self.versions: set[Any] = set()
        self._ub = ub
        self._on = True
        self._callers = [world.spawn(self._run, number) for number in range(callers)]

    def _run(self, number: int) -> None:
        turn = 0
        while self._on:
            item = [number, turn]
            answer = self._ub.ubatch(item)
            assert item == answer.get("item", answer.get("row", [None])[0])
            self.versions.add(answer.get("version"))
            self.answers += 1
            turn += 1

    def more(self, world: World, count: int = 50) -> None:
        """Wait for more answers."""
        wanted = self.answers + count
        world.until(lambda: self.answers >= wanted or self.failed())
        assert not self.failed(), self.failed()

    def failed(self) -> list[BaseException]:
        return [one.error for one in self._callers if one.error is not None]

    def end(self) -> None:
        self._on = False
        for caller in self._callers:
            caller.result()


@contextmanager
def load(world: World, ub: UBatch[Any, Any]) -> Iterator[Load]:
    made = Load(world, ub)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.concurrency
def test_a_restart_under_load_fails_no_call(world: World, tmp_path: Path) -> None:
    """SIGTERM to the old server, and a new one as soon as the path is free."""
    server = ModelServer(tmp_path)
    server.__enter__()
    try:
        with connect(world, server.address) as ub, load(world, ub) as calls:
            for _ in range(5):
                calls.more(world)
                server.signal(signal.SIGTERM)
                world.until(lambda: not os.path.exists(server.path))
                old, server = server, ModelServer(tmp_path)
                world.until(lambda: old.ended)
                assert 0 == old.end()
                old.__exit__(None, None, None)
                assert not old.noise() and "calls that got Stopped: 0" in old.log
                server.until(lambda: "serves" in server.log)
            calls.more(world)
    finally:
        server.__exit__(None, None, None)


@pytest.mark.concurrency
def test_term_drains_what_was_accepted(world: World, tmp_path: Path) -> None:
    """All calls that a server had are answered by it; it ends with 0."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        waiting = [world.spawn(the.ub.ubatch, n) for n in range(20)]
        the.pending(20)
        the.server.signal(signal.SIGTERM)
        world.until(lambda: not os.path.exists(the.server.path))
        world.until(lambda: "ends, once" in the.server.log)
        assert not any(caller.ended for caller in waiting)
        the.gate.open()
        assert [[n] for n in range(20)] == [row(one.result()) for one in waiting]
        assert ["hold"] == row(holder.result())
        assert 0 == the.server.end()
        assert "calls that got Stopped: 0" in the.server.log


@pytest.mark.concurrency
def test_term_waits_no_longer_than_its_grace(world: World, tmp_path: Path) -> None:
    """What is not answered by then gets Stopped."""
    with here(world, tmp_path, "--grace", "0.1") as the:
        holder = the.hold()
        waits = world.spawn(the.ub.ubatch, "waits")
        the.pending(1)
        the.server.signal(signal.SIGTERM)
        for caller in holder, waits:
            refused(caller.result, Stopped)
        assert 0 == the.server.end()
        assert "calls that got Stopped: 2" in the.server.log


@pytest.mark.concurrency
def test_a_reload_under_load_fails_no_call(world: World, tmp_path: Path) -> None:
    """SIGHUP: the new model is loaded, takes over, and the old one is let go."""
    version = tmp_path / "version"
    version.write_text("1")
    with ModelServer(tmp_path, "versioned", VERSION=str(version)) as server, connect(
        world, server.address
    ) as ub, load(world, ub) as calls:
        calls.more(world)
        for new in "2", "3", "4":
            version.write_text(new)
            server.signal(signal.SIGHUP)
            world.until(lambda: new in calls.versions or calls.failed())
            calls.more(world)
            world.until(lambda: len(server.models()) == 1)
        assert {"1", "2", "3", "4"} == calls.versions
        version.write_text("broken")
        server.signal(signal.SIGHUP)
        world.until(lambda: "the one that is there goes on" in server.log)
        assert "this version is broken" in server.log
        calls.more(world)
        assert "4" == ub.ubatch("x")["version"] and 1 == len(server.models())
        version.write_text("5")
        server.signal(signal.SIGHUP)
        world.until(lambda: "5" in calls.versions or calls.failed())
        assert 5 == server.log.count(": reloads ")
        assert not server.noise()


@pytest.mark.concurrency
def test_reloads_that_overlap_leave_one_model(world: World, tmp_path: Path) -> None:
    """However often it is told to reload, there are as many processes as before."""
    version = tmp_path / "version"
    version.write_text("1")
    with ModelServer(tmp_path, "versioned", VERSION=str(version)) as server, connect(
        world, server.address
    ) as ub:
        assert "1" == ub.ubatch("x")["version"]
        for new in "2", "3", "4":
            version.write_text(new)
            server.signal(signal.SIGHUP)
            wanted = int(new) - 1
            world.until(lambda: server.log.count(": reloads ") == wanted)
        world.until(lambda: ub.ubatch("x")["version"] == "4")
        world.until(lambda: len(_children(server.pid)) == 1)
        time.sleep(0.3)  # none is still to come
        assert 1 == len(_children(server.pid)) == len(server.models())
        assert "4" == ub.ubatch("x")["version"]
        assert not server.noise()


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def test_calls_wait_while_a_model_loads(world: World, tmp_path: Path) -> None:
    """Within their deadlines."""
    with FileGate(tmp_path / "loading") as loading, ModelServer(
        tmp_path, LOADING=loading.path
    ) as server, connect(world, server.address) as ub:
        waits = world.spawn(ub.ubatch, "waits")
        refused(lambda: ub.with_options(deadline=0.1).ubatch("x"), DeadlineExceeded)
        world.until(lambda: server.pending() == 1)
        assert not server.models()
        loading.open()
        assert ["waits"] == row(waits.result())
        assert [["'waits'"]] == server.handled()


def test_a_factory_that_fails_is_told_of(world: World, tmp_path: Path) -> None:
    """Callers get its error's text at once; it is tried again and logged each time."""
    with ModelServer(tmp_path, "broken") as server, connect(
        world, server.address
    ) as ub:
        began = time.monotonic()
        for _ in range(3):
            error = refused(lambda: ub.ubatch("x"), BackendError)
            assert "the factory failed: LookupError: no such model" in str(error)
        assert time.monotonic() - began < 2.0
        world.until(lambda: len(server.lines("ERROR")) >= 2)
        assert all("no such model" in line for line in server.lines("ERROR"))
        assert not server.noise()


@pytest.mark.timing
def test_a_loss_is_told_of_at_once(world: World, tmp_path: Path) -> None:
    """100 callers of a killed server hear of it within a second."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        waiting = [world.spawn(the.ub.ubatch, n) for n in range(100)]
        the.pending(100)
        began = time.monotonic()
        the.server.signal(signal.SIGKILL)
        for caller in (holder, *waiting):
            refused(caller.result, WorkerLost)
        assert time.monotonic() - began < 1.0


# Servers that make no sense


def test_another_version_is_refused(world: World, tmp_path: Path) -> None:
    """Its client says so at once, and what to do."""

    def script(channel: Channel) -> None:
        channel._sock.send(HEADER.pack(MAGIC, VERSION + 1, Kind.HELLO, 1, 0, 2))
        channel.receive(20.0)

    with Scripted(tmp_path, script) as server, connect(world, server.address) as ub:
        error = refused(lambda: ub.ubatch("x"), BackendError)
        assert f"speaks version {VERSION + 1}" in str(error)
        assert "install the same ubatch on both sides" in str(error)


def test_a_server_may_refuse(world: World, tmp_path: Path) -> None:
    """Its reason reaches the caller at once."""

    def script(channel: Channel) -> None:
        channel.receive(20.0)
        channel.send(Kind.REFUSE, 0, "not today")

    with Scripted(tmp_path, script) as server, connect(world, server.address) as ub:
        assert "not today" in str(refused(lambda: ub.ubatch("x"), BackendError))


@pytest.mark.parametrize("what", ["noise", "no head", "no parts", "odd", "hangs up"])
def test_a_server_that_makes_no_sense_is_lost(
    what: str, world: World, tmp_path: Path
) -> None:
    """Whatever it says in place of answers, its callers get WorkerLost."""

    def script(channel: Channel) -> None:
        greet(channel)
        asked = channel.receive(20.0)
        if what == "noise" and asked is not None:
            channel._sock.send(b"x" * 1000)
        elif what == "no head" and asked is not None:
            channel.send(Kind.ANSWERS, asked.ident, 7)
        elif what == "no parts" and asked is not None:
            channel.send(Kind.ANSWERS, asked.ident, [[0], [0], 5, False])
        elif what == "odd" and asked is not None:
            channel.send(Kind.ANSWERS, asked.ident, [["a"], {}, "b"], [b"x"])
        if asked is not None and what != "hangs up":
            channel.receive(20.0)

    with Scripted(tmp_path, script) as server, connect(world, server.address) as ub:
        for _ in range(2):
            refused(lambda: ub.ubatch("x"), WorkerLost)


def test_a_greeting_that_makes_no_sense(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who says hello in another way is no model server."""
    monkeypatch.setattr(remote, "PATIENCE", 0.2)

    def script(channel: Channel) -> None:
        channel.receive(20.0)
        channel.send(Kind.HELLO, 0, ["hello"])

    with Scripted(tmp_path, script) as server, connect(world, server.address) as ub:
        for _ in range(2):
            refused(lambda: ub.ubatch("x"), WorkerLost)


@pytest.mark.concurrency
def test_half_an_ask_is_asked_again(world: World, tmp_path: Path) -> None:
    """A server that is gone before it has all of an ask has run none of it."""
    taken: list[Frame] = []

    def script(channel: Channel) -> None:
        greet(channel)
        if server.clients == 1:  # that keeps all memory there is; the rest is sent
            while len(taken) < SEGMENTS:
                asked = channel.receive(20.0)
                assert asked is not None
                taken.append(asked)
            wait_for(channel._fd)
            channel._sock.recv(1000)
            return
        while (asked := channel.receive(20.0)) is not None:
            answer_all(channel, asked)
            del asked

    with Scripted(tmp_path, script) as server, connect(world, server.address) as ub:
        lost = []
        for number in range(SEGMENTS):
            lost.append(world.spawn(ub.ubatch, bytes(2_000_000)))
            world.until(lambda: len(taken) == number + 1)
        items = [bytes([n]) * 2_000_000 for n in range(3)]
        assert [0, 1, 2] == [found[0] for found in ub.map(items)]
        assert 2 == server.clients
        for caller in lost:
            refused(caller.result, WorkerLost)


def test_numbers_begin_anew(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that lives for ever does not run out of numbers for its asks."""
    monkeypatch.setattr(link, "NUMBERS", 4)
    with here(world, tmp_path) as the:
        holder = the.hold()  # number 1
        the.gate.open()
        for number in range(10):
            assert [number] == row(the.ub.ubatch(number))
        holder.result()
    assert link.NUMBERS == 4


def test_an_ask_that_was_answered_takes_no_memory(world: World, tmp_path: Path) -> None:
    """A connection that lives for ever does not keep the numbers of its asks."""
    only = [tracemalloc.Filter(True, link.__file__)]
    with here(world, tmp_path) as the:
        the.gate.open()
        for number in range(500):
            assert [number] == row(the.ub.ubatch(number))
            if number == 100:
                tracemalloc.start()
        try:
            left = tracemalloc.take_snapshot().filter_traces(only)
        finally:
            tracemalloc.stop()
    assert sum(trace.size for trace in left.traces) < 4000


# Lives


@pytest.mark.concurrency
def test_stop_and_start_again(world: World, tmp_path: Path) -> None:
    """stop() waits for what was asked, and ends the connection; start() makes one."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        stops = world.spawn(the.ub.stop)
        world.until(lambda: the.ub._life.closed)
        refused(lambda: the.ub.ubatch("x"), Stopped)
        assert not stops.ended
        the.gate.open()
        stops.result()
        assert ["hold"] == row(holder.result())
        world.until(lambda: the.server.status()["clients"] == 0)
        the.ub.start()
        assert ["again"] == row(the.ub.ubatch("again"))
        assert 1 == the.server.status()["clients"]


@pytest.mark.concurrency
def test_stop_does_not_wait_longer_than_it_is_told(
    world: World, tmp_path: Path
) -> None:
    """What the server still has gets Stopped, and is taken back there."""
    with here(world, tmp_path) as the:
        holder = the.hold()
        waits = world.spawn(the.ub.ubatch, "waits")
        the.pending(1)
        the.ub.stop(timeout=0.05)
        for caller in holder, waits:
            refused(caller.result, Stopped)
        world.until(lambda: the.server.status()["clients"] == 0)
        assert 0 == the.server.pending()


def test_a_forgotten_batcher_hangs_up(world: World, tmp_path: Path) -> None:
    """A batcher that is garbage leaves no connection, greenlet or thread behind."""
    with ModelServer(tmp_path) as server:
        for _ in range(3):
            ub = connect(world, server.address)
            assert ["a"] == row(ub.ubatch("a"))
            del ub
            gc.collect()
        world.until(lambda: server.status()["clients"] == 0)


def test_nothing_leaks(world: World, tmp_path: Path) -> None:
    """Many connections, cut off on both sides, leave no file behind on either."""
    with ModelServer(tmp_path) as server:

        def use() -> None:
            with connect(world, server.address) as ub:
                assert 10 == len(ub.map(range(10)))
                array = numpy.zeros(100_000)  # in shared memory
                assert array.shape == row(ub.ubatch(array))[0].shape
            with Raw(server.path) as raw:
                raw.hello()
                raw.ask(1, ["a"])
            with Raw(server.path) as raw:
                raw.throw(b"garbage" * 10)

        use()
        world.until(lambda: server.status()["clients"] == 0)
        gc.collect()
        world.until(lambda: server.models())

        def counts() -> list[int]:
            return [_files(), _files(server.pid), _threads(server.pid)]

        before = counts()
        for _ in range(10):
            use()
        gc.collect()
        world.until(lambda: server.models())
        # One connection may just be being closed: a socket, and the client's pidfd.
        world.until(lambda: all(new <= old + 2 for old, new in zip(before, counts())))
        assert not server.noise()


def _files(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def forked(leg: str, address: str, gate: str) -> dict[str, Any]:
    """Fork with a call under way; tell what became of that, and of the child's own."""
    import os
    import time

    from tests.apps.inside import tell_gevent, world_of

    world = world_of(leg)
    import gevent

    from ubatch import UBatch

    ub = UBatch.connect(address, backend=world.backend).start()
    pid = ub.ubatch("first")["pid"]
    held = world.spawn(ub.ubatch, "hold")
    waits = world.spawn(ub.ubatch, "waits")
    world.until(lambda: ub.stats().running == 2)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            tell_gevent()
            # Copies of greenlets run on here, and see what comes for the parent.
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                (gevent if world.is_gevent else time).sleep(0.01)
            os.read(read, 1)
            answer = ub.ubatch("child")
            assert answer["row"] == ["child"] and answer["pid"] == pid
            ub.stop()
            status = 0
        finally:
            os._exit(status)
    gate_fd = os.open(gate, os.O_RDWR)
    found = [held.result()["row"], waits.result()["row"]]
    found.append(ub.ubatch("after")["row"])
    os.write(write, b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.append(ub.ubatch("last")["row"])
    ub.stop()
    os.close(gate_fd)
    return {"found": found, "child": status}


@pytest.mark.concurrency
@once
@pytest.mark.parametrize("leg", ["thread", "gevent", "patched"])
def test_a_fork_harms_neither_side(leg: str, tmp_path: Path) -> None:
    """The parent has its answers on its connection; the child makes its own."""
    with FileGate(tmp_path / "gate") as gate, ModelServer(
        tmp_path, GATE=gate.path
    ) as server:
        seen = run(forked, leg, server.address, gate.path)
        assert {
            "found": [["hold"], ["waits"], ["after"], ["last"]],
            "child": 0,
        } == seen
        handled = [item for batch in server.handled() for item in batch]
        expected = ["first", "hold", "waits", "after", "child", "last"]
        assert sorted(map(repr, expected)) == sorted(handled)
        assert not server.noise()


def gaps(leg: str, address: str, gate: str) -> float:
    """Return the longest time in ms that the hub did not run, beside slow calls.

    The shortest of some, since all of the machine may be busy with something else.
    """
    import os
    from time import perf_counter

    from tests.apps.inside import world_of

    world = world_of(leg)
    import gevent
    import numpy

    from ubatch import UBatch

    with UBatch.connect(address, backend="gevent") as ub:
        ub.map([numpy.zeros(64)] * 16)

        def worst() -> float:
            found, before = 0.0, perf_counter()
            for _ in range(100):
                gevent.sleep(0.001)
                now = perf_counter()
                found, before = max(found, now - before), now
            return found * 1000

        callers = [gevent.spawn(ub.ubatch, "hold") for _ in range(4)]
        world.until(lambda: ub.stats().running == 4)
        found = min(worst() for _ in range(10))
        os.open(gate, os.O_RDWR)
        gevent.joinall(callers, raise_error=True)
    return found


@once
@pytest.mark.timing
@pytest.mark.parametrize("leg", ["gevent", "patched"])
def test_the_hub_runs_while_calls_are_out(leg: str, tmp_path: Path) -> None:
    """It never stands still for 10 ms, while 4 calls are in the server."""
    with FileGate(tmp_path / "gate") as gate, ModelServer(
        tmp_path, GATE=gate.path
    ) as server:
        assert run(gaps, leg, server.address, gate.path) < 10.0


def alone(leg: str, address: str, gate: str) -> dict[str, Any]:
    """Ask where nothing else keeps the loop from running empty, and let it."""
    import os

    from tests.apps.inside import world_of
    from tests.fakes import NativeCaller

    world_of(leg)
    import gevent

    from ubatch import UBatch

    ub = UBatch.connect(address, backend="gevent")
    found = [ub.ubatch("first")["row"]]

    def let_go() -> None:
        while ub.stats().running < 1:
            pass
        os.open(gate, os.O_RDWR)

    opener = NativeCaller(let_go)
    found.append(ub.ubatch("hold")["row"])
    opener.result()
    emptied = gevent.wait(timeout=20.0)
    found.append(ub.ubatch("last")["row"])
    return {"found": found, "emptied": emptied}


@once
@not_on_libuv("gevent keeps the loop for whoever waits for a file, asked or not")
@pytest.mark.concurrency
@pytest.mark.parametrize("leg", ["gevent", "patched"])
def test_a_connection_keeps_no_loop_from_running_empty(
    leg: str, tmp_path: Path
) -> None:
    """But for while an answer is to come; and it is there afterwards."""
    with FileGate(tmp_path / "gate") as gate, ModelServer(
        tmp_path, GATE=gate.path
    ) as server:
        seen = run(alone, leg, server.address, gate.path)
        assert {"found": [["first"], ["hold"], ["last"]], "emptied": True} == seen


def test_what_is_logged(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line where it matters: connected here; start, ready, loss and end there."""
    caplog.set_level(logging.INFO, "ubatch")
    with ModelServer(tmp_path) as server, connect(world, server.address) as ub:
        ub.ubatch("a")
        (model,) = server.models()
        os.kill(model, signal.SIGKILL)
        world.until(lambda: server.models() not in ([], [model]))
        (other,) = server.models()
        server.signal(signal.SIGTERM)
        world.until(lambda: server.ended)
        name = server.factory
        wanted = [
            f"{name}: backend gevent (asked for by name), executor ForwardingExecutor",
            f"{name}: process {server.pid} serves {name} at {server.path}",
            f"{name}: model process {model} loads {name}",
            f"{name}: model process {model} is ready after",
            f"{name}: the model process {model} was killed by SIGKILL "
            "(out of memory? see the kernel log); starting",
            f"{name}: model process {other} loads {name}",
            f"{name}: model process {other} is ready after",
            f"{name}: ends, once what was accepted is answered",
            f"{name}: has ended; calls that got Stopped: 0",
        ]
        lines = server.lines()
        assert len(wanted) == len(lines), lines
        for start, line in zip(wanted, lines):
            assert line.startswith(start)
        assert not server.noise()
    ours = [record.getMessage() for record in caplog.records]
    told = f"connected to the model server {server.pid} at {server.path}, which runs"
    assert 1 == sum(told in line for line in ours)


def test_no_ask_is_larger_than_a_batch_of_the_server(
    world: World, tmp_path: Path
) -> None:
    """What is packed together is sent again with each batch that has some of it."""
    sizes: list[int] = []

    def script(channel: Channel) -> None:
        greet(channel, max_size=4)
        while sum(sizes) < 10:
            frame = received(channel)
            sizes.append(read_ask(frame).size)
            answer_all(channel, frame)
        channel.receive(PATIENCE)

    with Scripted(tmp_path, script) as server, UBatch.connect(
        server.address, backend=world.backend
    ) as ub:
        collector = ub._here()

        def submit_all() -> list[Any]:
            with collector.lock:
                return [collector.submit((n,), {}, None) for n in range(10)]

        calls = collector.backend.in_owner(submit_all)
        assert [*range(10)] == [call.result(PATIENCE) for call in calls]
    assert [4, 4, 2] == sizes
