"""What do callers do to a batcher?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.ends import CANCELLED, EXPIRED, Call, End
from tests.fakes import Caller, NativeCaller
from tests.stage import ODDS, PICK, Stage
from tests.watched import Mapped, Promised, Waiter, Watched, arguments
from ubatch import BackendError, QueueFull, Stopped

SOON = 0.002
"""Seconds until a call that is to expire does."""

SHAPES = st.sampled_from(["one", "two", "named", "only"])


class Callers(Stage):
    """What callers do: call, wait, and give up."""

    @rule(shape=SHAPES, afar=ODDS, deadline=ODDS)
    def call(self, shape: str, afar: bool, deadline: bool) -> None:
        self.ask(shape, afar, 60.0 if deadline else None)

    @rule(shape=SHAPES, deadline=ODDS)
    def submit(self, shape: str, deadline: bool) -> None:
        self.promise(shape, 60.0 if deadline else None)

    @rule(count=st.integers(1, 6), keep=st.booleans(), afar=ODDS)
    def map(self, count: int, keep: bool, afar: bool) -> None:
        items = [self.item() for _ in range(count)]
        model, free = self.model, self.model.has_free_worker()
        if model.broken:
            return  # which of them fail before the rest is given up is not foreseeable,
        if free and (afar or self.backend == "thread") and model.is_full(count):
            return  # nor how many come too late, or are taken before they leave
        one_by_one = free and self.backend == "thread" and model.linger != "full"
        caller = self.spawn(afar, lambda: self.ub.map(items, return_exceptions=keep))
        if model.life.closed:
            self.refused(caller, Stopped)
            return
        calls = [self.calls[item.number] for item in items]
        if one_by_one:
            model.join_one_by_one(calls)
        else:
            joined: list[Call] = []
            for call in calls:
                if model.is_full():
                    self.gives_up(caller, joined)
                    return
                if model.is_jammed():
                    self.refused(caller, BackendError)
                    return
                joined.append(model.join(call))
        self.watched.append(Mapped(calls, caller, keep))
        self.rest()

    def gives_up(self, caller: Caller, joined: list[Call]) -> None:
        self.model.life.called = True
        for call in joined:
            self.model.finish(call, CANCELLED)
        self.model.counts["rejected"] += 1
        self.refused(caller, QueueFull)

    @precondition(lambda self: not self.model.broken)  # or either error may come first
    @rule(shape=SHAPES, promised=st.booleans())
    def expire(self, shape: str, promised: bool) -> None:
        """Make a call whose deadline passes, before or after a worker takes it."""
        if promised:
            call = self.promise(shape, SOON, EXPIRED)
        else:
            call = self.ask(shape, False, SOON, EXPIRED)
        assert call is None or call.end is EXPIRED

    @precondition(lambda self: self.backend == "gevent" and not self.model.broken)
    @rule(shape=SHAPES)
    def time_out(self, shape: str) -> None:
        """Make a call under a gevent.Timeout of its caller's."""
        self.ask(shape, False, None, CANCELLED)

    def ask(
        self, shape: str, afar: bool, deadline: float | None, end: End | None = None
    ) -> Call | None:
        """Have somebody call, and wait; *end* is how that ends by itself."""
        item = self.item(shape)
        call = self.calls[item.number]
        args, kwargs = arguments(shape, item)
        calls: Any = self.ub.with_options(deadline=deadline) if deadline else self.ub
        del item

        def ask() -> Any:
            nonlocal args, kwargs
            mine, args, kwargs = (args, kwargs), (), {}
            if end is CANCELLED:
                return within(SOON, lambda: calls.ubatch(*mine[0], **mine[1]))
            return calls.ubatch(*mine[0], **mine[1])

        caller = self.spawn(afar, ask)
        if self.model.life.closed:
            return self.refused(caller, Stopped)
        if self.model.is_full():
            self.model.life.called = True
            self.model.counts["rejected"] += 1
            return self.refused(caller, QueueFull)
        if self.model.is_jammed():
            return self.refused(caller, BackendError)
        watched = Watched(self.model.join(call), caller)
        if end is CANCELLED:
            watched.leave(self.model, gevent.Timeout)
        elif end is not None:
            self.model.finish(call, end)
        self.watched.append(watched)
        self.rest()
        return call

    def promise(
        self, shape: str, deadline: float | None, end: End | None = None
    ) -> Call | None:
        """Submit; *end* is how the call ends by itself."""
        item = self.item(shape)
        call = self.calls[item.number]
        args, kwargs = arguments(shape, item)
        calls: Any = self.ub.with_options(deadline=deadline) if deadline else self.ub
        refusal = BackendError if self.model.is_jammed() else None
        refusal = QueueFull if self.model.is_full() else refusal
        refusal = Stopped if self.model.life.closed else refusal
        try:
            future = calls.submit(*args, **kwargs)
        except (QueueFull, Stopped, BackendError) as error:
            assert type(error) is refusal, repr(error)
            if refusal is QueueFull:
                self.model.life.called = True
                self.model.counts["rejected"] += 1
            self.rest()
            return None
        assert refusal is None, "it was accepted"
        self.model.join(call)
        if end is not None:
            self.model.finish(call, end)
        self.watched.append(Promised(call, future, self.told))
        self.rest()
        return call

    def refused(self, caller: Caller, error: type[Exception]) -> None:
        """Check that a caller is sent away."""
        self.rest(lambda: caller.ended)
        assert type(caller.error) is error, repr(caller.error)

    # What callers do with calls that they have made.

    def promised(self) -> list[Promised]:
        return [one for one in self.watched if isinstance(one, Promised)]

    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        """Cancel a future, be it waiting, running or done."""
        one = self.pick(self.promised(), pick)
        if one is None:
            return
        batch = one.call.batch
        waits = one.call.end is None and batch and batch in batch.life.waiting
        if waits:
            self.model.finish(one.call, CANCELLED)
        assert one.future.cancel() == (one.call.end is CANCELLED)
        self.rest()

    @rule(pick=PICK, afar=ODDS)
    def wait_for(self, pick: int, afar: bool) -> None:
        """Have one more wait for a future."""
        one = self.pick(self.promised(), pick)
        if one is None:
            return
        future = one.future
        caller = self.spawn(afar, lambda: future.result())
        self.watched.append(Waiter(one.call, caller))
        self.rest()

    @rule(pick=PICK)
    def lose_patience(self, pick: int) -> None:
        """Wait for a future for a short time."""
        one = self.pick(self.promised(), pick)
        if one is None:
            return
        if one.call.end is None:
            try:
                raise AssertionError(f"{one.call} got {one.future.result(SOON)}")
            except TimeoutError as error:
                assert "the call goes on" in str(error)
        self.rest()

    def killable(self) -> list[Any]:
        waiting = [one for one in self.watched if one.killable and not one.is_due()]
        return [one for one in waiting if not isinstance(one.killable, NativeCaller)]

    @precondition(lambda self: self.backend == "gevent")
    @rule(pick=PICK)
    def kill(self, pick: int) -> None:
        """Kill a greenlet that waits for a call, a future, map() or stop()."""
        one = self.pick(self.killable(), pick)
        if one is not None:
            one.leave(self.model, gevent.GreenletExit)
            one.caller.greenlet.kill(block=False)
        self.rest()


def within(seconds: float, call: Callable[..., Any], *args: Any) -> Any:
    """Call, under a gevent.Timeout."""
    with gevent.Timeout(seconds):
        return call(*args)
