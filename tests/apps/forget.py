"""A WSGI app whose requests submit and do not wait: a line in a file tells the end.

In the environment: GATE, a FIFO that the handler waits for; RECORD, the file, which
gets ``[pid, item, result]`` for each call; UBATCH_LOG, a file for our log lines.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

from ubatch import Future, UBatch, ubatch_decorator

logging.getLogger("ubatch").setLevel(logging.INFO)
logging.getLogger("ubatch").addHandler(logging.FileHandler(os.environ["UBATCH_LOG"]))
logging.getLogger("ubatch").propagate = False

record = os.open(os.environ["RECORD"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)


@ubatch_decorator(max_size=8, timeout=0.01, name="twice")
def twice(numbers: list[int]) -> list[int]:
    """Answer one batcher's handlers for the other."""
    return [2 * number for number in numbers]


def held(numbers: list[int]) -> list[int]:
    """Wait at the gate; then ask the other batcher, again and again."""
    os.close(os.open(os.environ["GATE"], os.O_RDONLY))
    return [twice.ubatch(twice.ubatch(number)) for number in numbers]


ub: UBatch[int, int] = UBatch(2, 0.01, handler=held, name="held").start()


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request at once."""
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    if environ["PATH_INFO"] == "/submit":
        number = int(query["n"])

        def note(future: Future[int]) -> None:
            error = future.exception()
            result = type(error).__name__ if error else future.result()
            line = json.dumps([os.getpid(), number, result])
            os.write(record, f"{line}\n".encode())

        ub.submit(number).add_done_callback(note)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(os.getpid()).encode()]
