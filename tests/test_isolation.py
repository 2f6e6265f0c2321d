"""Does a bad call harm only itself, where the user asks for that?"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from tests.fakes import Recorder, World
from ubatch import BadBatchOutputSize, DeadlineExceeded, HandlerExit, UBatch
from ubatch.batch import Job
from ubatch.isolation import Answered, always, answer_apart


class Picky:
    """A handler that fails if it is given anything bad, and empties its list."""

    def __init__(self, bad: Iterable[int]) -> None:
        self.bad = set(bad)
        self.runs: list[list[int]] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.runs.append(items[:])
        worst = self.bad.intersection(items)
        answers = [2 * item for item in items]
        items.clear()
        if worst:
            raise ValueError(*sorted(worst))
        return answers


def picky(items: list[int]) -> list[int]:
    """Fail for what is negative; can be pickled."""
    if min(items) < 0:
        raise ValueError(min(items))
    return [2 * item for item in items]


def apart(handler: Any, size: int, wanted: Callable[[], bool] = always) -> Answered:
    """Answer as many calls, whose items are their numbers."""
    return answer_apart(Job(handler, size, [list(range(size))], {}), wanted)


def check(size: int, bad: tuple[int, ...]) -> None:
    handler = Picky(bad)
    answered = apart(handler, size)
    assert len(handler.runs) == answered.reruns + 1
    assert len(handler.runs) <= 2 * len(bad) * math.log2(size) + 1 or not bad
    for item, answer in enumerate(answered.answers):
        if item in bad:
            assert (ValueError, (item,)) == (type(answer), answer.args)
        else:
            assert 2 * item == answer


@pytest.mark.parametrize("size", range(2, 65))
def test_one_or_two_bad_calls_stand_alone(size: int) -> None:
    """The others get results, in at most 2 k log2(n) + 1 runs, wherever they are."""
    check(size, ())
    for item in range(size):
        check(size, (item,))
    step = max(1, size // 16)
    for bad in itertools.combinations(range(0, size, step), 2):
        check(size, bad)


@pytest.mark.parametrize("size", range(2, 11))
def test_the_number_of_runs_is_bounded_for_every_set_of_bad_calls(size: int) -> None:
    """Never more than 2 k log2(n) + 1; and no bad call ever gets a result."""
    for count in range(1, size + 1):
        for bad in itertools.combinations(range(size), count):
            handler = Picky(bad)
            answers = apart(handler, size).answers
            assert len(handler.runs) <= 2 * count * math.log2(size) + 1
            assert all(isinstance(answers[item], ValueError) for item in bad)
            good = [answers[item] for item in range(size) if item not in bad]
            if any(not isinstance(answer, ValueError) for answer in good):
                assert good == [2 * n for n in range(size) if n not in bad]


@pytest.mark.parametrize("size", [2, 8, 64, 1000])
def test_a_handler_that_fails_for_everything_is_recognised(size: int) -> None:
    """After as many runs as one bad call may cost it is not asked again."""
    handler = Picky(range(size))
    answered = apart(handler, size)
    assert 2 * math.ceil(math.log2(size)) + 1 == len(handler.runs)
    assert all(isinstance(answer, ValueError) for answer in answered.answers)


@pytest.mark.parametrize("most", range(1, 7))
def test_nobody_waits_so_nothing_runs_again(most: int) -> None:
    """Once all callers are gone, the search ends, wherever it is."""
    for item in range(8):
        handler = Picky([item])
        apart(handler, 8, lambda: len(handler.runs) < most)
        assert most >= len(handler.runs)


def test_an_exit_is_not_tried_again() -> None:
    """SystemExit in any run ends the search, and the batch."""

    def handler(items: list[int]) -> list[int]:
        runs.append(items)
        if len(runs) == 2:
            raise SystemExit
        raise ValueError

    runs: list[list[int]] = []
    assert isinstance(apart(handler, 8).exit, HandlerExit)
    assert 2 == len(runs)


def test_runs_before_an_exit_are_counted(world: World) -> None:
    """``reruns_total`` counts all runs beyond the first, however the last one ends."""

    def handler(items: list[int]) -> list[int]:
        runs.append(items)
        raise SystemExit("three") if len(runs) == 3 else ValueError

    runs: list[list[int]] = []
    ub = UBatch(
        4, 60.0, handler=handler, on_error="isolate", backend=world.backend,
        linger="full",
    )  # fmt: skip
    with ub:
        answers = ub.map(range(4), return_exceptions=True)
        seen = ub.stats()
    assert [HandlerExit] * 4 == [type(answer) for answer in answers]
    assert all("three" in str(answer.__cause__) for answer in answers)
    assert (4, 2) == (seen.failures_total, seen.reruns_total)


EXECUTORS: list[Callable[[], Any]] = [
    lambda: "threadpool",
    lambda: "inline",
    lambda: ProcessPoolExecutor(1, get_context("spawn")),
]


@pytest.mark.parametrize("make", EXECUTORS, ids=["threadpool", "inline", "process"])
def test_a_bad_item_fails_alone(world: World, make: Callable[[], Any]) -> None:
    """Each bad call gets its own error, the others their results, on any executor."""
    executor = make()
    ub: UBatch[int, int] = UBatch(
        10, 60.0, handler=picky, backend=world.backend, executor=executor,
        on_error="isolate", linger="full",
    )  # fmt: skip
    with ub:
        answers = ub.map([0, 1, -2, 3, 4, 5, 6, -7, 8, 9], return_exceptions=True)
        seen = ub.stats()
    if not isinstance(executor, str):
        executor.shutdown()
    assert [0, 2, 6, 8, 10, 12, 16, 18] == [
        answer for answer in answers if not isinstance(answer, Exception)
    ]
    assert [("ValueError", (-2,)), ("ValueError", (-7,))] == [
        (type(answer).__name__, answer.args)
        for answer in answers
        if isinstance(answer, Exception)
    ]
    assert (8, 2, 1) == (seen.results_total, seen.failures_total, seen.batches_total)
    assert 2 <= seen.reruns_total <= 4 * math.log2(10)


def test_by_default_a_batch_fails_whole_and_runs_once(world: World) -> None:
    """Nobody's handler is run again who did not ask for that."""
    handler = Picky([1])
    with UBatch(3, 60.0, handler=handler, backend=world.backend, linger="full") as ub:
        answers = ub.map([0, 1, 2], return_exceptions=True)
    assert [ValueError] * 3 == [type(answer) for answer in answers]
    assert ([[0, 1, 2]], 0) == (handler.runs, ub.stats().reruns_total)


