"""When is a process started again that has ended?"""

from __future__ import annotations

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Seconds until then: the first time, and at most. Each time it is twice as long, until
one has lived for STEADY."""

STEADY = 10.0
"""Seconds for which one has to live, to be taken for sound."""


class Backoff:
    """Later each time that it does not last."""

    def __init__(self) -> None:
        self._pause = FIRST_PAUSE

    def pause_after(self, lived: float) -> float:
        """Return the seconds to wait, now that one has ended that lived for *lived*."""
        if lived >= STEADY:
            self._pause = FIRST_PAUSE
        pause = self._pause
        self._pause = min(2 * pause, LONGEST_PAUSE)
        return pause
