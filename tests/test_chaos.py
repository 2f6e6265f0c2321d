"""Do the programs of `make chaos` and `make soak` run, and would they see a fault?"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.chaos.client import Request
from tests.chaos.journal import Begun
from tests.chaos.ledger import Ledger
from tests.chaos.load import bursts
from tests.chaos.plan import DEADLINE, GRACE, answer_to
from tests.children import PATIENCE, ROOT, environment, once
from tests.soak import line_through

server = pytest.mark.server


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@once
@server
@pytest.mark.parametrize("kind", ["gevent", "gthread"])
def test_a_short_chaos_ends_well(kind: str) -> None:
    """Some seconds of everything: no request is answered wrongly, hangs or is lost."""
    ended = _run("tests.chaos", "--kind", kind, "--seconds", "6")

    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert "sent " in ended.stdout


@once
@server
def test_a_short_soak_finds_nothing_that_grows() -> None:
    """Some seconds of calls, failures and cancellations leave nothing behind."""
    ended = _run("tests.soak", "--minutes", "0.06")

    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert "RSS, MB" in ended.stdout


@once
@server
def test_the_soak_notices_a_leak() -> None:
    """A handler that keeps every item makes the soak fail, and names what grew."""
    ended = _run("tests.soak", "--minutes", "0.06", "--leak")

    assert ended.returncode == 1
    assert ["gevent: rss grew", "thread: rss grew"] == [
        line.partition(": Growth")[0] for line in ended.stderr.splitlines()
    ]


# What the ledger says of one request, of another and of a worker that was killed.

BEGUN, LATE = 1.2, DEADLINE + GRACE + 0.05
TAKEN_UP = {"a": Begun(17, BEGUN), "b": Begun(18, BEGUN)}
ASKED = Request("a", "pool", "", "", "data", False, [], wanted=answer_to("a", "data"))
OTHER = Request("b", "pool", "poison", "", "more", False, [], wanted="?")
RIGHT = replace(ASKED, end="answered", status=200, answer=ASKED.wanted, ended=0.1)
FAILED = replace(ASKED, end="answered", status=500, error="Poisoned", of="b", ended=0.1)
REFUSED = replace(ASKED, end="answered", status=504, error="DeadlineExceeded")
CLOSED = replace(ASKED, began=1.0, end="closed", ended=2.0)

JUDGED = {
    "its own answer": (RIGHT, "right"),
    "another's answer": (replace(RIGHT, answer="?"), "wrong"),
    "an answer though it had to fail": (replace(RIGHT, fault="poison"), "wrong"),
    "the error of its batch": (FAILED, "other"),
    "the error of nobody": (replace(FAILED, of="c"), "wrong"),
    "an error that nobody caused": (replace(FAILED, error="HandlerExit"), "wrong"),
    "an error that is no reason": (replace(FAILED, error="KeyError", of=""), "wrong"),
    "the error of another batcher": (replace(FAILED, batcher="hub"), "wrong"),
    "another's exception": (replace(FAILED, error="Refused"), "wrong"),
    "its own exception": (
        replace(FAILED, fault="own", error="Refused", of="a"),
        "own",
    ),
    "refused in time": (replace(REFUSED, ended=DEADLINE + 0.01), "504"),
    "refused too early": (replace(REFUSED, ended=DEADLINE - 0.01), "wrong"),
    "refused for no reason": (replace(REFUSED, status=503, ended=0.1), "wrong"),
    "no answer in time": (replace(ASKED, end="timeout", ended=9.0), "hung"),
    "an answer that is late": (replace(RIGHT, ended=BEGUN + LATE), "hung"),
    "an answer just in time": (replace(RIGHT, ended=BEGUN + LATE - 0.1), "right"),
    "closed by a worker that was killed": (replace(CLOSED, pid=0), "killed"),
    "closed before that": (replace(CLOSED, ended=1.4), "lost"),
}


@pytest.mark.parametrize("what", JUDGED)
def test_the_ledger_tells_what_became_of_a_request(what: str) -> None:
    """Each end of a request has its column; whatever nothing explains is a fault."""
    request, column = JUDGED[what]

    ledger = Ledger([request, OTHER], TAKEN_UP, kills={17: 1.5})

    assert column == ledger.columns["a"]


def test_only_the_worker_that_was_killed_excuses_a_loss() -> None:
    """A request that another worker had taken up is lost without a kill -9."""
    assert "lost" == Ledger([CLOSED], {"a": TAKEN_UP["b"]}, {17: 1.5}).columns["a"]


def test_a_killed_worker_excuses_nobody_who_came_later() -> None:
    """Nor does it who was not taken up, and heard of the end long after the kill."""
    late = replace(CLOSED, began=1.6), replace(CLOSED, ended=3.0)

    assert ["lost", "lost"] == [
        Ledger([each], {}, {17: 1.5}).columns["a"] for each in late
    ]


def test_the_same_seed_asks_the_same() -> None:
    """A run can be repeated; another seed makes another."""
    first, again, other = (list(bursts(seed, 2.0, 100.0)) for seed in "aab")

    assert first == again != other


def test_a_line_tells_growth_from_noise() -> None:
    """What grows steadily is beyond noise, what goes up and down is not."""
    times = [float(n) for n in range(20)]

    assert not line_through(times, [n * 3.0 for n in times]).within(2.0)
    assert line_through(times, [n % 2 * 9.0 for n in times]).within(2.0)
