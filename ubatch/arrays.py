"""How do many small arrays travel as one?

To pickle and load a NumPy array of 64 numbers takes 5 us, whatever is in it, and a
NumPy number hardly less. Stacked, a batch of them takes 10 us in all; if NumPy
pickled the whole, 17. Arrays of a size that is worth a part of its own stay as they
are: to stack them is one more copy. NumPy is not imported to send: where it is not,
there are no arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pickle import PickleBuffer
from typing import Any

FEW = 4
"""Items, below which it is not worth a look."""

LARGEST = 16 * 1024
"""Bytes of one of them."""


PLAIN = "biufcSU"
"""Kinds of types that their names tell all about."""

Stacked = tuple[Any, ...]
"""Some arrays, or NumPy's numbers, of one shape and type, one after the other: the name
of their type, the shape of the whole and its bytes; or the whole, alone. What is not
stacked is a list."""


def stack(items: list[Any]) -> list[Any] | Stacked:
    """Return *items* stacked, if they are arrays that can be; else as they are."""
    numpy: Any = sys.modules.get("numpy")
    if len(items) < FEW or numpy is None:
        return items
    first = items[0]
    kind = type(first)
    if kind is not numpy.ndarray and not issubclass(kind, (numpy.number, numpy.bool_)):
        return items
    dtype, shape = first.dtype, first.shape
    if dtype.hasobject or first.nbytes > LARGEST:
        return items
    if not shape and kind is numpy.ndarray:  # what a stack of them holds are numbers
        return items
    for item in items:
        if type(item) is not kind or item.dtype != dtype or item.shape != shape:
            return items
    if dtype.kind not in PLAIN or dtype.metadata:
        return (numpy.array(items, dtype),)
    return dtype.str, (len(items), *shape), PickleBuffer(_joined(numpy, items, dtype))


def _joined(numpy: Any, items: list[Any], dtype: Any) -> Any:
    try:  # a quarter of the time that an array of them takes
        return bytearray().join(items)
    except (TypeError, BufferError):  # one of them is not contiguous
        return numpy.array(items, dtype)


def unstack(items: Sequence[Any] | Stacked) -> Sequence[Any]:
    """Return what was given to stack(), each item a view of the whole."""
    if type(items) is not tuple:
        return items
    if len(items) == 1:
        return list(items[0])
    kind, shape, data = items
    numpy = sys.modules.get("numpy") or import_module("numpy")
    return list(numpy.ndarray(shape, kind, data))
