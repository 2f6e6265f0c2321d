"""Which backend runs the batches here?

Decided at the first call in each process, for the greenlet or thread that makes
it: gunicorn patches in the worker, after --preload has imported the application.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Literal, NamedTuple, cast

from ubatch.backends.base import Backend
from ubatch.errors import BackendError

BackendName = Literal["auto", "gevent", "thread"]
BACKENDS: tuple[BackendName, ...] = ("auto", "gevent", "thread")
VARIABLE = "UBATCH_BACKEND"


class Choice(NamedTuple):
    """A backend and why it was chosen, for the log."""

    backend: Backend
    why: str


def load(name: BackendName, near: Backend | None = None) -> Choice:
    """Return the backend of that name; choose one for ``"auto"``.

    Args:
        name: What the user asked for.
        near: What runs the caller, if it is a handler: a first call from a worker
            thread says nothing about who will call later.

    Raises:
        BackendError: There is no such backend, or it cannot be used here.
    """
    why = "asked for by name"
    if name == "auto" and near is not None:
        return Choice(near.again(), "as that of the handler that made the first call")
    if name == "auto":
        name, why = _choose()
    if name == "thread":
        _check_threads_are_native()
    module = import_module(f"ubatch.backends.{name}")
    return Choice(cast(Backend, module.make()), why)


def _choose() -> tuple[BackendName, str]:
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in BACKENDS:
        raise BackendError(
            f"{VARIABLE}={wanted!r} names no backend; use one of {', '.join(BACKENDS)}"
        )
    if wanted != "auto":
        return cast(BackendName, wanted), f"{VARIABLE} says so"
    if "gevent" not in sys.modules:
        return "thread", "gevent is not imported"
    # gevent is in the process: ask it, but never import it to find out.
    from ubatch.backends.gevent import runs_under_a_hub, threading_is_patched

    if runs_under_a_hub():
        return "gevent", "the first caller is a greenlet under a hub"
    if threading_is_patched():
        return "gevent", "threading is monkey-patched"
    return "thread", "gevent is imported, but neither patches threading nor runs here"


def _check_threads_are_native() -> None:
    """Refuse "threads" that are greenlets: a handler would stall all of them."""
    if "gevent.monkey" in sys.modules:
        from ubatch.backends.gevent import threading_is_patched

        if threading_is_patched():
            raise BackendError(
                "backend 'thread' needs native threads, but gevent has patched "
                "threading; use backend='gevent' or 'auto', or patch_all(thread=False)"
            )
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("thread"):
        raise BackendError(
            "ubatch does not run on eventlet: its threads are greenlets that a native "
            "wait would stall; serve with gunicorn -k gevent or -k gthread"
        )
