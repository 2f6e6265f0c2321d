"""What does a batch look like on its way to a model process, and its answers on theirs?

The calls that one process asked for together are one *parcel*: all their arguments in
one pickle, which takes a quarter of the time that as many pickles would. Whoever passes
a parcel on need not open it, nor have what is in it.
"""

from __future__ import annotations

import io
import pickle
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from ubatch.arrays import stack, unstack
from ubatch.errors import (
    Failure,
    RemoteError,
    RemoteTraceback,
    ends_strand,
    set_on,
)
from ubatch.wire import Frame, Part, Reader, pack, unpack


class Run(NamedTuple):
    """Some calls of one parcel, as they go to the handler."""

    parcel: Sequence[Part]
    """A pickle of their arguments, and of those of others perhaps: lists of them."""
    places: list[int]
    """Which of the calls in there."""


class Answers(NamedTuple):
    """What became of a run."""

    results: Sequence[Part]
    """A pickle of the list of results, one per call; None for a call that failed."""
    errors: dict[int, PackedError]
    """Those of the others, by their number in the run."""
    unread: bool = False
    """The parcel could not be opened, and the error is the same for all."""


class PackedError(NamedTuple):
    """An error on its way; it can be told of where its class is not known."""

    kind: str
    """The name of its class, with its module."""
    text: str
    traceback: str
    pickled: bytes
    """Itself; nothing if it resists that."""


class _Unpickler(pickle.Unpickler):
    """Loads what needs no module that is not here already.

    To load an error must not import a model's libraries.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module not in sys.modules:
            raise pickle.UnpicklingError(f"{module} is not imported here")
        return super().find_class(module, name)


def pack_error(error: BaseException) -> PackedError:
    """Return an error as it can be sent, whatever it is.

    Raises nothing but what ends a strand. Its traceback is cut back to the handler's
    frames, as a Failure's.
    """
    Failure(error)
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return PackedError(
        name.removeprefix("builtins."),
        text_of(error),
        _traceback(error),
        _pickled(error),
    )


def unpack_error(packed: PackedError) -> Exception:
    """Return the error that was sent, or one that tells of it.

    Raises nothing but what ends a strand. Its ``__cause__`` is the traceback that it
    had there.
    """
    error: Any = None
    if packed.pickled:
        try:
            error = _Unpickler(io.BytesIO(packed.pickled)).load()
        except BaseException as odd:  # what it needs is not here
            if ends_strand(odd):
                raise
    if not isinstance(error, Exception):
        error = RemoteError(f"{packed.kind}: {packed.text}", packed.kind)
    if packed.traceback:
        set_on(error, "__cause__", RemoteTraceback(packed.traceback))
    return error  # type: ignore[no-any-return]


class _Frozen:
    """An error whose class lets nobody set what it holds, once it is made."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> Any:
        return _thaw, BaseException.__reduce__(self._error)


