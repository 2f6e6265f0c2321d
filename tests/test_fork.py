"""Does a batcher survive a fork, on both sides of it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.children import gunicorn, not_on_libuv, once, run

pytestmark = once

PROBE = "tests.apps.probe:app"
LEGS = ["thread", "gevent", "patched"]
EXECUTORS = ["threadpool", "inline"]
WHERE = ["main", "caller"]
"""A fork happens in the main greenlet or thread, or in another one."""


def made_and_started(leg: str) -> dict[str, Any]:
    """Make batchers in every way; tell what that left behind."""
    import os
    import sys
    import threading

    if leg != "thread":
        from gevent import monkey

        if leg == "patched":
            monkey.patch_all()

    def left() -> dict[str, Any]:
        hub = None
        if "gevent" in sys.modules:
            hub = sys.modules["gevent._hub_local"].get_hub_if_exists()
        return {
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "known threads": threading.active_count(),
            "hub": repr(hub),
        }

    before = left()
    import ubatch

    class Model:
        @ubatch.ubatch_decorator(4, 0.01)
        def predict(self, numbers: list[int]) -> list[int]:
            return numbers

    @ubatch.ubatch_decorator(max_size=4, timeout=0.01, workers=2)
    def same(numbers: list[int]) -> list[int]:
        return numbers

    model = Model()
    assert model.predict.stats().calls_total == 0
    batchers = []
    for executor in "threadpool", "hub_threadpool", "inline":
        ub: Any = ubatch.UBatch(4, 0.01, executor=executor)  # type: ignore
        ub.set_handler(list)
        batchers.append(ub.start())
        repr(ub), ub.stats(), ub.backend, ub.with_options(deadline=1.0)
    after = left()
    for ub in batchers:
        ub.stop()
        ub.start()
    return {"before": before, "after": after, "at the end": left()}


@pytest.mark.parametrize("leg", LEGS)
def test_nothing_is_created_before_the_first_call(leg: str) -> None:
    """Import, decoration, construction, start and stop leave no trace."""
    seen = run(made_and_started, leg)
    assert seen["before"] == seen["after"] == seen["at the end"]
    assert (1, "None") == (seen["after"]["threads"], seen["after"]["hub"])


def warm_then_fork(leg: str, path: str, executor: str, where: str) -> dict[str, Any]:
    """Call, fork, call in the child; tell what the child found."""
    import os
    from time import perf_counter

    from tests.apps.inside import Forked, Record, world_of

    world = world_of(leg)
    from ubatch import UBatch

    record = Record(path)

    def handler(numbers: list[int]) -> list[int]:
        record.add(numbers)
        return [number * number for number in numbers]

    ub: Any = UBatch(8, 0.01, handler=handler, backend=world.backend, executor=executor)
    ub.start()
    assert [0, 1, 4] == [ub.ubatch(number) for number in range(3)]

    def in_the_fork() -> dict[str, Any]:
        counted = ub.stats()
        begin = perf_counter()
        answer = ub.ubatch(7)
        seconds = perf_counter() - begin
        more = [world.spawn(ub.ubatch, number) for number in range(20)]
        assert [n * n for n in range(20)] == [caller.result() for caller in more]
        after = ub.stats()
        ub.stop()
        return {
            "before": [counted.calls_total, counted.batches_total, counted.backend],
            "answer": answer,
            "seconds": seconds,
            "after": [after.calls_total, after.results_total, after.pending],
            "handled": record.of(os.getpid()),
        }

    def fork() -> dict[str, Any]:
        found = Forked(in_the_fork).result()
        found["in the parent"] = [ub.ubatch(9), ub.stats().calls_total]
        return found

    return fork() if where == "main" else world.spawn(fork).result()


@pytest.mark.concurrency
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("leg", LEGS)
def test_a_fork_after_a_warm_call_starts_afresh(
    leg: str, executor: str, where: str, tmp_path: Path
) -> None:
    """The child of a process that has called answers at once, and counts from zero."""
    seen = run(warm_then_fork, leg, str(tmp_path / "record"), executor, where)
    assert [0, 0, None] == seen["before"]
    assert 49 == seen["answer"]
    assert seen["seconds"] < 1.0
    assert [21, 21, 0] == seen["after"]
    assert [7] == seen["handled"][0]
    assert sorted([7, *range(20)]) == sorted(sum(seen["handled"], []))
    assert [81, 4] == seen["in the parent"]


def fork_while_busy(leg: str, path: str, executor: str, where: str) -> dict[str, Any]:
    """Fork while a batch runs and others wait; tell who ran what."""
    import os
    from time import perf_counter

    from tests.apps.inside import Forked, Record, world_of

    world = world_of(leg)
    from ubatch import BackendError, UBatch

    record, gate, parent = Record(path), world.gate(executor), os.getpid()

    def handler(items: list[str]) -> list[str]:
        record.add(items)
        if os.getpid() == parent:
            gate.wait()
        return [item.upper() for item in items]

    options: Any = {"executor": executor, "backend": world.backend, "linger": "now"}
    ub = UBatch(8, 0.01, handler=handler, **options).start()
    callers = [world.spawn(ub.ubatch, "a")]
    world.until(lambda: ub.stats().running == 1)
    callers += [world.spawn(ub.ubatch, item) for item in "bc"]
    futures = [ub.submit(item) for item in "de"]
    callers.append(world.spawn(lambda: "".join(ub.map("fg"))))
    world.until(lambda: ub.stats().pending == 6)

    def in_the_fork() -> dict[str, Any]:
        errors = []
        begin = perf_counter()
        for ask in (
            futures[0].result,
            futures[0].exception,
            futures[1].cancel,
            lambda: futures[1].add_done_callback(print),
            lambda: futures[1].result(timeout=30.0),
        ):
            try:
                ask()
            except BackendError as error:
                errors.append(str(error))
        seconds = perf_counter() - begin
        counted = ub.stats()
        own = [ub.ubatch(item) for item in "xyz"]
        ub.stop()
        return {
            "errors": errors,
            "seconds": seconds,
            "counted": [counted.pending, counted.running, counted.calls_total],
            "own": own,
            "handled": record.of(os.getpid()),
        }

    def fork() -> Any:
        return Forked(in_the_fork).result()

    found = fork() if where == "main" else world.spawn(fork).result()
    gate.open()
    found["parent"] = [caller.result() for caller in callers]
    found["parent's futures"] = [future.result(30.0) for future in futures]
    found["parent handled"] = record.of(parent)
    stats = ub.stats()
    found["parent's calls"] = [stats.calls_total, stats.results_total, stats.pending]
    ub.stop()
    return dict(found)


@pytest.mark.concurrency
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("leg", LEGS)
def test_calls_at_the_fork_stay_with_the_parent(
    leg: str, executor: str, where: str, tmp_path: Path
) -> None:
    """What runs or waits at the fork is answered in the parent, and run there only."""
    seen = run(fork_while_busy, leg, str(tmp_path / "record"), executor, where)
    assert ["A", "B", "C", "FG"] == seen["parent"]
    assert ["D", "E"] == seen["parent's futures"]
    assert ["a"] == seen["parent handled"][0]
    assert list("abcdefg") == sorted(sum(seen["parent handled"], []))
    assert [7, 7, 0] == seen["parent's calls"]

    assert ["X", "Y", "Z"] == seen["own"]
    assert [["x"], ["y"], ["z"]] == seen["handled"]
    assert [0, 0, 0] == seen["counted"]


@pytest.mark.parametrize("leg", LEGS)
def test_a_future_of_the_parent_is_refused_in_the_child(
    leg: str, tmp_path: Path
) -> None:
    """Asked in a child, a future of the parent's says at once that it is not there."""
    seen = run(fork_while_busy, leg, str(tmp_path / "record"), "threadpool", "main")
    assert 5 == len(seen["errors"])
    assert all("before the process forked" in error for error in seen["errors"])
    assert seen["seconds"] < 1.0


