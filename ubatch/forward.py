"""How does a model server pass on what it has not opened?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ubatch.batch import Job
from ubatch.errors import BackendError, Failure
from ubatch.executors import Changed, Executor, Outcome
from ubatch.parcel import Answers, Done, Run, Work
from ubatch.processes import Processes, ProcessExecutor
from ubatch.session import Call, Forwarded, Routed
from ubatch.wire import WireError

if TYPE_CHECKING:
    from ubatch.backends.base import Backend


class ForwardingExecutor(ProcessExecutor):
    """Model processes for calls that came from other processes."""

    far = True

    clients: Callable[[], int]
    """Tells how many of those there are; set by their server."""

    def callers(self) -> int:
        return self.clients()

    def open(self, name: str, backend: Backend, changed: Changed) -> Executor:
        return Processes(self, name, backend, changed, Forward())


class Forward:
    """Sends the calls of a batch as they came, and their answers as they come."""

    def run(self, job: Job, apart: bool, ask: Callable[[Work], Done]) -> Outcome:
        """Have a batch run; in parts, if what its clients sent is too much for one."""
        try:
            return self._run(job, apart, ask)
        except WireError as error:
            if job.size == 1:
                failure = Failure(BackendError(f"{error}; ask for less at once"))
                return Outcome([failure], None, 0.0, [failure])
        half = job.size // 2
        return _joined(
            (self.run(job.part(0, half), apart, ask), half),
            (self.run(job.part(half, job.size), apart, ask), job.size - half),
        )

    def _run(self, job: Job, apart: bool, ask: Callable[[Work], Done]) -> Outcome:
        calls: list[Call] = (job.args or list(job.kwargs.values()))[0]
        runs = [
            Run(asking.parcel, [call.place for call in group])
            for asking, group in groupby(calls, attrgetter("asking"))
        ]
        done = ask(Work(len(job.args), sorted(job.kwargs), apart, runs))
        first = done.first and Failure(Forwarded(done.first))
        if not done.runs:
            return Outcome(None, first, done.seconds, (), done.reruns)
        failures: list[Failure] = []
        answers: list[Any] = []
        for run, each in zip(runs, done.runs):
            routed = _routed(each, len(run.places), failures)
            answers += routed
        return Outcome(answers, None, done.seconds, failures, done.reruns, first)


def _joined(*parts: tuple[Outcome, int]) -> Outcome:
    """Return the outcome of a batch whose parts were run apart."""
    answers: list[Any] = []
    failures: list[Failure] = []
    for part, size in parts:
        if part.failure is not None:
            failures.append(part.failure)
        answers += [part.failure] * size if part.answers is None else part.answers
        failures += part.failures
    seconds = sum(part.seconds for part, _ in parts)
    reruns = sum(part.reruns for part, _ in parts)
    firsts = [part.first or part.failure for part, _ in parts]
    first = next((one for one in firsts if one is not None), None)
    return Outcome(answers, None, seconds, failures, reruns, first)


def _routed(answers: Answers, size: int, failures: list[Failure]) -> list[Any]:
    """Return the answers of one run; errors apart, so that they are counted."""
    routed: list[Any] = [Routed(answers, pick) for pick in range(size)]
    for pick, packed in answers.errors.items():
        routed[pick] = Failure(Forwarded(packed, answers.unread))
        failures.append(routed[pick])
    return routed
