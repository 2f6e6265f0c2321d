"""How does one request go, on a connection of its own?

A fresh connection, since one that is kept alive may be closed by the server just when
the client asks again: HTTP's own race, in which neither is at fault.
"""

from __future__ import annotations

import json
import socket as sockets
import struct
import time
from dataclasses import asdict, dataclass
from typing import Any

import gevent
from gevent import socket

from tests.chaos.plan import DEADLINE, DOOR, GRACE, answer_to

PATIENCE = DOOR + DEADLINE + GRACE
"""Seconds that a client waits, counted from the last byte of its request."""


@dataclass(slots=True)
class Request:
    """One request, and what its client saw."""

    name: str
    batcher: str
    fault: str
    manner: str
    """"", or one of MANNERS."""
    data: str
    dns: bool
    pauses: list[float]
    """Seconds before each piece of what is sent slowly, or before leaving."""
    began: float = 0.0
    sent: float = 0.0
    """When the last byte was; 0.0 if it never was."""
    ended: float = 0.0
    end: str = ""
    """``answered``, ``left``, ``timeout``, ``closed`` early, or the error's class."""
    status: int = 0
    answer: str = ""
    error: str = ""
    message: str = ""
    of: str = ""
    """Whose fault the error is said to be."""
    pid: int = 0
    """Of the worker that answered."""
    wanted: str = ""
    """The right answer."""

    def line(self) -> str:
        """Return what goes into the file; the payload is too long for it."""
        return json.dumps({**asdict(self), "data": ""})


def ask(port: int, request: Request) -> None:
    """Send a request as its manner wants, and note how it ends."""
    request.wanted = answer_to(request.name, request.data)
    request.began = time.monotonic()
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as peer:
            request.end = _converse(peer, request)
    except OSError as error:
        request.end = type(error).__name__
    request.ended = time.monotonic()


def _converse(peer: Any, request: Request) -> str:
    head, body = _text_of(request)
    if request.manner == "part":
        peer.sendall(head + body[: len(body) // 2])
        gevent.sleep(request.pauses[0])
        return "left"
    peer.sendall(head)
    pieces = len(request.pauses) if request.manner == "slow" else 1
    step = -(-len(body) // pieces)
    for number in range(pieces):
        if request.manner == "slow":
            gevent.sleep(request.pauses[number])
        peer.sendall(body[number * step : (number + 1) * step])
    request.sent = time.monotonic()
    if request.manner in ("leave", "reset"):
        gevent.sleep(request.pauses[0])
        if request.manner == "reset":
            at_once = struct.pack("ii", 1, 0)
            peer.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, at_once)
        return "left"
    received = b""
    with gevent.Timeout(PATIENCE, False):
        while chunk := peer.recv(65536):
            received += chunk
        return "answered" if _take_in(received, request) else "closed"
    return "timeout"


def _text_of(request: Request) -> tuple[bytes, bytes]:
    asked = ("name", "data", "fault", "dns")
    body = json.dumps({key: getattr(request, key) for key in asked}).encode()
    head = (
        f"POST /{request.batcher} HTTP/1.1\r\nHost: chaos\r\nConnection: close\r\n"
        f"X-Id: {request.name}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode(), body


def _take_in(received: bytes, request: Request) -> bool:
    """Read an answer; return False if it is not whole."""
    head, end_of_head, body = received.partition(b"\r\n\r\n")
    if not end_of_head:
        return False
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    request.status = int(first.split()[1])
    request.pid = int(headers.get("x-worker", 0))
    if len(body) != int(headers["content-length"]):
        return False
    if headers["content-type"] == "application/json":
        said = json.loads(body)
        request.answer = said.get("answer", "")
        request.error, request.of = said.get("error", ""), said.get("of", "")
        request.message = said.get("message", "")
    return True
