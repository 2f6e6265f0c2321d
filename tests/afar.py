"""What befalls batchers of several clients, and the model server that they share?

The server is the batcher that the model speaks of; the clients only pass on what they
are asked. It runs in a child, and the handler in a child of that.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.bridge import Bridge
from tests.ends import LOST, REFUSED, STOPPED, Call, End
from tests.fakes import Caller
from tests.handlers import Handlers
from tests.lost import ModelElsewhere
from tests.serving import ModelServer
from tests.stage import ODDS, PICK
from tests.traces import processes
from tests.watched import Mapped, Promised, Watched
from ubatch import UBatch

CLIENTS = 2

MOST_KILLS = 2
"""Of model processes: each is started again later than the one before."""

SETUPS = st.fixed_dictionaries(
    {
        "max_size": st.integers(1, 4) | st.just(8),
        "max_pending": st.none() | st.integers(1, 6),
        "workers": st.integers(1, 2),
        "linger": st.sampled_from(["now", "settle", "adaptive"]),
        "on_error": st.sampled_from(["fail", "isolate"]),
        "retry": st.booleans(),
    }
)


class ModelServed(ModelElsewhere):
    """What a model server does for all its clients, as it should be."""

    def refuse(self, call: Call) -> None:
        """Refuse a call for which there is no room: its client has accepted it."""
        self.counts["calls"] += 1
        self.finish(call, REFUSED)

    def take(self, calls: list[Call]) -> None:
        """Take in what comes at once, as far as there is room."""
        for call in calls:
            if self.is_full():
                self.refuse(call)
            else:
                self.join(call)

    def die(self) -> None:
        """Lose all that is there, with the server."""
        for batch in [*self.life.waiting, *self.life.running]:
            for call in batch.alive():
                self.finish(call, LOST)
        self.life.waiting.clear()
        self.life.running.clear()


class MappedAfar(Mapped):
    """Somebody who called map(): once it has been sent, none of it is taken back."""

    def give_up(self, model: Any) -> None:
        pass


class Closing(Watched):
    """Somebody who stops a client, and waits for its calls."""

    def __init__(self, calls: list[Call], caller: Caller) -> None:
        self.calls = calls
        self.caller = caller
        self.left = None

    def is_due(self) -> bool:
        return all(call.end is not None for call in self.calls)

    def check(self) -> None:
        assert self.caller.error is None, repr(self.caller.error)


class MachineAfar(Handlers):
    """Drives the clients in turn, and compares them and their server with the model."""

    model: ModelServed

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.server: ModelServer | None = None
        self.home = tempfile.TemporaryDirectory()
        self.kills = 0
        self.replaced: set[int] = set()  # model processes, or they soon will be

    @initialize(setup=SETUPS)
    def first_batcher(self, setup: dict[str, Any]) -> None:
        self.begin(setup)

    def begin(self, setup: dict[str, Any]) -> None:
        """Start a server, connect its clients, and make their model."""
        self.inline = False
        self.set_up(setup)
        options = ["max_size", "max_pending", "linger", "on_error"]
        self.options = [
            f"--{option.replace('_', '-')}={setup[option]}"
            for option in options
            if setup[option] is not None
        ]
        self.options.append(f"--processes={setup['workers']}")
        if setup["retry"]:
            self.options.append("--retry")
        isolate = setup["on_error"] == "isolate"
        shared = {name: setup[name] for name in ("max_pending", "workers", "linger")}
        self.model = ModelServed(setup["max_size"], **shared, isolate=isolate)
        self.model.retry = setup["retry"]
        self.model.start()
        self.bridge = Bridge(self.handle_elsewhere)
        self.serve()
        self.clients = [self.connect() for _ in range(CLIENTS)]
        self.all_clients = list(self.clients)  # those too that have been stopped
        self.whose: dict[int, UBatch[Any, Any]] = {}  # by the numbers of their calls
        self.ub = self.clients[0]

    def serve(self) -> None:
        assert self.bridge is not None
        self.before = self.model.counts["batches"]  # this server
        self.server = ModelServer(
            Path(self.home.name), "held", *self.options, HELD=self.bridge.address
        ).__enter__()

    def connect(self) -> UBatch[Any, Any]:
        assert self.server is not None
        backend: Any = self.backend
        return UBatch.connect(self.server.address, backend=backend)

    # What is always true.

    def is_at_rest(self) -> bool:
        assert self.bridge is not None and self.server is not None
        if not self.is_bridge_at_rest(self.bridge):
            return False
        for one in self.watched:
            if one.has_ended():
                assert one.is_due(), f"too early: {one}"
            elif one.is_due():
                return False
        seen = self.server.status()
        self.notice()
        model = self.model
        return bool(
            seen["batches_total"] == model.counts["batches"] - self.before
            and model.is_at_rest()
            and (seen["pending"], seen["running"]) == (model.pending(), model.running())
            and self.busy() == model.pending() + model.running()
        )

    def busy(self) -> int:
        """Return how many calls of the clients have not ended."""
        seen = [client.stats() for client in self.all_clients]
        return sum(each.pending + each.running for each in seen)

    def compare(self) -> None:
        seen = [client.stats() for client in self.all_clients]
        for name in "calls", "results", "failures", "cancelled", "expired", "rejected":
            total = sum(getattr(each, f"{name}_total") for each in seen)
            assert total == self.model.counts[name], (name, self.difference())
        self.check_ended()

    def difference(self) -> str:
        status = self.server and self.server.status()
        others = [one.stats() for one in self.all_clients if one is not self.ub]
        return f"{super().difference()}\nserver: {status}\nothers: {others}"

    # What callers do.

    @rule(which=st.integers(0, CLIENTS - 1))
    def turn_to(self, which: int) -> None:
        """Have another client call from now on."""
        self.ub = self.clients[which]

    def item(self, shape: str = "one") -> Any:
        self.whose[self.numbers] = self.ub
        return super().item(shape)

    def ask(
        self, shape: str, afar: bool, deadline: float | None, end: End | None = None
    ) -> Call | None:
        if not self.model.is_full():
            return super().ask(shape, afar, deadline, end)
        if end is None:  # or there are two for it, and either may come first
            self.map(1, keep=False, afar=afar)
        return None

    def promise(
        self, shape: str, deadline: float | None, end: End | None = None
    ) -> Call | None:
        if not self.model.is_full():
            return super().promise(shape, deadline, end)
        if end is None:
            item = self.item()
            call = self.calls[item.number]
            self.watched.append(Promised(call, self.ub.submit(item), self.told))
            self.model.refuse(call)
            del item
            self.rest()
        return None

    @rule(count=st.integers(1, 6), keep=st.booleans(), afar=ODDS)
    def map(self, count: int, keep: bool, afar: bool) -> None:
        if afar or self.backend == "thread":
            count = 1  # in which order more of them come is not foreseeable
        # More than fit a batch are asked in parts, of which a free process may take the
        # first before the next comes.
        in_parts = self.model.has_free_worker() and count > self.model.max_size
        if in_parts and self.model.max_pending is not None:
            return  # nor is it how many come too late
        items = [self.item() for _ in range(count)]
        calls = [self.calls[item.number] for item in items]
        ub = self.ub
        caller = self.spawn(afar, lambda: ub.map(items, return_exceptions=keep))
        if in_parts:
            self.model.join_one_by_one(calls)
        else:
            self.model.take(calls)
        self.watched.append(MappedAfar(calls, caller, keep))
        self.rest()

    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        """Cancel a future: the call has been sent, and is not taken back."""
        one = self.pick(self.promised(), pick)
        if one is not None:
            assert not one.future.cancel()
        self.rest()

    # What clients do.

    @rule(patient=st.booleans())
    def leave(self, patient: bool) -> None:
        """Stop this client, and have another one take its place."""
        ub, number = self.ub, self.clients.index(self.ub)
        mine = [call for call in self.alive() if self.whose[call.number] is ub]
        self.ub = self.clients[number] = self.connect()
        self.all_clients.append(self.ub)
        caller = self.spawn(False, lambda: ub.stop(None if patient else 0.0))
        if not patient:
            for call in mine:
                self.model.finish(call, STOPPED)
        self.watched.append(Closing(mine, caller))
        self.rest()

    def alive(self) -> list[Call]:
        """Return the calls that have not ended."""
        life = self.model.life
        batches = [*life.waiting, *life.running]
        return [call for batch in batches for call in batch.alive()]

    # What befalls the server.

    @rule(pick=PICK, call=st.booleans())
    def kill_process(self, pick: int, call: bool) -> None:
        """Kill a model process, that has a batch or none: another follows."""
        assert self.bridge is not None and self.server is not None
        ready = self.server.models()
        links = [link for link in self.bridge.links if link.pid in ready]
        link = self.pick(links, pick)
        if link is None or self.kills == MOST_KILLS:
            return
        self.kills += 1
        os.kill(link.pid, signal.SIGKILL)
        for held in [one for one in self.held if one.link is link]:
            self.model.lose(held.batch)
            self.held.remove(held)
            self.cut_off.append(held)
        if call:
            self.promise("one", None)
        # Or a batch may be given up that waits for a process, and never be handed on.
        self.replaced.add(link.pid)
        self.rest(self.is_ready)

    @rule(sure=ODDS)
    def kill_server(self, sure: bool) -> None:
        """Kill the server, with its model, and start another."""
        if sure:
            self.end_server()
            self.model.die()
            self.cut_off += self.held
            self.held.clear()
            self.serve()
            self.rest()

    @rule()
    def reload(self) -> None:
        """Have the server load its model again."""
        assert self.server is not None
        self.rest(self.is_ready)
        self.replaced.update(self.server.models())
        os.kill(self.server.pid, signal.SIGHUP)
        self.rest(self.is_ready)

    def is_ready(self) -> bool:
        """Tell whether all processes are there that should be."""
        assert self.server is not None
        ready = {*self.server.models()} - self.replaced
        return bool(len(ready) == self.setup["workers"])

    def end_server(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.__exit__(None, None, None)

    # How it ends.

    def teardown(self) -> None:
        try:
            if hasattr(self, "model"):
                self.finish()
        finally:
            self.end_server()
            self.home.cleanup()

    def finish(self) -> None:
        """Let all handlers end, stop all clients, and look for what is left."""
        assert self.bridge is not None and self.server is not None
        try:
            self.answer_all()
            for client in self.clients:
                self.ub = client
                self.leave(patient=True)
            assert not self.watched, self.watched
            assert not self.alive()
            assert [] == self.log.deaths
            assert "died" not in self.server.log, self.server.log
            for client in self.clients:  # they were never used
                client.stop()
        finally:
            self.holding = False
            for held in [*self.held, *self.cut_off, *self.entered[self.seen :]]:
                held.gate.open()
            self.end_server()
            self.bridge.close()
            self.bridge = None
            del self.model, self.ub, self.clients, self.all_clients, self.whose
            del self.calls, self.watched, self.entered, self.held, self.cut_off
        self.until_gone(self.left)
        assert not processes() - self.processes_before