def fork_while_lingering(leg: str, path: str, executor: str, where: str) -> Any:
    """Fork while a batch waits for more; tell who ran it."""
    import os

    from tests.apps.inside import Forked, Record, world_of

    world = world_of(leg)
    from ubatch import UBatch

    record, parent = Record(path), os.getpid()

    def handler(items: list[str]) -> list[str]:
        record.add(items)
        return [item.upper() for item in items]

    options: Any = {"executor": executor, "backend": world.backend, "linger": "full"}
    ub = UBatch(8, 0.2, handler=handler, **options).start()
    callers = [world.spawn(ub.ubatch, item) for item in "abc"]
    world.until(lambda: ub.stats().pending == 3)

    def in_the_fork() -> Any:
        # By the time this is answered, what the parent began would be due too.
        return [ub.ubatch("x"), record.of(os.getpid())]

    def fork() -> Any:
        return Forked(in_the_fork).result()

    found = fork() if where == "main" else world.spawn(fork).result()
    results = [caller.result() for caller in callers]
    return [*found, results, [sorted(items) for items in record.of(parent)]]


@pytest.mark.concurrency
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("leg", LEGS)
def test_a_batch_that_lingers_at_the_fork_stays_with_the_parent(
    leg: str, executor: str, where: str, tmp_path: Path
) -> None:
    """A batch that is open at the fork closes in the parent, and nowhere else."""
    seen = run(fork_while_lingering, leg, str(tmp_path / "record"), executor, where)
    assert ["X", [["x"]], ["A", "B", "C"], [["a", "b", "c"]]] == seen


