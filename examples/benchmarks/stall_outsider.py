"""How long does a trivial request take, as seen from another process?

    python stall_outsider.py PORT RATE SECONDS

Waits for a line on standard input. Then sends eight bytes RATE times a second, by the
clock and not by the answers, on one connection to a server that sends them back. Prints
what each took, in seconds from the moment it was due: what was sent late because of us
counts as well.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time

PATIENCE = 10.0
"""Seconds for the last answers to come."""


def ask(port: int, rate: float, seconds: float) -> list[float]:
    """Return the latency of each request, in the order they were sent."""
    due = [number / rate for number in range(int(rate * seconds))]
    latencies: list[float] = []
    sent, received = 0, b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.perf_counter()
        while len(latencies) < len(due):
            now = time.perf_counter() - began
            if now > seconds + PATIENCE:
                raise TimeoutError(f"{len(due) - len(latencies)} answers are missing")
            while sent < len(due) and due[sent] <= now:
                connection.sendall(struct.pack("<q", sent))
                sent += 1
            wait = due[sent] - now if sent < len(due) else PATIENCE
            if not select.select([connection], [], [], max(0.0, wait))[0]:
                continue
            received += connection.recv(4096)
            now = time.perf_counter() - began
            for (number,) in struct.iter_unpack("<q", received[: len(received) & ~7]):
                latencies.append(now - due[number])
            received = received[len(received) & ~7 :]
    return latencies


if __name__ == "__main__":
    sys.stdin.readline()
    print(json.dumps(ask(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))))
