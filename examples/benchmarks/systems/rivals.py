"""How is each other library called, with the options that ours has too?

Each adapter uses the library as its own documentation shows, and adds as little as
possible to a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def u002(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """ubatch 0.0.2, the ancestor; its thread is a greenlet where that is patched."""
    import warnings

    from ubatch import UBatch

    warnings.simplefilter("ignore", DeprecationWarning)  # it calls setDaemon()
    batcher: Any = UBatch(max_size=max_size, timeout=timeout)
    batcher.set_handler(handler)
    batcher.start()
    yield batcher.ubatch
    batcher.stop()


@contextmanager
def streamer(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """service_streamer's ThreadedStreamer; it takes and returns lists."""
    from service_streamer import ThreadedStreamer

    batcher = ThreadedStreamer(handler, batch_size=max_size, max_latency=timeout)
    yield lambda item: batcher.predict([item])[0]
    batcher.destroy_workers()


@contextmanager
def batched_thread(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """batched's decorator, on native threads."""
    import batched

    ask = batched.dynamically(
        _named(handler), batch_size=max_size, timeout_ms=timeout * 1000
    )
    yield ask
    ask.shutdown()


@contextmanager
def batched_asyncio(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """batched's decorator for asyncio."""
    from batched import aio

    ask = aio.dynamically(
        _coroutine(handler), batch_size=max_size, timeout_ms=timeout * 1000
    )
    yield ask
    if ask._task is not None:
        ask._task.cancel()


@contextmanager
def ray_serve(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """Ray Serve's ``@serve.batch``, outside a replica.

    One line of it wants a replica around it, for a warning alone: that is left out.
    """
    from ray import serve
    from ray.serve.batching import _BatchQueue

    queue: Any = _BatchQueue
    queue._warn_if_max_batch_size_exceeds_max_ongoing_requests = lambda self: None
    wanted = serve.batch(max_batch_size=max_size, batch_wait_timeout_s=timeout)
    yield wanted(_coroutine(handler))


@contextmanager
def bentoml(handler: Any, max_size: int, timeout: float) -> Iterator[Any]:
    """BentoML's CorkDispatcher, which learns how long to wait: *timeout* is unused.

    It has a latency to keep instead, and refuses what would be later. It gets its
    default, a minute: with 10 ms it would refuse calls, not batch them.
    """
    from bentoml._internal.marshal.dispatcher import CorkDispatcher

    dispatcher: Any = CorkDispatcher(
        60_000, max_size, fallback=lambda: None, get_batch_size=lambda item: 1
    )
    yield dispatcher(_coroutine(handler))
    dispatcher.shutdown()


def _named(handler: Any) -> Any:
    """What a decorator wants: a function with a name, not any callable."""

    def answer(items: list[Any]) -> Any:
        return handler(items)

    return answer


def _coroutine(handler: Any) -> Any:
    async def answer(items: list[Any]) -> Any:
        return handler(items)

    return answer
