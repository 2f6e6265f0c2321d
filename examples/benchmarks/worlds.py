"""How are callers started, held and waited for, as greenlets or as native threads?

Asyncio has no place here: its callers are coroutines, see ``load.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any


class Greenlets:
    """Callers on one gevent hub."""

    def spawn(self, function: Callable[..., Any], *args: Any) -> Any:
        """Start a caller."""
        from gevent import spawn

        return spawn(function, *args)

    def spawn_all(self, function: Callable[..., Any], count: int) -> list[Any]:
        """Start callers, each with its number; none runs before all are there."""
        return [self.spawn(function, number) for number in range(count)]

    def sleep(self, seconds: float) -> None:
        """Let the callers run."""
        from gevent import sleep

        sleep(seconds)

    def join(self, callers: Iterable[Any], patience: float) -> bool:
        """Wait for their ends; return False if some are still there."""
        from gevent import joinall

        everyone = list(callers)
        return len(joinall(everyone, timeout=patience)) == len(everyone)


class Threads:
    """Callers on native threads, with small stacks."""

    STACK = 256 * 1024

    def spawn(self, function: Callable[..., Any], *args: Any) -> Any:
        """Start a caller; it ends with the process at the latest."""
        import threading

        threading.stack_size(self.STACK)
        caller = threading.Thread(target=function, args=args, daemon=True)
        caller.start()
        return caller

    def spawn_all(self, function: Callable[..., Any], count: int) -> list[Any]:
        """Start callers, each with its number; none runs before all are there.

        A thread that asked already would keep the others from starting for seconds.
        """
        import threading

        everybody_is_here = threading.Event()

        def wait_and_run(number: int) -> None:
            everybody_is_here.wait()
            function(number)

        callers = [self.spawn(wait_and_run, number) for number in range(count)]
        everybody_is_here.set()
        return callers

    def sleep(self, seconds: float) -> None:
        """Let the callers run."""
        time.sleep(seconds)

    def join(self, callers: Iterable[Any], patience: float) -> bool:
        """Wait for their ends; return False if some are still there."""
        deadline = time.monotonic() + patience
        everyone = list(callers)
        for caller in everyone:
            caller.join(max(0.0, deadline - time.monotonic()))
        return not any(caller.is_alive() for caller in everyone)


WORLDS = {"gevent": Greenlets(), "thread": Threads()}
