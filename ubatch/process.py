"""Which process is this? A fork makes another, without asking the pid each time."""

from __future__ import annotations

import os


class Epoch:
    """One process's life; compared by identity."""

    __slots__ = ()


epoch = Epoch()
"""Stands for this process until it forks. Read it as ``process.epoch``."""


forks = 0
"""How many times this process has forked. Read it as ``process.forks``."""


def _forking() -> None:
    global forks
    forks += 1


def _forked() -> None:
    # Nothing but this assignment: it runs in the child before gunicorn patches,
    # so a lock or a thread made here would be of the wrong kind.
    global epoch
    epoch = Epoch()


os.register_at_fork(before=_forking, after_in_child=_forked)
