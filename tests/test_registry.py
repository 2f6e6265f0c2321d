"""Are all the batchers that are alive known, and no others?"""

from __future__ import annotations

import gc
import sys

import pytest

from tests.fakes import Recorder, World
from ubatch import UBatch, registry, ubatch_decorator


def names() -> list[str]:
    """Return the names of the batchers that these tests have made."""
    gc.collect()
    known = [each.name for each in registry.alive()]
    return [name for name in known if name.startswith("registry")]


def test_a_batcher_is_known_as_long_as_it_lives() -> None:
    """From its construction on, called or not, until nobody holds it any more."""
    first = UBatch(1, 0.0, handler=Recorder(), name="registry 1")
    second = UBatch(1, 0.0, name="registry 2")
    assert ["registry 1", "registry 2"] == names()
    del first
    assert ["registry 2"] == names()
    del second
    assert [] == names()


def test_a_batcher_that_is_forgotten_leaves_nothing_behind() -> None:
    """Not even a dead reference: instances with batchers may come and go for ever."""
    gc.collect()
    before = len(registry._alive)
    for _ in range(100):
        UBatch(1, 0.0)
    gc.collect()
    assert before == len(registry._alive)


def test_the_batchers_of_decorated_functions_and_instances_are_known() -> None:
    """A method has one for each instance that was asked for it."""

    class Model:
        @ubatch_decorator(1, 0.0, name="registry")
        def predict(self, items: list[int]) -> list[int]:
            return items

    models = [Model(), Model()]
    assert 1 == len(names())  # the function's own
    assert [1, 1] == [model.predict.ubatch(1) for model in models]
    assert 3 == len(names())
    models.pop()
    assert 2 == len(names())


class Unhashable(UBatch[int, int]):
    """A batcher that compares as somebody liked."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashable)


def test_batchers_that_are_equal_are_told_apart() -> None:
    """A subclass may compare as it likes, and need not be hashable."""
    both = [Unhashable(1, 0.0, name="registry") for _ in range(2)]
    assert len(both) == len(names())


@pytest.mark.concurrency
def test_batchers_may_be_made_and_forgotten_while_somebody_looks(
    threads: World,
) -> None:
    """Native threads make and drop batchers; a look neither fails nor misses one."""
    kept = {id(each): each for each in (UBatch(1, 0.0) for _ in range(500))}
    ended: list[int] = []

    def make() -> None:
        for _ in range(200):
            [UBatch(1, 0.0) for _ in range(20)]
        ended.append(1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # or a look would hardly ever be interrupted
    try:
        makers = [threads.spawn(make) for _ in range(4)]
        while len(ended) < len(makers):
            assert kept.keys() <= {id(each) for each in registry.alive()}
        for maker in makers:
            maker.result()
    finally:
        sys.setswitchinterval(interval)
