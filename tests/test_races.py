"""Is each ``Race (name):`` of the sources stopped, when it is forced to happen?

Each test brings about the very interleaving that the comment numbers, and fails
without the line that the comment stands beside.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest

import ubatch
from tests.apps import models
from tests.children import FileGate
from tests.fakes import PATIENCE, Gate, Gated, NativeCaller, World
from tests.forcing import Struck, before, strike
from tests.serving import Scripted, answer_all, answer_some, greet, received
from ubatch import (
    DeadlineExceeded,
    Future,
    ProcessExecutor,
    Stopped,
    UBatch,
    UBatchError,
    backends,
    registry,
    ubatch_decorator,
)
from ubatch.backends.inbox import Inbox
from ubatch.backends.thread import ThreadAlarm, ThreadLatch
from ubatch.batch import Batch, Job
from ubatch.channel import Channel
from ubatch.decorators import Batched
from ubatch.endings import Endings
from ubatch.keeper import Keeper
from ubatch.life import close
from ubatch.link import Link
from ubatch.memory import WORTH, Incoming, Outgoing
from ubatch.nesting import waiting_for
from ubatch.origin import Found
from ubatch.remote import Remote
from ubatch.spawn import Process, status_of
from ubatch.strands import Strands

SOURCES = Path(ubatch.__file__).parent

pytestmark = pytest.mark.concurrency


def test_every_race_has_a_name_and_a_test() -> None:
    """A comment that claims to stop a race is backed by a test that forces it."""
    text = "\n".join(path.read_text() for path in SOURCES.rglob("*.py"))
    named = re.findall(r"\bRace \((\w+)\):", text)
    assert len(named) == len(re.findall(r"\bRaces?\b", text)), "one has no name"
    tests = [name for name in globals() if name.startswith("test_race_")]
    assert Counter(f"test_race_{name}" for name in named) == Counter(tests)


class Meeting:
    """Holds each of two threads until the other is there."""

    def __init__(self) -> None:
        self._gates = [Gate(), Gate()]

    def come(self, me: int) -> None:
        self._gates[me].open()
        self._gates[1 - me].wait()


def test_race_ring(world: World) -> None:
    """Of two handlers that wait for each other, one at least is told so."""
    entered, marked = Meeting(), Meeting()

    def handler(me: int, items: list[str]) -> list[str]:
        if items == ["outer"]:
            entered.come(me)
            with before(waiting_for, "if not _can_end", partial(marked.come, me)):
                ubs[1 - me].with_options(deadline=5.0).ubatch("inner")
        return items

    ubs = [
        UBatch(1, 0.0, handler=partial(handler, me), backend=world.backend)
        for me in range(2)
    ]
    callers = [world.spawn(ub.start().ubatch, "outer") for ub in ubs]
    for caller in callers:
        caller.join()
    errors = [caller.error for caller in callers if caller.error is not None]
    assert errors, "nobody was told"
    for error in errors:
        assert isinstance(error, UBatchError) and "cannot come before" in str(error)
    for ub in ubs:
        ub.stop()


def test_race_one_batcher() -> None:
    """Two threads that make an instance's first call get the same batcher."""

    class Model:
        @ubatch_decorator(4, 0.0)
        def predict(self, items: list[int]) -> list[int]:
            return items

    model = Model()
    made = Meeting()

    def look_up(me: int) -> Any:
        line = "return instances.setdefault"
        with before(Batched._batcher_of, line, partial(made.come, me)):
            return model.predict._batcher

    callers = [NativeCaller(look_up, me) for me in range(2)]
    first, second = (caller.result() for caller in callers)
    assert first is second is model.predict._batcher


