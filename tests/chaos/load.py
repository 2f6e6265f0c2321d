"""Steady load from a process of its own, that notes how each request ended.

``python -m tests.chaos.load PORT SEED SECONDS RATE CALM FILE``: requests come in
bursts, at random times, and nobody waits for others' answers. The same seed asks the
same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from random import Random
from typing import TextIO

import gevent

from tests.chaos.client import Request, ask
from tests.chaos.plan import BATCHERS, BIG, DNS, MANNERS, one_of, shares_of

LARGEST_BURST = 16


def main(
    port: int, seed: str, seconds: float, rate: float, calm: bool, path: str
) -> None:
    """Send requests for so many seconds; return when all have ended."""
    with open(path, "w") as file:
        began = time.monotonic()
        asking = []
        for at, burst in bursts(seed, seconds, rate, calm):
            gevent.sleep(max(0.0, began + at - time.monotonic()))
            asking += [gevent.spawn(_ask, port, request, file) for request in burst]
            asking = [each for each in asking if not each.dead]
        gevent.joinall(asking)


def bursts(
    seed: str, seconds: float, rate: float, calm: bool = False
) -> Iterator[tuple[float, list[Request]]]:
    """Return when to send what."""
    random = Random(seed)
    number, mean_size = 0, (1 + LARGEST_BURST) / 2
    at = random.expovariate(rate / mean_size)
    while at < seconds:
        batcher, size = random.choice([*BATCHERS]), random.randint(1, LARGEST_BURST)
        names = [f"{seed}-{number + k}" for k in range(size)]
        yield at, [_request(random, name, batcher, calm) for name in names]
        number += size
        at += random.expovariate(rate / mean_size)


def _request(random: Random, name: str, batcher: str, calm: bool) -> Request:
    manner = one_of(random, MANNERS)
    size = 100_000 if random.random() < BIG else random.randint(10, 200)
    return Request(
        name,
        batcher,
        # Who leaves is no cause of what befalls the others.
        (
            ""
            if manner in ("leave", "reset", "part")
            else one_of(random, shares_of(batcher, calm))
        ),
        manner,
        random.randbytes(size // 2).hex(),
        random.random() < DNS,
        [random.uniform(0.0, 0.4) for _ in range(5 if manner == "slow" else 1)],
    )


def _ask(port: int, request: Request, file: TextIO) -> None:
    ask(port, request)
    file.write(f"{request.line()}\n")


if __name__ == "__main__":
    _, _port, _seed, _seconds, _rate, _calm, _path = sys.argv
    main(int(_port), _seed, float(_seconds), float(_rate), _calm == "1", _path)
