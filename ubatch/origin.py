"""How does whoever has the items send them, and read the answers?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ubatch.batch import Job
from ubatch.errors import BackendError, BadBatchOutput, Failure, ends_strand
from ubatch.executors import Outcome
from ubatch.parcel import (
    Answers,
    Done,
    Run,
    Work,
    pack_columns,
    text_of,
    unpack_error,
    unpack_results,
)
from ubatch.wire import Part, WireError


class Sent(NamedTuple):
    """Some calls of a batch, packed."""

    parcel: Sequence[Part]
    calls: list[int]
    """Which ones of the batch."""

    @property
    def run(self) -> Run:
        """All of them, as they are sent."""
        return Run(self.parcel, list(range(len(self.calls))))


class Origin:
    """Packs the calls of a batch, and unpacks its answers."""

    def run(self, job: Job, apart: bool, ask: Callable[[Work], Done]) -> Outcome:
        names, found = sorted(job.kwargs), Found(job.size)
        seconds, reruns, first = 0.0, 0, None
        left = [list(pack_calls(job, range(job.size), found))]
        while left:
            sent = left.pop()
            if not sent:
                continue
            work = Work(len(job.args), names, apart, [each.run for each in sent])
            try:
                done = ask(work)
            except WireError as error:
                left += _smaller(job, sent, found, error)
                continue
            seconds += done.seconds
            reruns += done.reruns
            if done.first is not None:
                first = Failure(unpack_error(done.first))
                if not done.runs:
                    found.fail(sent, first)
            again: list[Sent] = []
            for each, answers in zip(sent, done.runs):
                if answers.unread and len(each.calls) > 1:
                    again += pack_alone(job, each.calls, found)
                else:
                    found.add(each.calls, answers, range(len(each.calls)))
            left.append(again)
        return found.outcome(seconds, reruns, first)


def _smaller(
    job: Job, sent: list[Sent], found: Found, error: WireError
) -> list[list[Sent]]:
    """Return in halves what is more than may be sent; refuse one call that is."""
    calls = [call for each in sent for call in each.calls]
    if len(calls) == 1:
        found.refuse(calls, BackendError(f"the item cannot be sent: {error}"))
        return []
    half = len(calls) // 2
    halves = calls[half:], calls[:half]  # the last one is sent first
    return [list(pack_calls(job, some, found)) for some in halves]


class Found:
    """The answers of a batch, as they come in.

    Args:
        tell: Called with those that come before the others, each with its call.
    """

    def __init__(
        self, size: int, tell: Callable[[list[tuple[int, Any]]], object] | None = None
    ) -> None:
        self.answers: list[Any] = [None] * size
        self._tell = tell
        self._failures: list[Failure] = []
        self._whole: Failure | None = None  # what all of its calls failed with

    def add(self, calls: list[int], answers: Answers, picks: Sequence[int]) -> None:
        """Take the answers of some calls in.

        Args:
            picks: Where each of them is in *answers*.
        """
        results: Sequence[Any] = ()
        if answers.results:
            try:
                results = unpack_results(answers.results)
            except BaseException as error:
                if ends_strand(error):
                    raise
                self.refuse(calls, _not_loaded(error))
                return
        for call, pick in zip(calls, picks):
            packed = answers.errors.get(pick)
            if packed is None:
                self.answers[call] = results[pick]
            else:
                self.answers[call] = self._failed(unpack_error(packed))
        self._ended(calls)

    def refuse(self, calls: list[int], error: Exception) -> None:
        """Answer some calls with an error."""
        failure = self._failed(error)
        for call in calls:
            self.answers[call] = failure
        self._ended(calls)

    def _failed(self, error: Exception) -> Failure:
        failure = Failure(error)
        self._failures.append(failure)
        return failure

    def _ended(self, calls: list[int]) -> None:
        # Those that all come at once are told by the strand.
        if self._tell is not None and 0 < len(calls) < len(self.answers):
            self._tell([(call, self.answers[call]) for call in calls])

    def fail(self, sent: list[Sent], failure: Failure) -> None:
        """Answer all calls that were sent with what the handler raised."""
        calls = [call for each in sent for call in each.calls]
        if len(calls) == len(self.answers):
            self._whole = failure
        for call in calls:
            self.answers[call] = failure
        self._failures.append(failure)

    def outcome(self, seconds: float, reruns: int, first: Failure | None) -> Outcome:
        """Return what became of the batch."""
        if self._whole is not None:
            return Outcome(None, self._whole, seconds, (), reruns)
        return Outcome(self.answers, None, seconds, self._failures, reruns, first)


def pack_calls(job: Job, calls: Sequence[int], found: Found) -> Iterator[Sent]:
    """Pack some calls of a batch; one that cannot be packed is answered, alone."""
    some = job if len(calls) == job.size else job.pick(calls)
    parcel: Sequence[Part] | None = None
    try:
        parcel = pack_columns(some.args, some.kwargs)
    except BaseException as error:  # SystemExit too: it is an item's
        if ends_strand(error):
            raise
    if parcel is None:
        yield from pack_alone(job, calls, found)
    else:
        yield Sent(parcel, list(calls))


def pack_alone(job: Job, calls: Sequence[int], found: Found) -> Iterator[Sent]:
    """Pack each of some calls by itself."""
    for call in calls:
        one = job.pick([call])
        try:
            parcel = pack_columns(one.args, one.kwargs)
        except BaseException as error:
            if ends_strand(error):
                raise
            found.refuse([call], _not_sent(error))
        else:
            yield Sent(parcel, [call])


def _not_sent(error: BaseException) -> TypeError:
    kind = type(error).__name__
    refused = TypeError(
        f"the item cannot be sent to another process: {kind}: {text_of(error)}"
    )
    refused.__cause__ = error
    return refused


def _not_loaded(error: BaseException) -> BadBatchOutput:
    kind = type(error).__name__
    return BadBatchOutput(
        "the handler's results cannot be loaded in this process: "
        f"{kind}: {text_of(error)}"
    )