def done_before_the_fork(leg: str) -> Any:
    """Fork with futures that are done, and ask them in the child."""
    from tests.apps.inside import Forked, world_of

    world = world_of(leg)
    from ubatch import UBatch

    def handler(numbers: list[int]) -> list[Any]:
        return [number or ValueError("zero") for number in numbers]

    with UBatch(8, 0.01, handler=handler, backend=world.backend) as ub:
        good, bad = ub.submit(5), ub.submit(0)
        assert good.result(30.0) == 5
        assert isinstance(bad.exception(30.0), ValueError)

        def in_the_fork() -> list[Any]:
            called: list[Any] = []
            good.add_done_callback(lambda future: called.append(future.result()))
            return [good.result(), repr(bad.exception()), good.cancel(), called]

        return Forked(in_the_fork).result()


@pytest.mark.parametrize("leg", LEGS)
def test_what_was_answered_before_the_fork_stays_answered(leg: str) -> None:
    """A result that was there at the fork is there in the child."""
    assert [5, "ValueError('zero')", False, [5]] == run(done_before_the_fork, leg)


def fork_of_a_fork(leg: str, path: str) -> Any:
    """Call and fork three deep; return each process's counts, oldest last."""
    import os

    from tests.apps.inside import Forked, Record, world_of

    world = world_of(leg)
    from ubatch import UBatch

    record = Record(path)

    def handler(items: list[str]) -> list[str]:
        record.add(items)
        return [item.upper() for item in items]

    ub = UBatch(8, 0.01, handler=handler, backend=world.backend).start()

    def generation(number: int) -> list[Any]:
        first = ub.ubatch(f"{number} before")
        older = Forked(lambda: generation(number + 1)).result() if number < 3 else []
        again = ub.ubatch(f"{number} after")
        counted = ub.stats().calls_total
        return [*older, [first, again, counted, record.of(os.getpid())]]

    return generation(0)


pools_survive_forks = not_on_libuv(
    "gevent drops a watcher when it remakes a pool in a fork's fork: memory corruption"
)


@pytest.mark.parametrize(
    "leg",
    [
        "thread",
        *(pytest.param(leg, marks=pools_survive_forks) for leg in LEGS[1:]),
    ],
)
def test_a_fork_of_a_fork_is_a_process_like_any_other(leg: str, tmp_path: Path) -> None:
    """Every generation runs its own calls, before and after it forks."""
    seen = run(fork_of_a_fork, leg, str(tmp_path / "record"))
    assert [
        [f"{n} BEFORE", f"{n} AFTER", 2, [[f"{n} before"], [f"{n} after"]]]
        for n in (3, 2, 1, 0)
    ] == seen


