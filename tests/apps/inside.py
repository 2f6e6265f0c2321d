"""What the programs of tests share: they import it in their child process."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fakes import World


def world_of(leg: str) -> World:
    """Return callers and patience for "thread", "gevent" or "patched"; patch for it."""
    if leg == "patched":
        from gevent import get_hub, monkey

        monkey.patch_all()
        # Before the fork, or its os.waitpid() misses a child that ends at once.
        get_hub().loop.install_sigchld()
    from tests.fakes import World

    return World("thread" if leg == "thread" else "gevent")


class Forked:
    """A fork of this process that does some work."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._answer = tempfile.TemporaryFile("w+")  # patched pipes close late
        self._pid = os.fork()
        if self._pid:
            return
        signal.alarm(600)  # not inherited
        tell_gevent()
        try:
            answer = {"value": work()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        json.dump(answer, self._answer)
        self._answer.flush()
        os._exit(0)

    def result(self) -> Any:
        """Wait for the fork's end; return what its work returned."""
        assert os.waitpid(self._pid, 0)[1] == 0
        with self._answer:
            self._answer.seek(0)
            answer = json.load(self._answer)
        assert "value" in answer, answer["error"]
        return answer["value"]


def tell_gevent() -> None:
    """Tell gevent of a fork that it has not seen, where its loop does not notice.

    libev does, and nothing may be needed there; libuv goes on in the parent's epoll
    instance until it is told. A patched ``os.fork()`` has told it.
    """
    if "gevent" not in sys.modules:
        return
    from gevent import config, monkey, reinit

    told = monkey.is_object_patched("os", "fork")
    if not told and config.loop.__module__.startswith("gevent.libuv"):
        reinit()


class Record:
    """A file that all forks write to: what was handled, and where."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND)

    def add(self, items: list[Any]) -> None:
        """Note a batch."""
        os.write(self._file, f"{json.dumps([os.getpid(), items])}\n".encode())

    def of(self, pid: int) -> list[list[Any]]:
        """Return the batches of one process, in order."""
        text = os.pread(self._file, 1 << 20, 0).decode()
        entries = [json.loads(line) for line in text.splitlines()]
        return [items for owner, items in entries if owner == pid]


def native_threads(world: World, calls: list[Callable[[], Any]]) -> list[Any]:
    """Run each in a native thread, while the hub runs; return their results."""
    monkey = sys.modules.get("gevent.monkey")
    start = monkey.get_original("_thread", "start_new_thread") if monkey else None
    if start is None:
        from _thread import start_new_thread as start
    ends: dict[int, Any] = {}

    def run(number: int, call: Callable[[], Any]) -> None:
        try:
            ends[number] = call()
        except BaseException:
            ends[number] = AssertionError(traceback.format_exc())

    for number, call in enumerate(calls):
        start(run, (number, call))
    world.until(lambda: len(ends) == len(calls))
    for end in ends.values():
        if isinstance(end, AssertionError):
            raise end
    return [ends[number] for number in range(len(calls))]
