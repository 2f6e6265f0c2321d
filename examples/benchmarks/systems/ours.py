"""How is the library of this working tree called?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _opened(
    handler: Any, max_size: int, timeout: float, **options: Any
) -> Iterator[Any]:
    from ubatch import UBatch

    with UBatch(max_size, timeout, handler=handler, **options) as batcher:
        yield batcher.ubatch


def inline(handler: Any, max_size: int, timeout: float, **options: Any) -> Any:
    """Greenlets; the handler runs on the hub."""
    wanted = {"backend": "gevent", "executor": "inline", **options}
    return _opened(handler, max_size, timeout, **wanted)


def threadpool(handler: Any, max_size: int, timeout: float, **options: Any) -> Any:
    """Greenlets; the handler runs on a native thread. The default."""
    wanted = {"backend": "gevent", "executor": "threadpool", **options}
    return _opened(handler, max_size, timeout, **wanted)


def thread(handler: Any, max_size: int, timeout: float, **options: Any) -> Any:
    """Native threads, where "threadpool" and "inline" are the same."""
    return _opened(handler, max_size, timeout, **{"backend": "thread", **options})


def lingering(linger: str) -> Callable[..., Any]:
    """Greenlets, with one of the lingers; the executor is an option."""

    def opener(handler: Any, max_size: int, timeout: float, **options: Any) -> Any:
        wanted = {"backend": "gevent", "linger": linger, **options}
        return _opened(handler, max_size, timeout, **wanted)

    return opener
