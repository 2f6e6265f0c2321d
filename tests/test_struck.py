"""What does a signal leave behind whose handler raises, wherever it strikes?

Ctrl-C, say, or a time limit: the next one who comes goes on as if nothing had been.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes import Gated, Recorder, World
from tests.forcing import Struck, before, strike
from ubatch import BackendError, DeadlineExceeded, Stopped, UBatch
from ubatch.collector import Collector
from ubatch.endings import Endings
from ubatch.strands import Strands

pytestmark = pytest.mark.concurrency


@pytest.mark.parametrize(
    "line", ["self.strands.opened(now)", "self.waiting.add(opened)", "if deadline is"]
)
def test_who_is_struck_opening_a_batch_leaves_nothing_of_it(
    line: str, world: World
) -> None:
    """The next call is run, alone; it used to join an empty batch that nobody ran."""
    handler = Recorder()
    ub = UBatch(2, 0.0, handler=handler, backend=world.backend).start()
    with before(Collector._join, line, strike):
        with pytest.raises(Struck):
            ub.submit(0)
    assert "1" == world.spawn(ub.ubatch, 1).result()
    ub.stop()
    assert [[1]] == handler.batches


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (Endings.settle, "with self._lock:"),  # of the one that runs
        (Endings._settle, "told = batch.settle("),  # of the first that waits
    ],
)
def test_a_stop_that_is_struck_can_be_called_again(
    function: Callable[..., Any], line: str, world: World
) -> None:
    """It ends those that the first one did not get to; they used to be lost."""
    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend).start()
    futures = [ub.submit(number) for number in range(4)]
    world.until(lambda: ub.stats().running)
    with before(function, line, strike):
        with pytest.raises(Struck):
            ub.stop(timeout=0.0)
    ub.stop(timeout=0.0)
    for future in futures:
        with pytest.raises(Stopped):
            future.result(timeout=20.0)
    handler.gate.open()


def test_a_strand_that_is_struck_as_it_tells_leaves_nobody_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had to tell is told by others; the next call has another strand."""
    strike_once(monkeypatch)
    ub = UBatch(3, 0.0, handler=Recorder(), backend=world.backend).start()
    callers = [world.spawn(ub.ubatch, number) for number in range(3)]
    assert ["0", "1", "2"] == [caller.result() for caller in callers]
    assert "4" == world.spawn(ub.ubatch, 4).result()
    ub.stop()
    assert 4 == ub.stats().results_total


def test_an_alarm_that_is_struck_leaves_nobody_waiting(
    hub: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is late is told by whoever comes next, or by stop()."""
    struck = strike_once(monkeypatch)
    ub = UBatch(
        9, 60.0, handler=Recorder(), backend="gevent", linger="full", deadline=0.01
    )
    caller = hub.spawn(ub.ubatch, 1)  # it is not started: there is no strand
    hub.until(lambda: struck)
    ub.stop()
    with pytest.raises(DeadlineExceeded):
        caller.result()


def strike_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Have a signal strike the first who tells how calls have ended."""
    tell, struck = Endings.tell, list[bool]()

    def interrupted(self: Endings) -> None:
        if self._owed and not struck:
            struck.append(True)
            raise Struck
        tell(self)

    monkeypatch.setattr(Endings, "tell", interrupted)
    return struck


def test_what_dies_with_a_strand_is_run_by_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits is told to call again, so nobody may be working on it."""
    fail = Endings.fail

    def late(self: Endings, *args: Any) -> None:
        if not world.is_gevent:  # where nothing can come in between
            time.sleep(0.1)  # another strand would have begun by then
        fail(self, *args)

    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend).start()
    callers = [world.spawn(ub.ubatch, number) for number in range(3)]
    world.until(lambda: handler.batches and ub.stats().pending == 2)
    monkeypatch.setattr(Endings, "fail", late)
    monkeypatch.setattr(Strands, "_observe", lambda *_: strike())
    handler.gate.open()
    for caller in callers:
        with pytest.raises(BackendError, match="killed from outside"):
            caller.result()
    monkeypatch.undo()
    assert "3" == world.spawn(ub.ubatch, 3).result()
    ub.stop()
    assert [[0], [3]] == handler.batches