@pytest.mark.parametrize(
    "second", ["begin", "stop", "start", "next life", "old stop", "older"]
)
def test_race_crossed(world: World, second: str) -> None:
    """A first call and a stop() or start() know of each other, whoever is second."""
    # Nothing but stop() closes a batch.
    ub = UBatch(9, 60.0, handler=lambda xs: xs, backend=world.backend, linger="full")
    futures: list[Future[int]] = []

    def submit() -> None:
        futures.append(ub.submit(1))

    def live_on() -> None:
        ub.start()
        submit()

    def live_again() -> None:
        ub.stop()
        live_on()

    if second == "begin":  # stop() found no collector, which is put in now
        ub.start()
        with before(UBatch._begin, "collector = life.publish", ub.stop):
            with pytest.raises(Stopped):
                submit()
        world.until(lambda: "stopped" in repr(ub))
        return
    if second == "stop":  # it was about to close the life when the call came
        ub.start()
        with before(close, "life.closed = True", submit):
            ub.stop()
    elif second == "start":  # it did not find the collector either
        with before(UBatch._begin, "collector = life.publish", ub.start):
            submit()
        ub.stop()
    elif second == "old stop":  # it has closed its life, and another one has begun
        ub.start()
        with before(close, "collector = life.collector or", live_on):
            ub.stop(timeout=5.0)
        assert not futures[0].done() and "started" in repr(ub)
        ub.stop()
    elif second == "older":  # the same, before it has looked for anything
        ub.start()
        look = "collector = self._life.collector or"
        with before(UBatch._in_this_process, look, live_again):
            ub.stop(timeout=5.0)
        assert not futures[0].done() and "started" in repr(ub)
        ub.stop()
    else:  # a first call has put its own in, and goes on in another life
        ub.start()
        with before(UBatch._begin, "self._collector = collector", live_again):
            with pytest.raises(Stopped):
                submit()
        ub.stop()
    assert futures[0].done(), "stop() did not wait for it"
    assert 1 == futures[0].result()
    assert "stopped" in repr(ub)


def test_race_unlinked(world: World) -> None:
    """A waiter whose time is up while all are told keeps nobody from being told."""
    ub = UBatch(9, 60.0, handler=lambda xs: xs, backend=world.backend, linger="full")
    future = ub.start().submit(1)
    late, leave = Gate(), Gate()

    def hold() -> None:
        late.open()
        leave.wait()

    def give_up() -> None:
        with before(Future._wait_for_link, "self._unlink(wake)", hold):
            future.result(timeout=0.01)

    def let_it_unlink() -> None:
        leave.open()
        leaver.join()

    leaver = NativeCaller(give_up)
    world.until(lambda: not late.is_shut())
    waiter = NativeCaller(future.result)
    world.until(lambda: len(future._links) == 2)
    with before(Future._notify, "notify(self)", let_it_unlink):
        assert future.cancel()
    assert leaver.ended and 0 == len(future._links)
    world.until(lambda: waiter.ended)
    ub.stop()


def test_race_given_up(world: World) -> None:
    """A batch that stop() gives up runs with what it was to be given, or not at all."""
    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend).start()
    future = ub.submit(1)
    world.until(lambda: handler.batches)
    collector = ub._collector
    assert collector is not None
    (batch,) = collector.running_batches()
    assert Job(handler, 1, [[1]], {}) == batch.job()
    with before(Batch.job, "handler = self.handler", collector.abandon):
        assert batch.job() is None
    handler.gate.open()
    assert isinstance(future.exception(), Stopped)
    ub.stop()


def test_race_stopping(world: World) -> None:
    """An alarm that rings while stop() begins leaves it all the calls that wait."""
    ub: UBatch[int, int] = UBatch(9, 0.0, handler=list, backend=world.backend)
    late, waits = ub.with_options(deadline=0.02).submit(1), ub.submit(2)
    ub._life.closed = True  # as stop() begins, and before it looks for the collector
    assert isinstance(late.exception(20), DeadlineExceeded)
    world.until(lambda: ub.stats().expired_total)
    ub.stop()
    assert isinstance(waits.exception(20), Stopped)


class SaysNo(deque[Any]):
    """A deque that has something done after it has been found empty."""

    act: Callable[[], object] | None = None

    def __bool__(self) -> bool:
        if len(self):
            return True
        act, self.act = self.act, None
        if act is not None:
            act()
        return False


