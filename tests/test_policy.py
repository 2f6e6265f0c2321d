"""When does a batch close? With made-up times."""

from __future__ import annotations

import pytest

from ubatch.policy import TURN, Decision, Look, Rules, decide


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
