"""Does a fork leave the parent its model process, and get the child its own?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.children import FileGate, once, run

pytestmark = once

LEGS = ["thread", "gevent", "patched"]
WHERE = ["main", "caller"]
"""A fork happens in the main greenlet or thread, or in another one."""


def fork_while_busy(leg: str, record: str, gate: str, where: str, retry: bool) -> Any:
    """Fork while a batch runs in a model process and others wait; tell who ran what."""
    import os
    from functools import partial

    import psutil

    from tests.apps import models
    from tests.apps.inside import Forked, world_of

    world = world_of(leg)
    from ubatch import BackendError, ProcessExecutor, UBatch

    executor = ProcessExecutor(partial(models.gated, record, gate), retry=retry)
    backend: Any = world.backend
    ub: UBatch[str, str] = UBatch(8, 0.0, executor=executor, backend=backend).start()
    callers = [world.spawn(ub.ubatch, "wait")]
    world.until(lambda: models.entries(record))
    callers += [world.spawn(ub.ubatch, item) for item in "bc"]
    future = ub.submit("d")
    world.until(lambda: ub.stats().pending == 3)
    (theirs,) = [child.pid for child in psutil.Process().children()]
    collector: Any = ub._collector

    def in_the_fork() -> Any:
        refused = ""
        try:
            future.result()
        except BackendError as error:
            refused = str(error)
        counted = ub.stats().calls_total
        own = [ub.ubatch(item) for item in "xyz"]
        if leg == "gevent":  # what the parent waits for comes to its copy, too
            opened = os.open(gate, os.O_RDWR)
            world.until(lambda: not collector._executor._claimed)
            os.close(opened)
        (mine,) = [child.pid for child in psutil.Process().children()]
        ub.stop()
        return [refused, counted, own, mine, psutil.pid_exists(theirs)]

    def fork() -> Any:
        return Forked(in_the_fork).result()

    found = fork() if where == "main" else world.spawn(fork).result()
    opened = os.open(gate, os.O_RDWR)
    answers = [caller.result() for caller in callers] + [future.result(30)]
    answers.append(ub.ubatch("last"))
    os.close(opened)
    ub.stop()
    refused, counted, own, mine, alive = found
    ran: dict[int, list[Any]] = {theirs: [], mine: []}
    for pid, items in models.entries(record):
        ran[pid].append(items)
    return {
        "refused": refused,
        "counted": counted,
        "own": own,
        "alive": alive,
        "answers": answers,
        "there": sorted(sum(ran[theirs], [])),
        "here": ran[mine],
    }


@pytest.mark.concurrency
@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("leg", LEGS)
def test_calls_at_the_fork_stay_with_the_parent(
    leg: str, where: str, retry: bool, tmp_path: Path
) -> None:
    """What is out at the fork is answered to the parent, by the process it was sent to;
    the child has a process of its own, and leaves the parent's alone."""
    with FileGate(tmp_path / "gate") as gate:
        record = str(tmp_path / "record")
        seen = run(fork_while_busy, leg, record, gate.path, where, retry)
    assert "before the process forked" in seen["refused"]
    assert (0, ["X", "Y", "Z"], True) == (seen["counted"], seen["own"], seen["alive"])
    assert ["WAIT", "B", "C", "D", "LAST"] == seen["answers"]
    assert ["b", "c", "d", "last", "wait"] == seen["there"]
    assert [["x"], ["y"], ["z"]] == seen["here"]


def fork_while_loading(leg: str, record: str, gate: str, child_lives_on: bool) -> Any:
    """Fork while the model process loads; tell who was answered."""
    import os
    from functools import partial

    import gevent
    import psutil

    from tests.apps import models
    from tests.apps.inside import Forked, world_of

    world = world_of(leg)
    from ubatch import ProcessExecutor, UBatch

    executor = ProcessExecutor(partial(models.slow, record, gate, gate))
    backend: Any = world.backend
    ub: UBatch[str, str] = UBatch(8, 0.0, executor=executor, backend=backend).start()
    caller = world.spawn(ub.ubatch, "a")
    world.until(lambda: models.entries(record))
    (theirs,) = [child.pid for child in psutil.Process().children()]

    def in_the_fork() -> Any:
        if world.is_gevent:
            while models.entries(record)[-1][1] != ["a"]:
                gevent.sleep(0.001)  # the copies of the parent's greenlets run
        mine = ub.ubatch("x") if child_lives_on else ""
        ub.stop()
        return [mine, psutil.pid_exists(theirs)]

    child = Forked(in_the_fork)
    opened = os.open(gate, os.O_RDWR)
    answers = [caller.result()]
    found = child.result()
    answers.append(ub.ubatch("b"))
    os.close(opened)
    ub.stop()
    by_them = [items for pid, items in models.entries(record) if pid == theirs]
    return [answers, found, by_them]


