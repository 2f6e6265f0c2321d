"""Does a decorated function stay what it was, and batch besides?"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from typing import Any

import pytest

from tests.fakes import World
from ubatch import DeadlineExceeded, ProcessExecutor, Stopped, ubatch_decorator


@ubatch_decorator(max_size=5, timeout=0.01)
def squared(xs: list[int]) -> list[int]:
    """Square numbers."""
    return [x * x for x in xs]


def test_the_function_still_takes_a_list() -> None:
    """Called, it is the function it was, metadata included."""
    assert [1, 4] == squared([1, 2])
    assert ("squared", "Square numbers.") == (
        squared.__name__,  # type: ignore[attr-defined]
        squared.__doc__,
    )
    assert squared.__wrapped__([3]) == [9]  # type: ignore[attr-defined]


def test_it_is_pickled_by_name() -> None:
    """As functions are: a process pool can be handed one."""
    assert pickle.loads(pickle.dumps(squared)) is squared
    assert copy.deepcopy(squared) is squared


def test_it_batches(world: World) -> None:
    """ubatch, submit, map, stats, with_options and stop are there."""

    @ubatch_decorator(9, 0.0, backend=world.backend, name="double")
    def double(xs: list[int]) -> list[int]:
        return [2 * x for x in xs]

    assert 4 == double.ubatch(2)
    assert 6 == double.submit(3).result(30)
    assert [2, 4] == double.map([1, 2])
    assert 8 == double.with_options(deadline=30).ubatch(4)
    assert ("double", 5) == (double.stats().name, double.stats().results_total)
    double.stop()
    with pytest.raises(Stopped):
        double.ubatch(1)
    double.start()
    assert 2 == double.ubatch(1)
    double.stop()


class Model:
    """Unhashable, and without a __dict__, to make it hard."""

    __slots__ = ("factor", "__weakref__")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __eq__(self, other: object) -> bool:
        return True

    @ubatch_decorator(9, 0.05, linger="full")
    def predict(self, xs: list[int]) -> list[int]:
        return [self.factor * x for x in xs]


def test_each_instance_batches_alone(world: World) -> None:
    """Calls of two instances share no batch, and a method is still a method."""
    models = [Model(2), Model(3)]
    assert [2, 4] == models[0].predict([1, 2])
    callers = [world.spawn(m.predict.ubatch, n) for n in (1, 2) for m in models]
    assert [2, 3, 4, 6] == [c.result() for c in callers]
    for model in models:
        assert {2: 1} == model.predict.stats().batch_sizes
        assert "predict" == model.predict.__name__
        model.predict.stop()


def test_the_function_is_the_handler() -> None:
    """Another one beside it is refused, with what to do."""
    more: Any = {"handler": list}
    with pytest.raises(TypeError, match="the decorated function is the handler"):
        ubatch_decorator(4, 0.0, **more)


def test_a_method_has_no_handler_in_another_process() -> None:
    """It is refused with its class, and told what to write instead."""
    elsewhere = ubatch_decorator(4, 0.0, executor=ProcessExecutor("module:factory"))
    with pytest.raises((TypeError, RuntimeError)) as refused:  # until Python 3.12

        class Model:
            @elsewhere
            def predict(self, items: list[int]) -> list[int]: ...

    error = refused.value.__cause__ or refused.value
    assert TypeError is type(error)
    assert re.search(r"Model\.predict would be a method.*staticmethod", str(error))

    class Other:
        @staticmethod
        @elsewhere
        def predict(items: list[int]) -> list[int]: ...

    assert Other().predict.stats().calls_total == 0


def test_a_method_does_not_keep_its_instance_alive() -> None:
    """A dropped instance goes away, and its batcher with it."""
    model = Model(2)
    assert 4 == model.predict.ubatch(2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert {} == Model.__dict__["predict"]._instances
    # The fixture sees to it that no thread and no greenlet is left.


@pytest.mark.concurrency
def test_an_accepted_call_of_a_dropped_instance_is_answered() -> None:
    """A call that waits keeps the instance it needs."""
    model = Model(5)
    future = model.predict.submit(2)
    gone = weakref.ref(model)
    del model
    assert 10 == future.result(30)
    del future
    gc.collect()
    assert gone() is None


def test_the_decorator_passes_options_on(world: World) -> None:
    """Options of UBatch are options of the decorator."""
    gate = world.gate()

    @ubatch_decorator(1, 0.0, backend=world.backend, deadline=0.01)
    def slow(xs: list[Any]) -> list[Any]:
        gate.wait()
        return xs

    with pytest.raises(DeadlineExceeded):
        slow.ubatch(1)
    gate.open()
    slow.stop()
