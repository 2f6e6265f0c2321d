"""The commands ``ubatch serve`` and ``ubatch status``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ubatch import address, options
from ubatch.backends.native import wait_for
from ubatch.channel import Channel
from ubatch.errors import BackendError
from ubatch.isolation import ON_ERROR
from ubatch.policy import LINGERS
from ubatch.ubatch import UBatch
from ubatch.wire import LARGEST_FRAME, Kind, WireError

SOCKET = "where to listen: PATH or unix:PATH"
PROCESSES = "model processes; each runs one batch at a time (%(default)s)"
LINGER = "when to close a batch (%(default)s)"
ISOLATE = "isolate: run a failed batch again in halves (%(default)s)"
FRAME = "most bytes in one message of a client (%(default)s)"
GRACE = "seconds to answer what was accepted, after SIGTERM (%(default)s)"

FILES = 1 << 20
"""That a server may have open, if it may say so itself. Some programs that a model may
start try to close every number there could be: more than that would take seconds."""

PATIENCE = 5.0
"""Seconds within which a server has to tell how it is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except (BackendError, OSError, TypeError, ValueError, WireError) as error:
        print(f"ubatch {chosen.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ubatch", description="Batching, for a host.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run one model for all processes here")
    serve.set_defaults(run=_serve)
    add = serve.add_argument
    add("factory", help="package.module:factory, which returns the handler")
    add("--socket", required=True, metavar="PATH", help=SOCKET)
    add("--max-size", type=int, default=64, help="calls in a batch (%(default)s)")
    add("--timeout", type=float, default=0.01, help="seconds to linger (%(default)s)")
    add("--processes", type=int, default=1, help=PROCESSES)
    add("--linger", choices=LINGERS, default="adaptive", help=LINGER)
    add("--max-pending", type=int, help="calls that may wait (no limit)")
    add("--deadline", type=float, help="seconds for calls that have none (no limit)")
    add("--on-error", choices=ON_ERROR, default="fail", help=ISOLATE)
    add("--handler-timeout", type=float, help="seconds for a batch (no limit)")
    add("--retry", action="store_true", help="run again, once, what a lost process had")
    add("--max-frame", type=int, default=LARGEST_FRAME, metavar="BYTES", help=FRAME)
    add("--grace", type=float, default=30.0, help=GRACE)
    add("--with-parent", type=int, metavar="PID", help=argparse.SUPPRESS)
    status = commands.add_parser("status", help="tell how a server is, as JSON")
    status.add_argument("socket", metavar="PATH", help="where it listens")
    status.set_defaults(run=_status)
    return parser


def _serve(chosen: argparse.Namespace) -> int:
    from ubatch.forward import ForwardingExecutor
    from ubatch.server import Server
    from ubatch.spawn import close_inherited, end_with_parent

    if chosen.with_parent is not None:
        close_inherited()
        end_with_parent()
        if os.getppid() != chosen.with_parent:  # it was gone before
            return 0
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    # The program has its own folder first, and not that where it was started.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    path = address.path_of(chosen.socket, scheme=False)
    _allow_files()
    executor = ForwardingExecutor(chosen.factory, chosen.processes, retry=chosen.retry)
    batcher: UBatch[Any, Any] = UBatch(
        chosen.max_size,
        chosen.timeout,
        backend="gevent",
        executor=executor,
        linger=chosen.linger,
        max_pending=chosen.max_pending,
        deadline=chosen.deadline,
        on_error=chosen.on_error,
        handler_timeout=chosen.handler_timeout,
    )
    largest = options.count("max_frame", chosen.max_frame)
    grace = options.seconds("grace", chosen.grace)
    Server(executor, path, batcher, largest=largest, grace=grace).run()
    return 0


def _allow_files() -> None:
    """Have as many files as this user may: a shell's 1024 are few for a host."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # then it is as it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _status(chosen: argparse.Namespace) -> int:
    path = address.path_of(chosen.socket, scheme=False)
    try:
        sock = address.connect(path)
    except OSError as error:
        raise BackendError(f"no model server answers at {path}: {error}") from None
    channel = Channel(sock, wait_for)
    channel.send(Kind.HELLO, 0, {}, timeout=PATIENCE)
    channel.send(Kind.STATUS, 1, None, timeout=PATIENCE)
    while (frame := channel.receive(PATIENCE)) is not None:
        if frame.kind is Kind.REFUSE:
            raise BackendError(frame.head)
        if frame.kind is Kind.STATUS:
            print(json.dumps(frame.head, indent=2))
            return 0
    raise BackendError(f"the model server at {path} has hung up")
