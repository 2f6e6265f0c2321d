"""What do the server, its clients and the judge agree on?"""

from __future__ import annotations

import hashlib
from random import Random
from typing import NamedTuple

from ubatch.isolation import OnError

DEADLINE = 1.0
"""Seconds that a call may take, as the batchers are told."""

GRACE = 2.0
"""Seconds more until its answer has to be there: for HTTP on two busy cores.

Both are counted from the last byte of the request, or from when a worker took it up.
"""

DOOR = 5.0
"""Seconds that a request may wait to be taken up, while gunicorn's workers start."""

HANG = 4.0
"""Seconds that a handler hangs: an ignored deadline or limit is then seen to be."""

KIND = "CHAOS_KIND"
"""The variable of the environment that names gunicorn's kind of worker."""

ALARM = "CHAOS_ALARM"
"""The one that says after how many seconds a server must have ended."""


class Kind(NamedTuple):
    """What a batcher promises."""

    workers: int
    on_error: OnError
    limit: float
    """Its handler_timeout."""
    hangs: float
    """The share of its requests that hang."""
    takes: float
    """Seconds that each run of its handler takes."""
    max_pending: int = 24
    models: str = ""
    """Whose model processes run its handler: a ``worker``'s, the ``server``'s."""
    retry: bool = False
    """What a model process had that was lost is run again, once."""


BATCHERS = {
    "pool": Kind(1, "isolate", 2.5, 0.0008, 0.003),
    # So slow, and with so many that wait, that some cannot make their deadline.
    "pair": Kind(2, "isolate", 2.5, 0.0008, 0.09, max_pending=64),
    "hub": Kind(1, "isolate", 2.5, 0.0008, 0.003),
    # Stuck before the deadline, and so often that now and then all are.
    "shared": Kind(1, "fail", 0.6, 0.005, 0.003),
    # So slow that they have a batch much of the time, when they are killed; but not so
    # slow that a batch in which many are bad were stuck before its deadline.
    "process": Kind(1, "isolate", 0.8, 0.003, 0.01, models="worker"),
    "server": Kind(2, "isolate", 0.8, 0.003, 0.01, 48, models="server", retry=True),
}
"""The routes of the app, each with a batcher of its own kind."""


class Fault(NamedTuple):
    """What an item makes the handler do, and what comes of it."""

    share: float
    """Of all requests."""
    error: str
    """The class of the error that fails the handler's run; "" if none does."""


FAULTS = {
    "poison": Fault(0.10, "Poisoned"),  # the handler raises
    "own": Fault(0.02, ""),  # the handler answers this one with an exception
    "none": Fault(0.002, "BadBatchOutput"),
    "short": Fault(0.002, "BadBatchOutputSize"),
    "exit": Fault(0.001, "HandlerExit"),
    "busy": Fault(0.003, ""),  # the handler keeps the interpreter, then answers
}

FATAL = "HandlerExit"
"""The error that fails a whole batch, isolated or not: the handler is not run again."""

OWN_ERROR = "Refused"
"""The class of the exception that answers ``own``."""

MANNERS = {"slow": 0.03, "leave": 0.03, "reset": 0.01, "part": 0.02}
"""Clients that send in pieces; that leave once they have asked, or half-way."""

BIG = 0.01
"""The share of requests with a payload of 100 kB."""

DNS = 0.05
"""The share of requests that look a host name up before they call."""


def shares_of(batcher: str, calm: bool = False) -> dict[str, float]:
    """Return which faults a batcher's items ask for, and how often.

    Args:
        calm: None that ends the process of the handler.

    On the hub itself SystemExit ends the process, as it should: gunicorn ends a
    worker so. There it would be a fault of the app.
    """
    shares = {name: fault.share for name, fault in FAULTS.items()}
    if batcher == "hub":
        del shares["exit"]
    if calm and BATCHERS[batcher].models:
        return shares
    return {**shares, "hang": BATCHERS[batcher].hangs}


def one_of(random: Random, shares: dict[str, float]) -> str:
    """Return one of these names, each as often as its share says; "" for the rest."""
    rest = random.random()
    for name, share in shares.items():
        rest -= share
        if rest < 0:
            return name
    return ""


def socket_of(home: str) -> str:
    """Return where the model server of a trial listens."""
    return f"{home}/run/model.sock"


def answer_to(name: str, data: str) -> str:
    """Return the one right answer; another request's is another."""
    text = f"{name} {data}".encode()
    return hashlib.blake2b(text, digest_size=8, key=b"chaos").hexdigest()