def _thaw(kind: type, args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind(*args)
    error.__dict__.update(state)
    return error


def _pickled(error: BaseException) -> bytes:
    """Return an error pickled; nothing, if it cannot be loaded again."""
    usual = type(error).__reduce__ is BaseException.__reduce__
    for sent in (error, _Frozen(error)) if usual else (error,):
        try:
            pickled = pickle.dumps(sent, protocol=5)
            pickle.loads(pickled)  # its constructor may want other arguments
            return pickled
        except BaseException as odd:
            if ends_strand(odd):
                raise
    return b""


def text_of(error: BaseException) -> str:
    """Return the text of an error, for a message; of one that has none, too."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except BaseException as odd:
        if ends_strand(odd):
            raise
        return "an error that cannot be shown"


def _traceback(error: BaseException) -> str:
    if error.__traceback__ is None:
        return ""
    try:
        text = "".join(traceback.format_exception(error))
        return text.encode(errors="backslashreplace").decode()
    except BaseException as odd:
        if ends_strand(odd):
            raise
        return ""


# Between a process that asks and the one that has the model.


class Work(NamedTuple):
    """One batch, as it is sent to a model process."""

    columns: int
    """Arguments by position."""
    names: list[str]
    """The names of the others."""
    apart: bool
    """Run it again in parts if it fails: ``on_error="isolate"``."""
    runs: list[Run]

    @property
    def size(self) -> int:
        """Calls in all."""
        return sum(len(run.places) for run in self.runs)


class Done(NamedTuple):
    """What a model process made of a batch."""

    seconds: float
    """How long the handler ran."""
    reruns: int
    runs: list[Answers]
    """One for each run of the batch; none if it failed as a whole."""
    first: PackedError | None
    """What the first run of the handler raised; the only one if there are no runs."""


def pack_columns(args: list[list[Any]], kwargs: dict[str, list[Any]]) -> list[Part]:
    """Return the parcel of some calls; as pack()."""
    columns = [stack(column) for column in args]
    return pack((columns, {name: stack(column) for name, column in kwargs.items()}))


def unpack_columns(parcel: Sequence[Part]) -> tuple[list[Any], dict[str, Any]]:
    """Return the columns of a parcel; as unpack()."""
    args, kwargs = unpack(parcel)
    columns = [unstack(column) for column in args]
    return columns, {name: unstack(column) for name, column in kwargs.items()}


def pack_results(results: list[Any]) -> list[Part]:
    """Return the results of some calls as they are sent; as pack()."""
    return pack(stack(results))


class _Alone:
    """A result that has been pickled by itself."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __reduce__(self) -> Any:
        return pickle.loads, (self._pickled,)


def pack_each(results: list[Any]) -> tuple[list[Part], dict[int, str]]:
    """Return what pack_results() does, and why some of them cannot be sent.

    Each is pickled once: one that can be now may resist the next time.
    """
    packed: list[_Alone | None] = [None] * len(results)
    odd: dict[int, str] = {}
    for place, result in enumerate(results):
        try:
            packed[place] = _Alone(pickle.dumps(result, protocol=5))
        except BaseException as error:  # not kept: its frames hold the results
            odd[place] = f"{type(error).__name__}: {text_of(error)}"
    return pack(packed), odd


def unpack_results(parcel: Sequence[Part]) -> Sequence[Any]:
    """Return the results of some calls; as unpack()."""
    return unstack(unpack(parcel))


def write_work(work: Work) -> tuple[Any, list[Part]]:
    """Return the head and the parts of a JOB."""
    runs = [[len(run.parcel), write_places(run.places)] for run in work.runs]
    parts = [part for run in work.runs for part in run.parcel]
    return [work.columns, work.names, work.apart, runs], parts


def read_work(frame: Frame) -> Work:
    """Return what a JOB says."""
    reader = Reader(frame)
    count, names, apart, runs = frame.head
    return Work(
        *(count, names, apart),
        [Run(reader.take(parts), read_places(places)) for parts, places in runs],
    )


def write_done(done: Done) -> tuple[Any, list[Part]]:
    """Return the head and the parts of an OUTCOME."""
    parts: list[Part] = []
    runs = []
    for run in done.runs:
        runs.append([len(run.results), len(run.errors), run.unread])
        parts += [*run.results, *write_errors(run.errors)]
    if done.first is not None:
        parts.append(pickle.dumps(tuple(done.first), protocol=5))
    return [done.seconds, done.reruns, runs, done.first is not None], parts


def read_done(frame: Frame) -> Done:
    """Return what an OUTCOME says."""
    reader = Reader(frame)
    seconds, reruns, runs, failed = frame.head
    answers = []
    for results, errors, unread in runs:
        parcel = reader.take(results)
        answers.append(Answers(parcel, read_errors(reader) if errors else {}, unread))
    first = PackedError(*unpack(reader.take(1))) if failed else None
    return Done(seconds, reruns, answers, first)


def write_places(places: list[int]) -> int | list[int]:
    """Return some places as they are sent: how many, if they are the first ones."""
    count = len(places)
    return count if places == list(range(count)) else places


def read_places(written: int | list[int]) -> list[int]:
    """Return the places that were sent."""
    return written if isinstance(written, list) else list(range(written))


def write_errors(errors: dict[int, PackedError]) -> list[Part]:
    """Return the errors of some calls as they are sent: nothing, if there are none."""
    plain = {place: tuple(error) for place, error in errors.items()}
    return [pickle.dumps(plain, protocol=5)] if plain else []


def read_errors(reader: Reader) -> dict[int, PackedError]:
    """Return the errors of some calls, of which there are some."""
    errors: dict[int, Any] = unpack(reader.take(1))
    return {place: PackedError(*error) for place, error in errors.items()}
