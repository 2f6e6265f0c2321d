"""What befalls a batcher whose handler runs in model processes?"""

from __future__ import annotations

import os
import signal

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.bridge import Link
from tests.lost import ModelElsewhere
from tests.machine import Machine
from tests.stage import ELSEWHERE, EXECUTORS, PICK


class MachineElsewhere(Machine):
    """Begins with such a batcher, and kills its processes."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.executors = ELSEWHERE
        self.most_forks = 1  # the child has to start a process
        self.successors = [*ELSEWHERE, *EXECUTORS[backend]]

    @precondition(lambda self: self.bridge is not None)
    @rule(pick=PICK, call=st.booleans())
    def kill_process(self, pick: int, call: bool) -> None:
        """Kill a model process, that has a batch or none: another follows."""
        assert self.bridge is not None
        link = self.pick(self.bridge.links, pick)
        if link is not None and (link.is_busy() or link.pid in self.ready()):
            self.kill_one(link, call)

    @precondition(lambda self: self.bridge is not None)
    @rule(count=st.integers(1, 6), again=st.booleans())
    def kill_at_work(self, count: int, again: bool) -> None:
        """Kill one that has a batch, and then the one that this is run in again."""
        self.start()
        self.map(count, keep=True, afar=False)
        for _ in range(1 + again):
            if self.held and self.held[-1].link is not None:
                self.kill_one(self.held[-1].link)

    @precondition(lambda self: self.bridge is not None)
    @rule()
    def kill_at_leisure(self) -> None:
        """Kill one that has no batch, as the next call is about to find out."""
        self.start()
        self.promise("one", None)
        self.answer_all()
        assert self.bridge is not None
        idle = [one for one in self.bridge.links if one.pid in self.ready()]
        if idle:
            self.kill_one(idle[0], call=True)

    def kill_one(self, link: Link, call: bool = False) -> None:
        """Kill a model process; *call* before anybody can have heard of that."""
        os.kill(link.pid, signal.SIGKILL)
        for held in self.held[:]:
            if held.link is link:
                assert isinstance(self.model, ModelElsewhere)
                self.model.lose(held.batch)
                self.held.remove(held)
                self.cut_off.append(held)
        if call:
            while not link.is_gone():
                pass  # nor does the hub run
            self.promise("one", None)
        self.rest()

    def ready(self) -> list[int]:
        """Return the model processes that are ready, in this life."""
        collector = self.ub._life.collector
        places = collector.places if collector is not None else None
        return places.pids() if places is not None else []  # type: ignore[attr-defined]