def test_race_last_taken(hub: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread wants done just after the hub has looked for more is done."""
    inbox = Inbox.of(gevent.get_hub())
    ran: list[str] = []

    def send_late() -> None:
        NativeCaller(inbox.send, lambda: ran.append("late")).result()
        assert ["first"] == ran

    wanted = SaysNo()
    wanted.act = send_late
    monkeypatch.setattr(inbox, "_wanted", wanted)
    inbox.send(lambda: ran.append("first"))
    hub.until(lambda: ["first", "late"] == ran)


def test_race_late_waiter() -> None:
    """Who comes to a latch while it is being set does not wait."""
    latch = ThreadLatch()
    with before(ThreadLatch.wait, "locks.append(mine)", latch.set):
        assert latch.wait(5.0)


def test_race_rejoined(hub: World) -> None:
    """Who leaves before it hears of its end, and calls again, is told of that call."""

    class Left(Exception):
        pass

    def client() -> int:
        with pytest.raises(Left):
            ub.with_options(deadline=60.0).ubatch(1)
        return ub.ubatch(2)

    def expire_and_throw() -> None:
        collector = ub._collector
        assert collector is not None
        (batch,) = collector.waiting
        endings = collector.endings
        # What it is told is on its way:
        endings._expire(batch, [caller.greenlet], time.monotonic() + 99)
        endings.tell()
        caller.greenlet.throw(Left)  # it calls again before this returns
        again.append(ub.stats().pending)

    ub = UBatch(9, 60.0, handler=lambda xs: xs, backend="gevent", linger="full").start()
    again: list[int] = []
    keeps_it_open = hub.spawn(ub.ubatch, 0)
    hub.until(lambda: ub.stats().pending == 1)
    caller: Any = hub.spawn(client)
    hub.until(lambda: ub.stats().pending == 2)
    gevent.get_hub().loop.run_callback(expire_and_throw)
    hub.until(lambda: again)
    ub.stop()
    assert [2] == again
    assert [0, 2] == [keeps_it_open.result(), caller.result()]


def without_alarm(threads: World, **options: Any) -> tuple[UBatch[int, str], Any, Any]:
    """Return a busy batcher whose alarm is set, but has no thread; and its parts."""
    handler = Gated(threads.gate())
    ub: UBatch[int, str] = UBatch(9, 0.0, handler=handler, backend="thread", **options)
    collector: Any = ub.start()._here()
    alarm = collector.deadlines._alarm
    alarm._started = True
    return ub, handler, alarm


@pytest.mark.parametrize(
    "line",
    ["self._at = inf", "self._sleeps_until = at"],
    ids=["forgotten", "overslept"],
)
def test_race_overslept(threads: World, line: str) -> None:
    """A deadline that comes while the alarm goes to sleep, or wakes, is kept."""
    ub, handler, alarm = without_alarm(threads)
    busy = ub.submit(0)
    threads.until(lambda: handler.batches)
    soon = line == "self._at = inf"
    first = ub.with_options(deadline=0.01 if soon else 60.0).submit(1)
    later: list[Future[str]] = []

    def run() -> None:
        with before(ThreadAlarm._run, line, call):
            alarm._run()

    def call() -> None:
        later.append(ub.with_options(deadline=0.05).submit(2))

    if not soon:  # it goes to sleep for longer
        first.cancel()
    thread = NativeCaller(run)
    threads.until(lambda: later)
    assert isinstance(later[0].exception(timeout=20), DeadlineExceeded)
    handler.gate.open()
    assert "0" == busy.result(20)
    ub.stop()
    thread.result()


test_race_forgotten = test_race_overslept


def test_race_returned(threads: World, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that returns while it is given up changes nothing any more."""
    ub, handler, _ = without_alarm(threads, handler_timeout=0.001)
    call = ub.submit(1)
    threads.until(lambda: handler.batches)
    collector = ub._collector
    assert collector is not None
    (batch,) = collector.running_batches()
    threads.until(lambda: time.monotonic() > batch.limit)
    returned: list[bool] = []
    handler._answer = lambda item: returned.append(True)

    def let_it_return() -> None:
        handler.gate.open()
        threads.until(lambda: returned)

    with before(Endings._give_up, "told = batch.settle", let_it_return):
        collector.endings.ring()
    assert isinstance(call.exception(), DeadlineExceeded)
    threads.until(lambda: not ub.stats().stuck)
    seen = ub.stats()
    assert (1, 1, 0) == (seen.calls_total, seen.expired_total, seen.results_total)
    ub.stop()
    assert not any("died" in message for message in caplog.messages)


def test_race_replaced() -> None:
    """A batcher where a dead one was in memory is known, though both had one place."""
    places: set[int] = set()
    again = 0
    for _ in range(100):
        ub: UBatch[int, int] = UBatch(1, 0.0)
        again += id(ub) in places
        places.add(id(ub))
        assert ub in registry.alive()
        del ub
    assert again


class Snatched(list[Any]):
    """A list that has something done once it has been found not to be empty."""

    act: Callable[[], object] | None = None

    def __bool__(self) -> bool:
        found = len(self) > 0
        act, self.act = self.act, None
        if act is not None and found:
            act()
        return found


def test_race_snatched(threads: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends as a strand is about to claim it costs nobody a call."""
    ub: UBatch[int, int] = UBatch(
        8, 0.0, executor=ProcessExecutor(models.echo), backend="thread"
    )
    assert 1 == ub.start().ubatch(1)
    collector: Any = ub._collector
    executor = collector._executor
    threads.until(lambda: executor._vacant)
    vacant = Snatched(executor._vacant)
    (model,) = vacant

    def snatch() -> None:
        os.kill(model.process.pid, signal.SIGKILL)
        threads.until(lambda: not len(vacant))

    vacant.act = snatch
    monkeypatch.setattr(executor, "_vacant", vacant)
    assert 2 == ub.ubatch(2)
    assert vacant.act is None
    ub.stop()


class Alone:
    """Who has one keeper, and notes that it has ended."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def over(self) -> bool:
        return False

    def ready(self, model: Any, seconds: float) -> None:
        self.heard.append("ready")

    def gone(self, model: Any) -> None:
        self.heard.append("gone")

    def failed(self, trouble: Exception) -> None:
        self.heard.append(trouble)

    def ended(self, keeper: Keeper, escaped: BaseException | None) -> None:
        self.heard.append(escaped)


def test_race_unborn(world: World, tmp_path: Path) -> None:
    """A process that is started while its keeper retires need not be ready first."""
    with FileGate(tmp_path / "gate") as gate:
        record, crew = str(tmp_path / "record"), Alone()
        spec = ProcessExecutor(partial(models.slow, record, gate.path, gate.path))
        keeper = Keeper(crew, spec, "model", backends.load(world.backend)[0], None)

        def work() -> None:
            with before(Keeper._keep_one, "model = self._model", keeper.retire):
                keeper.work()

        worker = world.spawn(work)
        worker.join()
        ended = worker.ended
        gate.open()
        worker.result()
    assert ended, "it was waited for until it was ready"
    assert ["gone"] == crew.heard


def test_race_late_ask(world: World, tmp_path: Path) -> None:
    """An ask that is put under way while the link ends is asked of the next server."""
    ends = Gate()

    def script(channel: Channel) -> None:
        greet(channel)
        if server.clients == 1:
            answer_all(channel, received(channel))
            ends.wait()
            return
        answer_all(channel, received(channel))
        channel.receive(PATIENCE)

    with Scripted(tmp_path, script) as server, UBatch.connect(
        server.address, backend=world.backend
    ) as ub:
        assert "first" == ub.ubatch("first")
        (link,) = remote_of(ub)._links

        def end() -> None:
            ends.open()
            world.until(lambda: not link.alive)

        send = Remote._send
        remote = remote_of(ub)
        acted: list[bool] = []

        def in_between(*args: Any) -> None:
            if acted:
                send(remote, *args)
                return
            acted.append(True)
            with before(Link.ask, "self._under_way[asked.number] = asked", end):
                send(remote, *args)

        remote._send = in_between  # type: ignore[method-assign]
        assert "second" == ub.with_options(deadline=PATIENCE).ubatch("second")
        assert 2 == server.clients


def test_race_half_told(threads: World, tmp_path: Path) -> None:
    """The strand does not go on while the answer of a call is still put down."""
    left = Gate()
    answered = Gate()

    def script(channel: Channel) -> None:
        greet(channel)
        asked = received(channel)
        answer_some(channel, asked, [0])
        channel.receive(PATIENCE)

    with Scripted(tmp_path, script) as server, UBatch.connect(
        server.address, backend="thread"
    ) as ub:
        add = Found.add

        def slowly(self: Found, *args: Any) -> None:
            answered.open()
            left.wait()
            add(self, *args)

        Found.add = slowly  # type: ignore[method-assign]
        try:
            collector = ub._here()
            with collector.lock:  # so that they share a batch
                stays = collector.submit(("a",), {}, None)
                leaves = collector.submit(("b",), {}, None)
            answered.wait()
            batch = leaves._batch
            assert batch is stays._batch
            with collector.lock:
                batch.gone.add(leaves)
            collector.endings.leave(batch, leaves)
            assert not stays.done()
            left.open()
            assert "a" == stays.result(timeout=PATIENCE)
        finally:
            Found.add = add  # type: ignore[method-assign]


def test_race_given_back(threads: World, tmp_path: Path) -> None:
    """Those whom stop() gives up get Stopped, not an answer that nobody has given."""
    asked = Gate()

    def script(channel: Channel) -> None:
        greet(channel)
        received(channel)
        asked.open()
        while channel.receive(PATIENCE) is not None:
            pass

    with Scripted(tmp_path, script) as server:
        ub = UBatch.connect(server.address, backend="thread")
        call = ub.submit("a")
        asked.wait()
        collector = ub._here()
        fail = collector.endings.fail

        def late(batches: list[Batch], error: Exception) -> None:
            deadline = time.monotonic() + 0.5  # the strand may settle it, or not
            while not call.done() and time.monotonic() < deadline:
                time.sleep(0.001)
            fail(batches, error)

        collector.endings.fail = late  # type: ignore[method-assign]
        ub.stop(timeout=0.01)
        with pytest.raises(Stopped):
            call.result(timeout=PATIENCE)


def remote_of(ub: UBatch[Any, Any]) -> Remote:
    remote = ub._here()._executor
    assert isinstance(remote, Remote)
    return remote


def test_race_reaped(threads: World) -> None:
    """Both who wait for a process are told how it ended."""
    process = Process("model", backends.load("thread")[0])
    others: list[NativeCaller] = []

    def wait() -> str:
        assert process.wait(20.0)
        return process.fate

    def wait_beside() -> None:
        others.append(NativeCaller(wait))
        time.sleep(0.1)  # it would have been told by then

    process.kill()
    with before(status_of, "if ended is None", wait_beside):
        assert "was killed by SIGKILL" == wait()
    assert "was killed by SIGKILL" == others[0].result()
    process.close()


def test_race_handed_out() -> None:
    """Memory that is being handed out is not used again."""
    outgoing, incoming = Outgoing(), Incoming()
    put = outgoing.put([bytes(WORTH)], lambda: None)
    assert put is not None and put.fd is not None
    incoming.open(put.number, put.size, put.fd)
    os.close(put.fd)
    told: list[list[int]] = []
    with before(Incoming.get, "return found", lambda: told.append(incoming.done())):
        found = incoming.get(put.number, put.places)
    assert [[]] == told and [] == incoming.done()
    del found
    assert [put.number] == incoming.done()


def test_race_deferred(threads: World) -> None:
    """A callback is run that was left to a thread which stop() has told to end."""
    ub = UBatch(9, 60.0, handler=lambda xs: xs, backend="thread", linger="full").start()
    ran: list[str] = []
    first = ub.submit(1)
    first.add_done_callback(lambda _: ran.append("first"))  # it has a thread now
    assert first.cancel()
    threads.until(lambda: ran)
    second = ub.submit(2)
    second.add_done_callback(lambda _: ran.append("second"))
    with before(Endings.cancel, "future._notify()", ub.stop):
        assert second.cancel()
    threads.until(lambda: len(ran) == 2)


def test_race_uncounted(world: World) -> None:
    """A strand is counted, though a signal strikes whoever starts it."""
    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend).start()
    with before(Strands.hire_if_short, "self._count(counted)", strike):
        with pytest.raises(Struck):
            ub.submit(0)
    strands: Any = ub._collector.strands  # type: ignore[union-attr]
    world.until(lambda: strands.hired)
    callers = [world.spawn(ub.ubatch, number) for number in range(3)]
    world.until(lambda: handler.batches and ub.stats().pending == 2)
    assert 1 == ub.stats().running
    handler.gate.open()
    assert ["0", "1", "2"] == [caller.result() for caller in callers]
    ub.stop()
