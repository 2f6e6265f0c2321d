"""When do calls come, if nobody waits for an answer before the next one asks?

``arrivals.py START SEED RATE SECONDS`` writes one byte to standard output at each
moment of a Poisson process, so that they reach a hub as requests do: by a socket, in
the turn of the loop in which they come. A timer of that hub could not do it: libev's
are a millisecond apart, and would make little waves of what comes evenly.
"""

from __future__ import annotations

import os
import random
import sys
import time


def moments(seed: int, rate: float, seconds: float) -> list[float]:
    """Return the moments, in seconds from the start; the same for the same seed."""
    chance = random.Random(seed)
    found = []
    moment = chance.expovariate(rate)
    while moment < seconds:
        found.append(moment)
        moment += chance.expovariate(rate)
    return found


def main(start: float, seed: int, rate: float, seconds: float) -> None:
    """Write the bytes; what is late is made up for at once."""
    due = moments(seed, rate, seconds)
    written = 0
    while written < len(due):
        ahead = start + due[written] - time.monotonic()
        if ahead > 0:
            time.sleep(ahead)
        come = time.monotonic() - start
        last = written
        while last < len(due) and due[last] <= come:
            last += 1
        os.write(1, b"." * (last - written))
        written = last


if __name__ == "__main__":
    start, seed, rate, seconds = sys.argv[1:]
    main(float(start), int(seed), float(rate), float(seconds))
