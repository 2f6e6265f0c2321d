"""How is the library of this working tree called?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


@contextmanager
def here(handler: Any, max_size: int, timeout: float, **options: Any) -> Iterator[Any]:
    """Open a batcher of any kind, with its handler."""
    from ubatch import UBatch

    with UBatch(max_size, timeout, handler=handler, **options) as batcher:
        yield batcher


def in_process(
    make: Any, max_size: int, timeout: float, **options: Any
) -> AbstractContextManager[Any]:
    """Open a batcher whose handler is made, and runs, in a process of its own."""
    from ubatch import ProcessExecutor

    return here(None, max_size, timeout, executor=ProcessExecutor(make), **options)


@contextmanager
def connected(
    make: str, max_size: int, timeout: float, **options: Any
) -> Iterator[Any]:
    """Open a batcher that asks a model server, which is started for it.

    Args:
        make: ``"module:function"``, of a module beside the benchmarks.
    """
    from ubatch import UBatch

    with tempfile.TemporaryDirectory(prefix="ubatch-") as home:
        path = f"{home}/socket"
        command = [sys.executable, "-m", "ubatch", "serve", make, f"--socket={path}"]
        command += [f"--max-size={max_size}", f"--timeout={timeout}"]
        server = subprocess.Popen(command, cwd=HERE, stdin=subprocess.DEVNULL)
        try:
            with UBatch.connect(f"unix:{path}", **options) as batcher:
                yield batcher
        finally:
            server.terminate()
            server.wait()


@contextmanager
def _call(opened: AbstractContextManager[Any]) -> Iterator[Any]:
    with opened as batcher:
        yield batcher.ubatch


def _opened(*args: Any, **options: Any) -> Any:
    return _call(here(*args, **options))


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


def process(backend: str) -> Callable[..., Any]:
    """The handler in a process of its own."""

    def opener(make: Any, max_size: int, timeout: float, **options: Any) -> Any:
        wanted = {"backend": backend, **options}
        return _call(in_process(make, max_size, timeout, **wanted))

    return opener


def server(backend: str) -> Callable[..., Any]:
    """The handler in a process of a model server's."""

    def opener(make: str, max_size: int, timeout: float, **options: Any) -> Any:
        wanted = {"backend": backend, **options}
        return _call(connected(make, max_size, timeout, **wanted))

    return opener
