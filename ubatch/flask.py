"""Which HTTP answer does each error of ours deserve, in a Flask application?

Flask's own rule holds: a blueprint's handler goes before the application's, and of
those the one for the closest class is asked; a handler of the user's for the same
class stays, whether it comes before init_app() or after it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

from flask import Flask, request, request_started

from ubatch.errors import BackendError, DeadlineExceeded, QueueFull, Stopped, WorkerLost
from ubatch.log import tell

logger = logging.getLogger(__name__)

STATUSES: dict[type[Exception], int] = {
    QueueFull: 503,
    Stopped: 503,
    WorkerLost: 503,
    BackendError: 503,
    DeadlineExceeded: 504,
}
UNAVAILABLE = "the model is not available; try again"
"""What a client is told of errors whose message has paths, processes and the like."""
LONGEST_RETRY = 3600
"""Seconds; nobody can tell what a queue will be like in more than an hour."""
LONGEST_LINE = 300
"""Characters of an error's message that go into the log."""

Answer = tuple[dict[str, str], int, dict[str, str]]


def init_app(app: Flask) -> None:
    """Have *app* answer the errors that mean "not now" with 503 and 504.

    ``QueueFull`` is answered with 503 and Retry-After, ``Stopped``, ``WorkerLost`` and
    ``BackendError`` with 503, ``DeadlineExceeded`` with 504: as JSON such as
    ``{"error": "QueueFull", "message": "..."}``, and with one warning in the log.
    What went wrong with a process or a server is for the log alone.
    Other errors stay what they are. May be called again; does not block.

    The APIs of ``flask_restx`` that the application has at its first request pass
    these errors on to it, unless they have handlers for the same classes.
    """
    # Only read: a second init_app() after the first request must not be an error.
    known = app.error_handler_spec[None][None]
    for kind in STATUSES:
        if kind not in known:
            app.register_error_handler(kind, answer)
    request_started.connect(_at_first_request, app)


def answer(error: Exception) -> Answer:
    """Return the HTTP answer to one of these errors, and log it.

    For handlers of the user's own that only want to add something.
    """
    kind = next(kind for kind in STATUSES if isinstance(error, kind))
    status, message = STATUSES[kind], _text(error)
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(_whole_seconds(error.retry_after))
    # The rule, not the path: what a client sends could forge lines.
    rule = request.url_rule.rule if request.url_rule else "no route"
    tell(
        logger,
        logging.WARNING,
        "%s %s: answered with %d, %s: %s",
        *(_one_line(request.method), _one_line(rule), status, kind.__name__),
        _one_line(message),
    )
    if isinstance(error, BackendError):
        message = UNAVAILABLE
    return {"error": kind.__name__, "message": message}, status, headers


def _at_first_request(app: Flask, **_: Any) -> None:
    request_started.disconnect(_at_first_request, app)
    for api in _restx_apis(app):
        api.error_handlers = {kind: _pass_on for kind in STATUSES} | api.error_handlers


def _restx_apis(app: Flask) -> Iterator[Any]:
    """Find the APIs that have put themselves before the application's handlers.

    One that knows no handler for an error answers it with 500, and the application
    is never asked; but where TESTING is set it is.
    """
    handle: Any = app.handle_user_exception
    while isinstance(handle, partial) and handle.args:
        api = getattr(handle.func, "__self__", None)
        if isinstance(getattr(api, "error_handlers", None), dict):
            yield api
        handle = handle.args[0]


def _pass_on(error: Exception) -> NoReturn:
    raise error  # what an API's handler raises, the application's are asked about


def _whole_seconds(seconds: Any) -> int:
    """Return what Retry-After can hold: 1, 2, 3 ..."""
    try:
        return max(1, math.ceil(min(float(seconds), LONGEST_RETRY)))
    except Exception:  # it is no number, or NaN; but the answer does not wait for that
        return 1


def _text(error: Exception) -> str:
    """Return an error's message, as UTF-8 can carry it."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception:  # a message of the user's that cannot be shown
        return type(error).__name__


def _one_line(text: str) -> str:
    """Return a text that can neither end its line nor do harm to a terminal."""
    text = text[:LONGEST_LINE]
    return text if text.isprintable() else repr(text)[1:-1]
