"""Do arrays arrive as they were sent, however many travel as one?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ubatch.arrays import stack, unstack
from ubatch.wire import pack, unpack

MAKERS: dict[str, Callable[[], Any]] = {
    "float64": lambda: np.arange(6.0).reshape(2, 3),
    "a number": lambda: np.float64(3),
    "a truth": lambda: np.bool_(True),
    "float16": lambda: np.ones(2, "e"),
    "long double": lambda: np.ones(2, "g"),
    "complex": lambda: np.ones(2, "c16"),
    "another order of bytes": lambda: np.arange(2, dtype=">i4"),
    "another order of items": lambda: np.asfortranarray(np.arange(6).reshape(2, 3)),
    "empty": lambda: np.zeros((0, 3)),
    "text": lambda: np.array(["ab", "c"]),
    "bytes": lambda: np.array([b"ab", b"c"]),
    "dates": lambda: np.array(["2020-01-01"], "M8[D]"),
    "records": lambda: np.zeros(2, [("a", "i4"), ("b", "f8")]),
    "with metadata": lambda: np.zeros(2, np.dtype("i4", metadata={"of": 1})),
    "objects": lambda: np.array([1, "a"], object),
    "larger than what is stacked": lambda: np.zeros(4096),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_arrays_of_every_type_arrive_as_they_were(make: Callable[[], Any]) -> None:
    """Stacked, sent, and taken apart again: same type, shape, numbers; writable."""
    items = [make() for _ in range(5)]

    found = unstack(unpack(pack(stack(items))))

    assert len(found) == 5
    for item, sent in zip(found, items):
        assert type(item) is type(sent)
        assert (item.dtype, item.shape) == (sent.dtype, sent.shape)
        assert (item == sent).all()
        assert not isinstance(item, np.ndarray) or item.flags.writeable


def test_what_differs_is_not_stacked() -> None:
    """One array of another shape or type, and all stay as they are."""
    for other in (np.zeros(3), np.zeros(2, "f4"), [0.0, 0.0], np.float64(0)):
        items = [*(np.zeros(2) for _ in range(4)), other]
        assert stack(items) is items
