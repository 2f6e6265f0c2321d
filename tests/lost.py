"""What is another truth where the handler runs in a process that can be killed?"""

from __future__ import annotations

from tests.blame import Runs
from tests.ends import LOST, STUCK, Call
from tests.model import Batch, Life, Model


class ModelElsewhere(Model):
    """A batcher with model processes, as it should be."""

    retry = False

    def close(self, calls: list[Call]) -> Batch:
        batch = super().close(calls)
        if batch.life.killed:  # it was on its way there
            batch.life.running.remove(batch)
        return batch

    def is_wanted(self, batch: Batch) -> bool:
        """Tell whether it is run further: there nobody knows who has left."""
        return True

    def stick(self, batch: Batch) -> None:
        """Give a running batch up, with its process: no worker stays stuck."""
        batch.life.running.remove(batch)
        self.counts["stuck"] += 1
        for call in batch.alive():
            self.finish(call, STUCK)

    def stop(self, patient: bool) -> Life | None:
        """Kill the processes of what runs, if that is not waited for."""
        life = super().stop(patient)
        if life is not None and not patient:
            life.killed = True
            life.running.clear()
        return life

    def lose(self, batch: Batch) -> None:
        """Take note that the process of a running batch was killed.

        The calls are run again, all of them, once and if they may and anybody waits.
        """
        if self.retry and not batch.lost and batch.alive():
            batch.lost = True
            batch.runs = Runs(batch.calls, self.isolate)
            batch.runs.running, batch.runs.count = False, 0
            return
        batch.life.running.remove(batch)
        for call in batch.alive():
            self.finish(call, LOST)