@pytest.mark.concurrency
@pytest.mark.parametrize("child_lives_on", [False, True])
@pytest.mark.parametrize("leg", LEGS)
def test_a_process_that_loads_at_the_fork_stays_with_the_parent(
    leg: str, child_lives_on: bool, tmp_path: Path
) -> None:
    """Nothing in the child that was waiting for it ends it."""
    with FileGate(tmp_path / "gate") as gate:
        record = str(tmp_path / "record")
        args = leg, record, gate.path, child_lives_on
        answers, found, by_them = run(fork_while_loading, *args)
    assert ["A", "B"] == answers
    assert ["X" if child_lives_on else "", True] == found
    assert [["loads"], ["a"], ["b"]] == by_them


def fork_while_stopping(leg: str, record: str, gate: str) -> Any:
    """Fork while stop() waits for a batch; tell whether that was answered."""
    import os
    from functools import partial

    from tests.apps import models
    from tests.apps.inside import Forked, world_of

    world = world_of(leg)
    from ubatch import ProcessExecutor, UBatch

    executor: Any = ProcessExecutor(partial(models.gated, record, gate))
    backend: Any = world.backend
    ub: UBatch[str, str] = UBatch(8, 0.0, executor=executor, backend=backend).start()
    caller = world.spawn(ub.ubatch, "wait")
    world.until(lambda: models.entries(record))
    collector: Any = ub._collector
    for each in collector._executor._keepers:  # as a reload does
        each.retire()

    def in_the_fork() -> Any:
        if leg == "gevent":  # where the parent does not take the answer first
            opened = os.open(gate, os.O_RDWR)
            world.until(lambda: not collector._executor._claimed)
            os.close(opened)
        return "done"

    found = Forked(in_the_fork).result()
    opened = os.open(gate, os.O_RDWR)
    answers = [found, caller.result()]
    os.close(opened)
    ub.stop()
    return answers


@pytest.mark.concurrency
@pytest.mark.parametrize("leg", LEGS)
def test_a_process_that_ends_after_its_batch_does_so_beside_a_fork(
    leg: str, tmp_path: Path
) -> None:
    """What ends it is the parent's to do, after the answer."""
    with FileGate(tmp_path / "gate") as gate:
        record = str(tmp_path / "record")
        assert ["done", "WAIT"] == run(fork_while_stopping, leg, record, gate.path)


def fork_and_kill_greenlets(record: str, gate: str) -> Any:
    """End all greenlets in a fork; tell whether the parent's process is still there."""
    from functools import partial

    import gevent

    from tests.apps import models
    from tests.apps.inside import Forked, world_of

    world = world_of("gevent")
    from ubatch import ProcessExecutor, UBatch

    executor = ProcessExecutor(partial(models.gated, record, gate))
    ub: UBatch[str, str] = UBatch(8, 0.0, executor=executor, backend="gevent").start()
    first = ub.ubatch("first")

    def in_the_fork() -> str:
        import gc

        for found in gc.get_objects():
            if isinstance(found, gevent.Greenlet):
                found.kill()
        return "done"

    done = Forked(in_the_fork).result()
    answers = [first, done, ub.ubatch("next")]
    world.until(lambda: len(models.entries(record)) == 2)
    ub.stop()
    return [answers, len({pid for pid, _ in models.entries(record)})]


def test_greenlets_that_end_in_a_fork_end_no_process(tmp_path: Path) -> None:
    """They are copies, and so is what they hold."""
    with FileGate(tmp_path / "gate") as gate:
        seen = run(fork_and_kill_greenlets, str(tmp_path / "record"), gate.path)
    assert [["FIRST", "done", "NEXT"], 1] == seen


def fork_with_a_large_result(leg: str) -> Any:
    """Fork with an array that came through shared memory; tell what is left of it."""
    import os

    import numpy

    from tests.apps.inside import Forked, world_of

    world = world_of(leg)
    from ubatch import ProcessExecutor, UBatch

    executor = ProcessExecutor("tests.apps.models:echo")
    backend: Any = world.backend
    ub: UBatch[Any, Any] = UBatch(1, 0.0, executor=executor, backend=backend).start()
    kept = [ub.ubatch(numpy.zeros(100_000))]
    reader, writer = os.pipe()

    def in_the_fork() -> list[float]:
        os.read(reader, 1)
        return numpy.unique(kept[0]).tolist()  # type: ignore[no-any-return]

    child = Forked(in_the_fork)
    kept.clear()
    for number in range(1, 9):
        assert (ub.ubatch(numpy.full(100_000, float(number))) == number).all()
    os.write(writer, b"x")
    found = child.result()
    ub.stop()
    return found


@pytest.mark.parametrize("leg", LEGS)
def test_a_result_that_a_fork_has_copied_does_not_change(leg: str) -> None:
    """The parent lets go of it; the memory that the child reads is not used again."""
    assert [0.0] == run(fork_with_a_large_result, leg)
