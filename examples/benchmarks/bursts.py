"""How is a burst of new connections answered? By a real gunicorn, in its own processes.

Every so often so many clients connect at once, send one request each and read until
the server closes; latency is counted from the moment of the burst. Each answer tells
of the worker and the batch it came from. With several workers gunicorn accepts one
connection in a turn of its loop (``max_accept`` is 1), so that a burst trickles in.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gevent.monkey import get_original

from traffic import latency_ms

HERE = Path(__file__).resolve().parent
CALLS = 20
"""In a burst."""
APART = 0.1
"""Seconds from one burst to the next."""
PATIENCE = 10.0
"""Seconds for an answer; the first one waits for gunicorn to start."""
REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"

real_socket = get_original("socket", "socket")
real_select = get_original("select", "select")


def bursts(
    linger: str, fixed: float, each: float, workers: int, parameters: Any
) -> dict[str, Any]:
    """Have gunicorn answer bursts; return the figures.

    Returns:
        ``calls_per_burst``: how often the handler was called. ``calls_per_share``:
        how often for what one worker got of one burst; 1 is a whole one. The
        latencies, ``mean_batch``, and ``cpu_us``: CPU time of the workers per call.
    """
    settings = {"LINGER": linger, "FIXED": str(fixed), "EACH": str(each)}
    count = parameters["bursts"]
    with _gunicorn(workers, settings) as port:
        first = parameters["bursts_before"]
        before = [answer for _ in range(first) for answer in burst(port)]
        seen = [burst(port) for _ in range(count)]
    told = [[body for _, body in answers] for answers in seen]
    calls = sum(map(len, told))
    shares = sum(len({pid for pid, _, _ in burst}) for burst in told)
    batches = sum(len({(pid, batch) for pid, batch, _ in burst}) for burst in told)
    start = [body for _, body in before]
    return {
        "calls_per_burst": batches / count,
        "calls_per_share": batches / shares,
        "mean_batch": calls / batches,
        "cpu_us": _cpu(start, sum(told, start)) / calls * 1e6,
        **latency_ms([seconds for answers in seen for seconds, _ in answers]),
    }


def _cpu(before: list[Any], all_of_it: list[Any]) -> float:
    """Return the CPU time that the workers spent after what came before."""
    spent = 0.0
    for pid in {answer[0] for answer in all_of_it}:
        since = [cpu for owner, _, cpu in before if owner == pid]
        until = [cpu for owner, _, cpu in all_of_it if owner == pid]
        spent += max(until) - max(since, default=min(until))
    return spent


def burst(port: int, request: bytes = REQUEST) -> list[tuple[float, Any]]:
    """Make one burst; return the latency and the body of each answer.

    With the operating system's own sockets: all are connected within a millisecond.
    """
    begun = time.monotonic()
    waiting: dict[Any, bytes] = {}
    for _ in range(CALLS):
        client = real_socket(socket.AF_INET, socket.SOCK_STREAM)
        client.connect(("127.0.0.1", port))
        client.send(request)
        waiting[client] = b""
    answers = []
    while waiting:
        ready, _, _ = real_select(list(waiting), [], [], PATIENCE)
        if not ready:
            raise RuntimeError(f"not answered within {PATIENCE:g} s")
        for client in ready:
            some = client.recv(4096)
            waiting[client] += some
            if not some:
                client.close()
                answers.append((time.monotonic() - begun, waiting.pop(client)))
    time.sleep(max(0.0, begun + APART - time.monotonic()))
    return [(seconds, _body(answer)) for seconds, answer in answers]


def _body(answer: bytes) -> Any:
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"answered with {head[:60]!r}")
    return json.loads(body)


@contextmanager
def _gunicorn(workers: int, settings: dict[str, str]) -> Iterator[int]:
    """Start gunicorn, and give its port once all of its workers answer.

    It inherits a socket that listens already, so nothing comes too early.
    """
    command = [sys.executable, "-m", "gunicorn", "burst_app:app", "-k", "gevent"]
    command += ["-w", str(workers), "--backlog", "1024"]
    command += ["-c", str(HERE / "burst_conf.py"), "--chdir", str(HERE)]
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        port = listener.getsockname()[1]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [*command, "-b", f"fd://{listener.fileno()}"],
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
            )
            pids: set[int] = set()
            try:
                _wait_for(workers, port, process, log, pids)
                yield port
            finally:  # at once: a graceful end takes a second
                process.kill()
                process.wait()
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def _wait_for(
    workers: int,
    port: int,
    process: subprocess.Popen[bytes],
    log: IO[bytes],
    pids: set[int],
) -> None:
    """Ask until each worker has told its *pids*: they start one after the other."""
    deadline = time.monotonic() + PATIENCE
    while len(pids) < workers:
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            lines = log.read().decode(errors="replace").split("\n")
            raise RuntimeError(f"gunicorn does not answer: {' '.join(lines[-3:])}")
        pids.update(body[0] for _, body in burst(port))
