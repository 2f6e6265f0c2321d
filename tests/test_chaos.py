"""Do the programs of `make chaos` and `make soak` run, and would they see a fault?"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.batches import Batches
from tests.chaos.client import Request
from tests.chaos.journal import Begun, Run
from tests.chaos.ledger import Ledger
from tests.chaos.load import bursts
from tests.chaos.losses import WITHIN, Loss, Losses, Orphans, orphans
from tests.chaos.plan import BATCHERS, DEADLINE, GRACE, HANG, answer_to
from tests.children import PATIENCE, ROOT, environment, gunicorn_drops_nothing, once
from tests.soak import line_through

server = pytest.mark.server

COARSE = "libuv only supports millisecond timer resolution"
"""What gevent says there of sleeps of the load's own, which are shorter."""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment(PYTHONWARNINGS=f"ignore:{COARSE}"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@once
@server
@gunicorn_drops_nothing
def test_a_short_chaos_ends_well() -> None:
    """Some seconds of everything: no request is answered wrongly, hangs or is lost."""
    short = "--seconds", "6", "--rate", "125"
    with ThreadPoolExecutor() as both:  # most of it is waiting for a server to rest
        ends = [
            both.submit(_run, "tests.chaos", "--kind", kind, *short)
            for kind in ("gevent", "gthread")
        ]

    for ended in (each.result() for each in ends):
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
        assert "sent " in ended.stdout


@once
@server
@pytest.mark.parametrize(
    "kind, place",
    [
        ("gevent", "worker"),
        ("thread", "worker"),
        ("gevent", "process"),
        ("thread", "server"),
    ],
)
def test_a_short_soak_finds_nothing_that_grows(kind: str, place: str) -> None:
    """Some seconds of calls, failures, cancellations and kills leave nothing behind."""
    ended = _soak(kind, place)

    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert "RSS, MB" in ended.stdout


@once
@server
@pytest.mark.parametrize(
    "kind, place, what",
    [
        ("gevent", "worker", "rss"),
        ("thread", "worker", "rss"),
        ("gevent", "process", "model_rss"),
    ],
)
def test_the_soak_notices_a_leak(kind: str, place: str, what: str) -> None:
    """A handler that keeps every item makes the soak fail, and names what grew."""
    ended = _soak(kind, place, "--leak")

    assert ended.returncode == 1
    assert [f"{kind}, {place}: {what} grew"] == [
        line.partition(": Growth")[0] for line in ended.stderr.splitlines()
    ]


def _soak(kind: str, place: str, *options: str) -> subprocess.CompletedProcess[str]:
    only = "--kind", kind, "--place", place
    return _run("tests.soak", "--minutes", "0.03", *only, *options)


# What the ledger says of one request, of another in its batch, and of a worker that
# was killed.

BEGUN, LATE = 1.2, DEADLINE + GRACE + 0.05
LIMIT = BATCHERS["shared"].limit
TAKEN_UP = {"a": Begun(17, BEGUN), "b": Begun(18, BEGUN), "e": Begun(17, BEGUN)}
ASKED = Request("a", "shared", "", "", "data", False, [], wanted=answer_to("a", "data"))
OTHERS = {
    name: Request(name, "shared", "poison", "", "", False, [], wanted="?")
    for name in "bcd"
}
RUN = Run(17, "shared", ["a", "b"], BEGUN, BEGUN + 0.01)
RIGHT = replace(ASKED, end="answered", status=200, answer=ASKED.wanted, ended=0.1)
FAILED = replace(ASKED, end="answered", status=500, error="Poisoned", of="b", ended=0.1)
REFUSED = replace(ASKED, end="answered", status=504, error="DeadlineExceeded")
LAST = BEGUN + DEADLINE
PASSED = replace(
    REFUSED,
    message="shared: no result within the call's deadline of 1 seconds",
)
AHEAD = replace(
    REFUSED,
    name="e",  # which no handler got
    message="shared: given up 0.1 s before the call's deadline of 1 seconds: none of",
)
OVERRUN = replace(
    REFUSED,
    message=f"shared: the handler has run for handler_timeout={LIMIT:g} seconds, and",
)
STUCK = replace(
    REFUSED,
    status=503,
    error="BackendError",
    message="shared: every worker (workers=1), and what replaced it, is stuck",
    pid=17,
    ended=BEGUN + 2.5,
)
CLOSED = replace(ASKED, began=1.0, end="closed", ended=2.0)

