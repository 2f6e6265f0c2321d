"""What do a model server and its clients say to each other?

A client's *ask* is what it asks for in one go; each of its calls has a place in it, and
may be answered with others or alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

from ubatch.options import LONGEST_WAIT
from ubatch.parcel import (
    Answers,
    PackedError,
    read_errors,
    read_places,
    write_errors,
    write_places,
)
from ubatch.wire import Frame, Part, Reader, WireError, unpack

MOST_ARGUMENTS = 1 << 20
"""Of all calls in an ask: a few bytes must not make a server fill its memory."""

Deadlines = list[float | None]
"""The seconds that each call of an ask has left; None for as long as it takes."""


class Ask(NamedTuple):
    """What a CALLS says."""

    columns: int
    names: list[str]
    size: int
    deadlines: Deadlines | None
    """None if no call has one."""
    parcel: Sequence[Part]


class Answered(NamedTuple):
    """What an ANSWERS says: some calls of an ask have ended."""

    places: list[int]
    """Which ones, in that ask."""
    picks: list[int]
    """Where the answer of each is in what follows."""
    answers: Answers


class Refused(NamedTuple):
    """What an ANSWERS says too: some calls of an ask have ended in one error."""

    places: list[int]
    error: PackedError


def write_ask(ask: Ask) -> tuple[Any, list[Part]]:
    """Return the head and the parts of a CALLS.

    Raises:
        WireError: It has too many calls.
    """
    arguments = ask.size * (ask.columns + len(ask.names))
    if arguments > MOST_ARGUMENTS:
        raise WireError(
            f"a CALLS with {arguments} arguments; {MOST_ARGUMENTS} are allowed"
        )
    deadlines = ask.deadlines and [
        None if left is None else round(left, 4) for left in ask.deadlines
    ]
    return [ask.columns, ask.names, ask.size, deadlines], list(ask.parcel)


def read_ask(frame: Frame) -> Ask:
    """Return what a CALLS says.

    Raises:
        WireError: That makes no sense.
    """
    try:
        columns, names, size, deadlines = frame.head
        good = _is_count(columns) and _is_count(size) and size > 0
        good = good and all(type(name) is str for name in names)
        good = good and type(names) is list and len(set(names)) == len(names)
        good = good and 0 < size * (columns + len(names)) <= MOST_ARGUMENTS
        if deadlines is not None:
            good = good and len(deadlines) == size
            good = good and all(_is_deadline(each) for each in deadlines)
    except (TypeError, ValueError):
        good = False
    if not good or not frame.parts:
        raise WireError("a CALLS that makes no sense")
    return Ask(columns, names, size, deadlines, frame.parts)


def write_answered(answered: Answered) -> tuple[Any, list[Part]]:
    """Return the head and the parts of an ANSWERS."""
    answers = answered.answers
    head = [
        *(write_places(answered.places), write_places(answered.picks)),
        *(len(answers.results), len(answers.errors), answers.unread),
    ]
    return head, [*answers.results, *write_errors(answers.errors)]


def write_refused(refused: Refused) -> tuple[Any, list[Part]]:
    """Return the head and the parts of an ANSWERS."""
    error = pickle.dumps(tuple(refused.error), protocol=5)
    return [write_places(refused.places)], [error]


def read_answers(frame: Frame) -> Answered | Refused:
    """Return what an ANSWERS says."""
    reader = Reader(frame)
    first, *more = frame.head
    places = read_places(first)
    if not more:
        return Refused(places, PackedError(*unpack(reader.take(1))))
    picks, parts, failed, unread = more
    results = reader.take(parts)
    errors = read_errors(reader) if failed else {}
    return Answered(places, read_places(picks), Answers(results, errors, unread))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= 1 << 32


def _is_deadline(value: object) -> bool:
    if isinstance(value, (int, float)) and type(value) is not bool:
        return -LONGEST_WAIT <= value <= LONGEST_WAIT  # NaN fails this too
    return value is None
