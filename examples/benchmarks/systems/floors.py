"""What does it cost to park a caller and to wake it, with no batcher at all?

No batcher can be cheaper than these by much. Each runs the handler on a list of the
one item, so that the handler's part is in every figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def call(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """Call the handler directly, for one caller: what the load itself costs."""
    yield lambda item: handler([item])[0]


@contextmanager
def switch(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """A greenlet switches to the hub, which switches back."""
    from gevent import get_hub, getcurrent

    hub = get_hub()
    soon = hub.loop.run_callback

    def ask(item: Any) -> Any:
        soon(getcurrent().switch, handler([item])[0])
        return hub.switch()

    yield ask


@contextmanager
def waiter(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """A greenlet parks on gevent's ``Waiter``, which the hub's next turn wakes."""
    from gevent import get_hub
    from gevent.hub import Waiter

    hub = get_hub()
    soon = hub.loop.run_callback

    def ask(item: Any) -> Any:
        parked = Waiter(hub)
        soon(parked.switch, handler([item])[0])
        return parked.get()

    yield ask


@contextmanager
def lock(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """A native thread parks on a raw lock, which one other thread releases."""
    from _thread import allocate_lock
    from queue import SimpleQueue
    from threading import Thread

    asked: SimpleQueue[Any] = SimpleQueue()

    def answer() -> None:
        while (place := asked.get()) is not None:
            place[1] = handler([place[1]])[0]
            place[0].release()

    def ask(item: Any) -> Any:
        parked = allocate_lock()
        parked.acquire()
        place = [parked, item]
        asked.put(place)
        parked.acquire()
        return place[1]

    answering = Thread(target=answer, daemon=True)
    answering.start()
    yield ask
    asked.put(None)
    answering.join()


@contextmanager
def future(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """An asyncio task parks on a future, which the loop's next turn sets."""
    from asyncio import get_running_loop

    loop = get_running_loop()

    async def ask(item: Any) -> Any:
        parked = loop.create_future()
        loop.call_soon(parked.set_result, handler([item])[0])
        return await parked

    yield ask
