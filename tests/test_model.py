"""Does a batcher do what a simple model says, whatever is done to it?"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.afar import MachineAfar
from tests.killing import MachineElsewhere
from tests.machine import Machine
from ubatch import backoff

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "0"))
"""How many runs `make model` wants; without it there are a few, always the same."""

SETTINGS = settings(
    max_examples=EXAMPLES or 100,
    stateful_step_count=50 if EXAMPLES else 30,
    derandomize=not EXAMPLES,
    # What fails in the quick runs is shown as it came, before the time is up.
    phases=tuple(Phase) if EXAMPLES else (Phase.generate,),
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def _apart() -> Iterator[None]:
    """Keep all that is there already from being searched, and failures from the log."""
    logger = logging.getLogger("ubatch")
    handlers, logger.propagate = logger.handlers, False
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    logger.handlers, logger.propagate = handlers, True


@pytest.mark.concurrency
@pytest.mark.usefixtures("_apart")
def test_every_call_ends_once_and_as_the_model_says(backend: str) -> None:
    """Calls, kills, deadlines, bad calls, stuck handlers, forks, stops: as foreseen."""
    run_state_machine_as_test(lambda: Machine(backend), settings=SETTINGS)


@pytest.mark.concurrency
@pytest.mark.usefixtures("_apart")
def test_the_same_is_true_of_model_processes_that_are_killed(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where the handler is in another process, and kill -9 is no surprise."""
    monkeypatch.setattr(backoff, "STEADY", 0.0)  # so that no pause gets longer
    monkeypatch.setattr(backoff, "FIRST_PAUSE", 0.01)
    few = settings(SETTINGS, max_examples=EXAMPLES // 20 or 6)
    run_state_machine_as_test(lambda: MachineElsewhere(backend), settings=few)


@pytest.mark.concurrency
@pytest.mark.server
@pytest.mark.usefixtures("_apart")
def test_the_same_is_true_of_all_clients_of_a_model_server(backend: str) -> None:
    """Whoever asks, leaves or is killed, the server and its clients do as foreseen."""
    few = settings(SETTINGS, max_examples=EXAMPLES // 20 or 6)
    run_state_machine_as_test(lambda: MachineAfar(backend), settings=few)
