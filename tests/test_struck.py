"""What does a signal leave behind whose handler raises, wherever it strikes?

Ctrl-C, say, or a time limit: the next one who comes goes on as if nothing had been.
"""

from __future__ import annotations

import pytest

from tests.fakes import Gated, Recorder, World
from tests.forcing import Struck, before, strike
from ubatch import DeadlineExceeded, Stopped, UBatch
from ubatch.collector import Collector
from ubatch.endings import Endings

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


def test_a_stop_that_is_struck_can_be_called_again(world: World) -> None:
    """It ends those that the first one did not get to; they used to be lost."""
    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend).start()
    futures = [ub.submit(number) for number in range(4)]
    world.until(lambda: ub.stats().running)
    with before(Endings.settle, "with self._lock:", strike):
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
