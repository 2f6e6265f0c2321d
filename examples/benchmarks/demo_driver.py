"""How long do many users wait, each of whom asks, gets the answer, and asks again?

    python demo_driver.py PORT PATH USERS SECONDS

Each request has a connection of its own, as if it came from another browser. Prints one
line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import gevent
from gevent import socket

PICTURE = [0, 0, 7, 15, 13, 1, 0, 0, 0, 8, 13, 6, 15, 4, 0, 0] * 4
BODY = json.dumps({"pixels": PICTURE})
HEAD = "POST {} HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n"
KIND = f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"


def drive(port: int, path: str, users: int, seconds: float) -> dict[str, float]:
    """Return how many were answered, and how long they waited."""
    request = (HEAD.format(path) + KIND + BODY).encode()
    waits: list[float] = []
    began = time.perf_counter()

    def ask_until_the_end() -> None:
        while time.perf_counter() < began + seconds:
            asked = time.perf_counter()
            _ask(port, request)
            waits.append(time.perf_counter() - asked)

    gevent.joinall([gevent.spawn(ask_until_the_end) for _ in range(users)], None, True)
    taken = time.perf_counter() - began
    waits.sort()
    return {
        "answered": len(waits),
        "per_second": len(waits) / taken,
        "median": waits[len(waits) // 2],
        "p99": waits[len(waits) * 99 // 100],
    }


def _ask(port: int, request: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request)
        answer = b""
        while data := connection.recv(4096):
            answer += data
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"not answered with 200: {answer[:200]!r}")


if __name__ == "__main__":
    port, path, users, seconds = sys.argv[1:]
    print(json.dumps(drive(int(port), path, int(users), float(seconds))))
