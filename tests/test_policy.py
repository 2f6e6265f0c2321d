"""When does a batch close? With made-up times."""

from __future__ import annotations

import pytest

from ubatch.pace import Observer
from ubatch.policy import TURN, Decision, Look, Pace, Rules, decide


def rules(linger: str, max_size: int = 4, timeout: float = 0.1) -> Rules:
    return Rules(max_size, timeout, linger, settled_turns=2)  # type: ignore[arg-type]


def look(
    size: int = 1,
    age: float = 0.0,
    quiet: int = 0,
    growing: bool = True,
    stopping: bool = False,
) -> Look:
    return Look(size, age, quiet, growing, stopping)


@pytest.mark.parametrize("linger", ["settle", "full", "now"])
def test_a_full_batch_closes_whatever_the_linger(linger: str) -> None:
    """max_size closes a batch at once."""
    assert Decision("full") == decide(rules(linger), look(size=4))


def test_a_batch_that_was_full_waits_for_nobody() -> None:
    """A call that left a full batch does not make it linger: no other can join."""
    assert "full" == decide(rules("full"), look(size=3, growing=False)).reason


@pytest.mark.parametrize("linger", ["settle", "full", "now"])
def test_a_stopping_batcher_waits_for_nobody(linger: str) -> None:
    """stop() closes what is there."""
    assert "stop" == decide(rules(linger), look(stopping=True)).reason


@pytest.mark.parametrize("linger", ["settle", "full"])
@pytest.mark.parametrize("age", [0.1, 5.0])
def test_timeout_bounds_every_linger(linger: str, age: float) -> None:
    """No linger outlasts timeout, counted from the first call."""
    assert "timeout" == decide(rules(linger), look(age=age)).reason


def test_now_takes_what_is_there() -> None:
    """linger="now" never waits."""
    assert "now" == decide(rules("now"), look()).reason


def test_full_waits_out_the_rest_of_timeout() -> None:
    """linger="full" looks again when the first call has waited timeout."""
    decision = decide(rules("full", timeout=0.1), look(age=0.04, quiet=99))
    assert decision.reason is None
    assert 0.06 == pytest.approx(decision.look_again)


@pytest.mark.parametrize("quiet", [0, 1])
def test_settle_looks_again_after_a_turn_while_calls_arrive(quiet: int) -> None:
    """One quiet turn is not settled on gevent."""
    assert Decision(None, TURN) == decide(rules("settle"), look(quiet=quiet))


def test_settle_closes_after_two_quiet_turns() -> None:
    """Two quiet turns in a row are settled."""
    assert "settled" == decide(rules("settle"), look(quiet=2)).reason


def test_a_timeout_of_zero_waits_for_nobody() -> None:
    """timeout=0 closes at the first look, even with linger="full"."""
    assert "timeout" == decide(rules("full", timeout=0.0), look()).reason


# What is known of how calls come.

FAR = Rules(64, 0.05, "adaptive", 2, far=True)
WAVE = Pace(
    *(0.0003, 0.001, 0.0, 0.012),  # gap, lag, drag, fixed
    *(20, 0, 20.0, 0.1),  # told, missing, usual, since
    overlaps=True,
    spread=0.3,
)


def seen(size: int, quiet: float, pace: Pace | None, turns: int = 9) -> Look:
    return Look(size, 0.004, turns, True, False, pace, quiet=quiet)


@pytest.mark.parametrize("overlaps", [False, True])
def test_calls_of_other_processes_settle_by_silence(overlaps: bool) -> None:
    """However often the loop has turned: four gaps, as waves have them."""
    wave = WAVE._replace(overlaps=overlaps)
    decision = decide(FAR, seen(7, 0.0005, wave))
    assert decision.reason is None
    assert 0.0007 == pytest.approx(decision.look_again)
    assert "settled" == decide(FAR, seen(7, 0.0012, wave)).reason
    assert Decision(None, TURN) == decide(FAR, seen(7, 0.0012, wave, turns=1))


def test_calls_of_this_process_settle_by_turns() -> None:
    """Who is about to call has had its turn."""
    near = FAR._replace(far=False)
    assert "settled" == decide(near, seen(7, 0.0, WAVE)).reason


def test_silence_is_not_waited_for_where_it_says_nothing() -> None:
    """Calls that come at any time are no wave; nor is more waited than is saved."""
    steady = WAVE._replace(spread=0.9)
    assert "settled" == decide(FAR, seen(7, 0.0, steady)).reason
    cheap = WAVE._replace(fixed=0.0001, overlaps=False)
    assert "settled" == decide(FAR, seen(7, 0.0001, cheap)).reason


def test_nothing_is_known_of_the_first_calls_of_other_processes() -> None:
    """They settle in a millisecond or two; with linger="settle", all do."""
    for rules in (FAR, FAR._replace(linger="settle")):
        assert decide(rules, seen(2, 0.0, None)).reason is None
        assert "settled" == decide(rules, seen(2, 0.002, None)).reason
    before_any_wave = WAVE._replace(gap=0.0, spread=1.0)
    assert decide(FAR, seen(2, 0.0, before_any_wave)).reason is None


def test_a_lone_call_of_another_process_waits_for_nobody() -> None:
    """As one of this process does not."""
    lone = WAVE._replace(told=1, missing=0, usual=1.0)
    assert "settled" == decide(FAR, seen(1, 0.0, lone)).reason


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("spread", [0.3, 0.9])
@pytest.mark.parametrize("since", [0.002, 0.02])
def test_a_batch_that_takes_its_callers_processor_waits_for_the_other_cohort(
    far: bool, spread: float, since: float
) -> None:
    """Those who were told just now, and are not back; not if nobody comes in waves,
    nor for long. Where they are greenlets of one hub, all have had their turn."""
    told = WAVE._replace(
        overlaps=False, told=32, missing=32, since=since, spread=spread
    )
    decision = decide(FAR._replace(far=far), seen(32, 0.006, told))
    if far and spread == 0.3 and since == 0.002:
        assert Decision(None, 0.001) == decision
    elif far and spread == 0.3:  # overdue at twice 0.001 + 32 * 0.0003
        assert decision.reason is None
        gone = told._replace(since=0.022)
        assert "settled" == decide(FAR, seen(32, 0.006, gone)).reason
    else:
        assert "settled" == decision.reason


@pytest.mark.parametrize("together, share", [(True, 0.1), (False, 0.9)])
def test_the_spread_tells_waves_from_a_stream(together: bool, share: float) -> None:
    """The share of the time between outcomes in which calls come."""
    observer = Observer()
    joined = 0
    for cycle in range(1, 6):
        opened, newest = cycle + 0.05, cycle + (0.15 if together else 0.95)
        observer.opened(opened)
        joined += 10
        observer.outcome(10, 0.01, 0, joined, newest, cycle + 1.0)
    pace = observer.pace(joined, newest, cycle + 1.1, True)
    assert pace is not None and share == pytest.approx(pace.spread)
