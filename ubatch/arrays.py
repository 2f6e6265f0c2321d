"""How do many small arrays travel as one?

To pickle and load a NumPy array of 64 numbers takes 5 us, whatever is in it, and a
NumPy number hardly less. Stacked, a batch of them takes 15 us in all. Arrays of a size
that is worth a part of its own stay as they are: to stack them is one more copy.
NumPy is never imported for that: where it is not, there are no arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

FEW = 4
"""Items, below which it is not worth a look."""

LARGEST = 16 * 1024
"""Bytes of one of them."""


class Stacked(NamedTuple):
    """Some arrays, or NumPy's numbers, of one shape and type, one after the other."""

    array: Any


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
    return Stacked(numpy.array(items, dtype))


def unstack(items: Sequence[Any] | Stacked) -> Sequence[Any]:
    """Return what was given to stack(), each item a view of the whole."""
    return list(items.array) if type(items) is Stacked else items
