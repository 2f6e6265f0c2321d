"""What was lost with a model process, or with the model server?

Only what was there when it was killed, within a second, and what such a kill explains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from typing import NamedTuple

from tests.chaos.batches import LAG, Batch, Batches
from tests.chaos.client import Request
from tests.chaos.journal import Begun
from tests.chaos.plan import BATCHERS

WITHIN = 1.0 + LAG
"""Seconds after a ``kill -9`` in which who was there has to hear of it."""

PROMPT = 0.05
"""Seconds in which one comes, once it is noted."""

PROCESS_LOST = re.compile(
    r"the model process (\d+) was killed by SIGKILL while it had this call; call again"
)
SERVER_LOST = "the model server is gone and had this call"

NOT_THERE = re.compile(
    r"the model process (\d+) was killed by SIGKILL(?: while it loaded \S+)?"
)
ABSENT = "no model server answers at "
PATIENCE = 3.0
"""Seconds that there has to be none until one hears that."""

NAMES = {"process": "process", "server": "tests.chaos.handler:server"}
"""What the batchers are called whose handlers run in model processes."""


class Loss(NamedTuple):
    """The ``kill -9`` of a model process, or of whoever had it."""

    at: float
    parent: int
    """The worker or the model server that had it."""


class Losses(NamedTuple):
    """All that were made, by the process."""

    models: Mapping[int, Loss]
    servers: Mapping[int, float]

    def explain(self, request: Request, began: float, batches: Batches) -> bool:
        """Tell whether one of them is why a request got WorkerLost.

        Args:
            began: When its call had not been made yet.
        """
        name = NAMES.get(request.batcher)
        if name is None:
            return False
        batch = batches.of.get(request.name)
        died = PROCESS_LOST.fullmatch(request.message.removeprefix(f"{name}: "))
        if died is not None:
            pid = int(died[1])
            if pid not in self.models:
                return False
            at, parent = self.models[pid]
            if batch is not None and pid != batch.attempts[-1][0].pid:
                return False
            if request.batcher == "process" and parent != request.pid:
                return False
            if BATCHERS[request.batcher].retry and not self._lost_again(at, batch):
                return False
            return _just_before(request, began, at)
        if request.message == f"{request.batcher}: {SERVER_LOST}":
            return any(
                _just_before(request, began, at)
                and (batch is None or batch.attempts[-1][0].parent == server)
                for server, at in self.servers.items()
            )
        return False

    def left_alone(self, request: Request, batches: Batches) -> bool:
        """Tell whether it was right to say that there is nobody to run it.

        A process was killed while it was loaded, or for another time, or there has been
        no server for some time; and nothing has run since in one that came after it.
        """
        name = NAMES.get(request.batcher)
        if name is None:
            return False
        ended = request.ended
        gone = NOT_THERE.fullmatch(request.message.removeprefix(f"{name}: "))
        if gone is not None and int(gone[1]) in self.models:
            since, parent = self.models[int(gone[1])]
            if request.batcher == "process" and parent != request.pid:
                return False
        elif request.message.startswith(f"server: {ABSENT}"):
            since, parent = ended - PATIENCE, 0
            if not any(at < since + LAG for at in self.servers.values()):
                return False
        else:
            return False
        return since < ended and not any(
            since + LAG < run.began < ended - LAG
            and run.parent == (parent or run.parent)
            for batch in batches.all
            if batch.batcher == request.batcher
            for run in batch.runs
        )

    def _lost_again(self, at: float, batch: Batch | None) -> bool:
        """Tell whether what is run again, once, was lost by then for another time."""
        if batch is None or len(batch.attempts) == 1:
            return False
        first = self.models.get(batch.attempts[0][0].pid)
        return first is not None and first.at < at


class Orphans(NamedTuple):
    """Runs in model processes that must not be."""

    outlived: int
    """Those that went on past handler_timeout: their process was not killed."""
    cut_short: int
    """Those whose process ended before they did, though nobody had it end."""
    unwanted: int
    """Those for a worker or a model server that was gone."""


def orphans(
    batches: Batches,
    losses: Losses,
    kills: Mapping[int, float],
    begun: Mapping[str, Begun],
) -> Orphans:
    """Count them.

    Args:
        kills: When which workers were killed.
        begun: Which worker took a request up.
    """
    gone = {**kills, **losses.servers}
    outlived = cut_short = unwanted = 0
    for batch in batches.all:
        if not BATCHERS[batch.batcher].models:
            continue
        wants = {begun[name].pid for name in batch.names if name in begun}
        too_late = LAG + max((gone.get(pid, inf) for pid in wants), default=inf)
        unwanted += batch.began > too_late
        for attempt in batch.attempts:
            last = attempt[-1]
            too_late = LAG + gone.get(last.parent, inf)
            if last.ended == inf:
                known = last.pid in losses.models or last.parent in gone
                takes = BATCHERS[batch.batcher].takes + LAG
                stuck = batches.hangs(batch) or last.began + takes > batch.limit
                cut_short += not known and not stuck
                unwanted += last.began > too_late
            else:
                unwanted += last.ended > too_late
                outlived += last.ended > batch.limit + LAG
    return Orphans(outlived, cut_short, unwanted)


def _just_before(request: Request, began: float, at: float) -> bool:
    return began < at + PROMPT and at < request.ended < at + WITHIN