def test_arguments_by_name_are_split_alike(world: World) -> None:
    """Each run gets, of every list, what belongs to its calls."""

    def handler(items: list[int], *, to: list[int]) -> list[tuple[int, int]]:
        assert len(items) == len(to)
        if 3 in items:
            raise ValueError
        return list(zip(items, to))

    ub = UBatch(
        5, 60.0, handler=handler, on_error="isolate", backend=world.backend,
        linger="full",
    )  # fmt: skip
    with ub:
        calls = [ub.submit(n, to=-n) for n in range(5)]
        ends = [call.exception() or call.result() for call in calls]
    assert [(0, 0), (1, -1), (2, -2), (4, -4)] == ends[:3] + ends[4:]
    assert isinstance(ends[3], ValueError)


def test_a_wrong_number_of_results_is_isolated_too(world: World) -> None:
    """A handler that drops bad items fails those alone."""
    ub = UBatch(
        4, 60.0, handler=lambda items: [item for item in items if item],
        on_error="isolate", backend=world.backend, linger="full",
    )  # fmt: skip
    with ub:
        answers = ub.map([1, 0, 2, 3], return_exceptions=True)
    assert [1, 2, 3] == [answers[n] for n in (0, 2, 3)]
    assert isinstance(answers[1], BadBatchOutputSize)


def test_it_is_logged_once_and_says_what_came_of_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """One line per failed batch, with the sizes, the first error and no item."""
    ub = UBatch(
        8, 60.0, handler=Picky([5]), on_error="isolate", backend=world.backend,
        linger="full", name="picky",
    )  # fmt: skip
    with caplog.at_level(logging.ERROR, "ubatch"), ub:
        ub.map(range(8), return_exceptions=True)
        world.until(lambda: caplog.messages)
    (message,) = caplog.messages
    assert "picky: a batch of 8 calls failed; run again in parts" in message
    assert message.endswith("only 1 did: ValueError")


def test_a_handler_that_fails_once_answers_all(world: World) -> None:
    """What works when it is run again is answered."""

    def handler(items: list[int]) -> list[int]:
        runs.append(items)
        if len(runs) == 1:
            raise OSError("once")
        return items

    runs: list[list[int]] = []
    ub = UBatch(
        6, 60.0, handler=handler, on_error="isolate", backend=world.backend,
        linger="full",
    )  # fmt: skip
    with ub:
        assert list(range(6)) == ub.map(range(6))


def test_errors_keep_no_items_of_others_alive(world: World) -> None:
    """Whoever keeps an error keeps the handler's frames, and no more."""

    class Item:
        def __init__(self, bad: bool) -> None:
            self.bad = bad

    def handler(items: list[Item]) -> list[int]:
        bad = any(item.bad for item in items)
        items = []
        if bad:
            raise ValueError
        return [0, 0, 0, 0][: len(items)] or [0]

    ub = UBatch(
        4, 60.0, handler=handler, on_error="isolate", backend=world.backend,
        linger="full",
    )  # fmt: skip
    items = [Item(bad=n == 2) for n in range(4)]
    references = [weakref.ref(item) for item in items]
    with ub:
        kept = ub.map(items, return_exceptions=True)
        items.clear()
        assert any(isinstance(one, ValueError) for one in kept)

        def freed() -> bool:
            gc.collect()
            return not any(reference() for reference in references)

        world.until(freed)


def test_runs_end_when_the_deadline_has_passed(world: World) -> None:
    """Callers whose time is up while parts are run again are told, and left alone."""
    gate = world.gate()

    def handler(items: list[int]) -> list[int]:
        runs.append(items)
        if len(runs) == 2:
            gate.wait()
        raise ValueError

    runs: list[list[int]] = []
    ub = UBatch(
        8, 60.0, handler=handler, on_error="isolate", backend=world.backend,
        linger="full",
    )  # fmt: skip
    with ub:
        late = ub.with_options(deadline=0.05)
        answers = late.map(range(8), return_exceptions=True)
        assert [DeadlineExceeded] * 8 == [type(answer) for answer in answers]
        gate.open()
    assert 2 == len(runs)


def test_a_good_batch_is_run_once(world: World) -> None:
    """Isolation costs nothing where nothing fails."""
    handler = Recorder()
    with UBatch(
        5, 60.0, handler=handler, on_error="isolate", backend=world.backend
    ) as ub:
        assert list("01234") == ub.map(range(5))
    assert (1, 0) == (len(handler.batches), ub.stats().reruns_total)