def fork_storm(leg: str, executor: str) -> Any:
    """Fork 20 times under load, and call in each child; return what was answered."""
    from tests.apps.inside import Forked, world_of

    world = world_of(leg)
    from ubatch import UBatch

    def squares(numbers: list[int]) -> list[int]:
        return [number * number for number in numbers]

    ub: Any = UBatch(
        8, 0.001, handler=squares, backend=world.backend, executor=executor
    )
    ub.start()
    enough = False
    answered = 0

    def load(first: int) -> None:
        nonlocal answered
        number = first
        while not enough:
            assert ub.ubatch(number) == number * number
            answered += 1
            number += 4

    load_makers = [world.spawn(load, number) for number in range(4)]
    forks = []
    for number in range(20):
        before = answered
        world.until(lambda: answered > before)
        forks.append(Forked(lambda: [ub.ubatch(number), ub.map(range(5))]))
    results = [fork.result() for fork in forks]
    before = answered
    world.until(lambda: answered > before)
    enough = True
    for load_maker in load_makers:
        load_maker.result()
    ub.stop()
    return results


@pytest.mark.concurrency
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "leg",
    [
        *("thread", "gevent"),
        pytest.param(
            "patched",
            marks=not_on_libuv(
                "a busy hub of gevent's may miss that a child has ended"
            ),
        ),
    ],
)
def test_twenty_forks_under_load_all_answer(leg: str, executor: str) -> None:
    """Whatever the parent is doing when it forks, the child can call at once."""
    seen = run(fork_storm, leg, executor)
    assert [[n * n, [0, 1, 4, 9, 16]] for n in range(20)] == seen


def exit_in_the_fork(leg: str) -> Any:
    """Fork with calls under way; the child ends like any program."""
    import os
    import sys

    from tests.apps.inside import world_of

    world = world_of(leg)
    from tests.fakes import Gate
    from ubatch import UBatch

    gate, parent = Gate(), os.getpid()

    def handler(items: list[str]) -> list[str]:
        if os.getpid() == parent:
            gate.wait()
        return items

    ub = UBatch(8, 0.01, handler=handler, backend=world.backend).start()
    callers = [world.spawn(ub.ubatch, item) for item in "abc"]
    world.until(lambda: ub.stats().running)
    child = os.fork()
    if not child:
        assert ub.ubatch("x") == "x"
        sys.exit(7)  # with a worker of its own, and the parent's calls half done
    status = os.waitpid(child, 0)[1]
    gate.open()
    return [os.waitstatus_to_exitcode(status), [c.result() for c in callers]]


@pytest.mark.parametrize("leg", LEGS)
def test_a_forked_child_ends_like_any_program(leg: str) -> None:
    """A child exits with its own code and in silence, whatever the parent had begun."""
    assert [7, ["a", "b", "c"]] == run(exit_in_the_fork, leg)


@pytest.mark.server
@pytest.mark.parametrize("patch", ["", "1"])
@pytest.mark.parametrize("kind", ["gevent", "gthread"])
def test_preload_after_a_warm_call(kind: str, patch: str, tmp_path: Path) -> None:
    """With calls made in the master before the fork, both workers answer everything."""
    if (kind, patch) == ("gthread", "1"):
        pytest.skip("nobody patches for native threads")
    options = "-k", kind, "-w", "2", "--preload", "--threads", "32"
    with gunicorn(tmp_path / "log", PROBE, *options, WARM="3", PATCH=patch) as server:
        pids = set()

        def both_answered() -> bool:
            answers = [
                asked.result()
                for asked in server.ask([f"/square?n={n}" for n in range(20)])
            ]
            assert [(200, n * n) for n in range(20)] == [
                (answer.status, answer.body["result"]) for answer in answers
            ]
            pids.update(answer.body["pid"] for answer in answers)
            return len(pids) == 2

        server.until(both_answered)
        seen = server.get("/seen").body
    backend = "gevent" if kind == "gevent" else "thread"
    assert backend == seen["backend"]
    assert seen["calls"] == seen["results"] == sum(seen["handled"])
    assert 1 == sum("backend" in line for line in seen["lines"])