JUDGED = {
    "its own answer": (RIGHT, "right"),
    "another's answer": (replace(RIGHT, answer="?"), "wrong"),
    "an answer though it had to fail": (replace(RIGHT, fault="poison"), "wrong"),
    "the error of its batch": (FAILED, "other"),
    "the error of nobody": (replace(FAILED, of="c"), "wrong"),
    "an error that nobody caused": (replace(FAILED, error="HandlerExit"), "wrong"),
    "an error that is no reason": (replace(FAILED, error="KeyError", of=""), "wrong"),
    "the error of another batch": (replace(FAILED, of="d"), "wrong"),
    "another's exception": (replace(FAILED, error="Refused"), "wrong"),
    "its own exception": (
        replace(FAILED, fault="own", error="Refused", of="a"),
        "own",
    ),
    "refused in time": (replace(PASSED, name="e", ended=LAST + 0.01), "504"),
    "refused though it was answered": (replace(PASSED, ended=LAST + 0.01), "wrong"),
    "refused too early": (replace(PASSED, name="e", ended=LAST - 0.01), "wrong"),
    "given up ahead": (replace(AHEAD, ended=LAST - 0.09), "shed"),
    "given up earlier than it says": (replace(AHEAD, ended=LAST - 0.2), "wrong"),
    "given up ahead while it ran": (replace(AHEAD, name="a", ended=LAST), "wrong"),
    "not waited for": (replace(OVERRUN, ended=BEGUN + LIMIT + 0.1), "overrun"),
    "not waited for early": (replace(OVERRUN, ended=BEGUN + LIMIT - 0.1), "wrong"),
    "refused for no reason": (replace(PASSED, status=503, ended=LAST), "wrong"),
    "refused while two were stuck": (STUCK, "stuck"),
    "refused before both were": (replace(STUCK, ended=BEGUN + 1.0), "wrong"),
    "refused by another worker": (replace(STUCK, pid=18), "wrong"),
    "killed from outside": (replace(STUCK, message="shared: what ran"), "wrong"),
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
    first = Run(17, "shared", ["b"], BEGUN, BEGUN + HANG)
    second = Run(17, "shared", ["c"], BEGUN + 1.0, BEGUN + 1.0 + HANG)
    runs = [first, second] if request.error == "BackendError" else [RUN]

    ledger = Ledger([request, *OTHERS.values()], TAKEN_UP, {17: 1.5}, runs)

    assert column == ledger.columns[request.name]


@pytest.mark.parametrize(
    "batcher, good, error, runs, column",
    [
        ("shared", "d", "Poisoned", ["abcd"], "other"),
        ("pool", "d", "Poisoned", ["abcd"], "blamed"),
        ("pool", "d", "Poisoned", ["abcd", "ab", "a", "b", "cd"], "vain"),
        ("pool", "d", "Poisoned", ["abcd", "ab", "a", "b"], "blamed"),
        ("pool", "abd", "Poisoned", ["abcd", "ab", "cd", "c", "d"], "blamed"),
        ("pool", "ad", "HandlerExit", ["abcd"], "other"),
    ],
)
def test_the_error_of_another_needs_a_reason(
    batcher: str, good: str, error: str, runs: list[str], column: str
) -> None:
    """Who is isolated gets it only if all runs that one bad call may cost failed."""
    fault = "exit" if error == "HandlerExit" else "poison"
    failed = replace(FAILED, name="d", batcher=batcher, error=error, of="")
    requests = [
        replace(failed, name=name, fault="" if name in good else fault)
        for name in "abcd"
    ]

    ledger = Ledger(requests, {}, {}, [Run(1, batcher, [*run], 0.0) for run in runs])

    assert column == ledger.columns["d"]


def test_runs_that_were_not_promised_are_counted() -> None:
    """A good batch is run once, one bad call of two costs three runs at most."""
    requests = {name: replace(ASKED, name=name) for name in "ac"} | {"b": OTHERS["b"]}
    once, often = (
        [Run(1, "pool", [*run], 0.0) for run in runs]
        for runs in (["a", "bc", "b", "c"], ["a", "a", "bc", "b", "c", "b"])
    )

    counts = [Batches(runs, requests).run_too_often() for runs in (once, often)]

    assert [0, 2] == counts


@pytest.mark.parametrize("found, missed", [(0, 1), (1, 0)])
def test_a_worker_that_is_stuck_unnoticed_is_counted(found: int, missed: int) -> None:
    """A run past handler_timeout must be found in what its worker tells."""
    runs = [Run(1, "shared", ["a"], 0.0, HANG), Run(1, "shared", ["b"], 1.0, 1.1)]
    pulses = {1: [{"at": 9.0, "found_stuck": {"shared": found}}]}

    batches = Batches(runs, {})

    assert ((1, missed), 1) == (batches.hung(pulses), batches.replaced())


# What it says of one whose handler was in a model process: 21 is one of worker 17's,
# killed at 1.3, as was 31, of server 30; that is killed itself at 1.6.

LOST = Losses({21: Loss(1.3, 17), 31: Loss(1.3, 30), 32: Loss(1.6, 30)}, {30: 1.6})
KILLED = "the model process {} was killed by SIGKILL while it had this call; call again"
DIED = "the model process {} was killed by SIGKILL"
SERVER = "tests.chaos.handler:server"
NOBODY = "no model server answers at run/model.sock (refused); is it running?"
HAD = "the model server is gone and had this call"


def _lost(batcher: str, message: str, **more: Any) -> Request:
    lost = replace(REFUSED, batcher=batcher, status=503, error="WorkerLost", pid=17)
    return replace(lost, **{"message": message, "ended": 1.35, **more})


def _ran(batcher: str, *pids: int, names: str = "ab") -> list[Run]:
    parent = 30 if batcher == "server" else 17
    return [Run(pid, batcher, [*names], BEGUN, parent=parent) for pid in pids]


LOSSES = {
    "lost with its process": (
        _lost("process", f"process: {KILLED.format(21)}"),
        _ran("process", 21),
        "gone",
    ),
    "lost with it before the handler ran": (
        _lost("process", f"process: {KILLED.format(21)}"),
        [],
        "gone",
    ),
    "lost with one that it was not in": (
        _lost("process", f"process: {KILLED.format(21)}"),
        _ran("process", 22),
        "wrong",
    ),
    "lost with one that nobody killed": (
        _lost("process", f"process: {KILLED.format(22)}"),
        _ran("process", 22),
        "wrong",
    ),
    "lost with another worker's": (
        _lost("process", f"process: {KILLED.format(21)}", pid=18),
        [],
        "wrong",
    ),
    "lost with one before that was killed": (
        _lost("process", f"process: {KILLED.format(21)}", ended=1.29),
        _ran("process", 21),
        "wrong",
    ),
    "told of it late": (
        _lost("process", f"process: {KILLED.format(21)}", ended=1.3 + WITHIN + 0.01),
        _ran("process", 21),
        "wrong",
    ),
    "come after that": (
        _lost("process", f"process: {KILLED.format(21)}", began=1.4, ended=1.5),
        [],
        "wrong",
    ),
    "come when there was none": (
        _lost("process", f"process: {DIED.format(21)}", sent=2.0, ended=2.5),
        _ran("process", 21),
        "alone",
    ),
    "come when it was being loaded": (
        _lost("process", f"process: {DIED.format(21)} while it loaded module:made"),
        [],
        "alone",
    ),
    "come when there was another": (
        _lost("process", f"process: {DIED.format(21)}", sent=2.0, ended=2.5),
        [replace(_ran("process", 22, names="c")[0], began=1.9)],
        "wrong",
    ),
    "come when another worker had none": (
        _lost("process", f"process: {DIED.format(21)}", pid=18),
        [],
        "wrong",
    ),
    "come when nobody had killed it": (
        _lost("process", f"process: {DIED.format(22)}"),
        [],
        "wrong",
    ),
    "lost in the worker itself": (
        _lost("pool", f"pool: {KILLED.format(21)}"),
        [],
        "wrong",
    ),
    "lost with the server": (
        _lost("server", f"server: {HAD}", ended=1.7),
        _ran("server", 32),
        "gone",
    ),
    "lost with a server that was there": (
        _lost("server", f"server: {HAD}", ended=1.59),
        _ran("server", 32),
        "wrong",
    ),
    "alone for long": (
        _lost("server", f"server: {NOBODY}", sent=4.0, ended=4.7),
        _ran("server", 31, 32) + [replace(_ran("server", 33, names="c")[0], began=4.6)],
        "alone",
    ),
    "alone though another ran": (
        _lost("server", f"server: {NOBODY}", sent=4.0, ended=4.7),
        [replace(_ran("server", 33, names="c")[0], began=4.0)],
        "wrong",
    ),
    "alone too early": (
        _lost("server", f"server: {NOBODY}", sent=3.0, ended=4.0),
        [],
        "wrong",
    ),
    "lost though run again": (
        _lost("server", f"{SERVER}: {KILLED.format(31)}"),
        _ran("server", 31),
        "wrong",
    ),
    "lost twice": (
        _lost("server", f"{SERVER}: {KILLED.format(32)}", ended=1.7),
        _ran("server", 31, 32),
        "gone",
    ),
    "stuck in a model process": (
        _lost("process", f"process: {STUCK.message[8:]}", error="BackendError"),
        _ran("process", 21),
        "wrong",
    ),
    "refused by a server that ends": (
        _lost("server", f"{SERVER}: stopped; start() it again", error="Stopped"),
        [],
        "wrong",
    ),
    "in time for what the server had left": (
        replace(
            PASSED,
            batcher="server",
            message=f"{SERVER}: no result within the call's deadline of 0.9 seconds",
            ended=LAST + 0.01,
        ),
        [],
        "504",
    ),
}


@pytest.mark.parametrize("what", LOSSES)
def test_only_a_kill_excuses_what_is_lost_with_a_model(what: str) -> None:
    """WorkerLost is for what was there, in time, and not where it is to run again."""
    request, runs, column = LOSSES[what]
    requests = [request, *OTHERS.values()]

    ledger = Ledger(requests, {"a": TAKEN_UP["a"]}, {}, runs, LOST)

    assert column == ledger.columns["a"]


def test_a_deadline_is_no_excuse_for_an_answer_that_was_there() -> None:
    """Who hears of the deadline, long after the handler had answered, was forgotten."""
    late = replace(PASSED, ended=LAST + 0.01)

    columns = [
        Ledger([late, *OTHERS.values()], TAKEN_UP, {}, [replace(RUN, ended=at)]).columns
        for at in (BEGUN + 0.01, LAST - 0.01)
    ]

    assert ["wrong", "504"] == [each["a"] for each in columns]


@pytest.mark.parametrize(
    "batcher, pids, often",
    [
        ("server", [31], 0),
        ("server", [31, 33], 0),
        ("server", [33, 34], 1),  # the first was not lost
        ("server", [31, 32, 33], 1),
        ("process", [21, 22], 1),  # it is not to be run again
    ],
)
def test_what_was_lost_is_run_again_once(
    batcher: str, pids: list[int], often: int
) -> None:
    """And only where that is promised, and where a process was lost."""
    requests = {"a": ASKED, "b": replace(ASKED, name="b")}

    batches = Batches(_ran(batcher, *pids), requests)

    assert often == batches.run_too_often(LOST.models)


ORPHANS: dict[str, tuple[Run, Orphans]] = {
    "answered": (Run(22, "process", ["a"], 1.2, 1.3, 17), Orphans(0, 0, 0)),
    "lost": (Run(21, "process", ["a"], 1.2, parent=17), Orphans(0, 0, 0)),
    "cut short": (Run(22, "process", ["a"], 1.2, parent=17), Orphans(0, 1, 0)),
    "killed as it hangs": (
        Run(22, "process", ["h"], 1.2, parent=17),
        Orphans(0, 0, 0),
    ),
    "hung": (Run(22, "process", ["h"], 1.2, 1.2 + HANG, 17), Orphans(1, 0, 0)),
    "of a server that was gone": (
        Run(33, "server", ["b"], 2.2, 2.3, 30),
        Orphans(0, 0, 1),
    ),
    "for a worker that was gone": (
        Run(33, "server", ["c"], 2.2, 2.3, 35),
        Orphans(0, 0, 1),
    ),
    "in a worker": (Run(17, "shared", ["h"], 1.2), Orphans(0, 0, 0)),
}


@pytest.mark.parametrize("what", ORPHANS)
def test_runs_that_nobody_wants_are_counted(what: str) -> None:
    """A process is killed if it hangs and if nobody is left, and not otherwise."""
    run, expected = ORPHANS[what]
    requests = {name: replace(ASKED, name=name) for name in "abc"}
    requests["h"] = replace(ASKED, name="h", fault="hang")
    begun = {"a": Begun(17, 1.1), "b": Begun(17, 1.1), "c": Begun(19, 1.1)}

    counted = orphans(Batches([run], requests), LOST, {19: 1.5}, begun)

    assert expected == counted


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
