"""Fixtures for all tests: the backend under test, and a look for leaks."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from platform import python_version

import gevent
import greenlet
import pytest
from gevent import monkey
from gevent.hub import Hub

from tests.fakes import World

# A test's time limit that strikes in a greenlet has to reach the main one, or a test
# that hangs there passes.
Hub.SYSTEM_ERROR = (*Hub.SYSTEM_ERROR, pytest.fail.Exception)

PATCHED = bool(monkey.is_module_patched("threading"))
"""This leg runs under ``python -m gevent.monkey``; native threads are not offered."""

BACKENDS = ["gevent"] if PATCHED else ["gevent", "thread"]

VERSIONS = {
    "Python": python_version(),
    "gevent": gevent.__version__,
    "greenlet": greenlet.__version__,
    "loop": gevent.config.loop.__module__.split(".")[1],
    "leg": "patched" if PATCHED else "plain",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the options of .ci/suite.py and of tox."""
    parser.addoption("--shard", default="1/1", help="run one part of the tests: 2/3")
    parser.addoption("--no-threads", action="store_true", help="run gevent's tests")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out what other shards run; a test with parameters stays whole.

    And where only gevent's loop differs, what backend="thread" does.
    """
    which, count = map(int, config.getoption("--shard").split("/"))
    tests = [item.nodeid.partition("[")[0] for item in items]
    numbers = {test: number for number, test in enumerate(dict.fromkeys(tests))}
    rest = {
        item
        for item, test in zip(items, tests)
        if numbers[test] % count != which - 1
        or (config.getoption("--no-threads") and _runs_on_threads(item))
    }
    items[:] = [item for item in items if item not in rest]
    config.hook.pytest_deselected(items=list(rest))


def _runs_on_threads(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("backend") == "thread"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this leg can run."""
    return str(request.param)


@pytest.fixture
def world(backend: str) -> World:
    """Callers, gates and patience for the backend under test."""
    return World(backend)


@pytest.fixture
def hub() -> World:
    """The same, for what only gevent promises."""
    return World("gevent")


@pytest.fixture
def threads() -> World:
    """The same, for what only native threads promise."""
    if PATCHED:
        pytest.skip("native threads are not offered where threading is patched")
    return World("thread")


@pytest.fixture(scope="session", autouse=True)
def _what_runs(record_testsuite_property: Callable[[str, object], None]) -> None:
    """Write into the report of ``--junitxml`` what ran; .ci/table.py reads it."""
    for name, value in VERSIONS.items():
        record_testsuite_property(name, value)


def pytest_report_header() -> str:
    """Say what runs."""
    return ", ".join(f"{name} {value}" for name, value in VERSIONS.items())


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread or a greenlet behind."""
    gevent.get_hub()
    before = _alive()
    yield
    deadline = time.monotonic() + 5.0
    while (left := _alive() - before) and time.monotonic() < deadline:
        gevent.sleep(0.01)
    assert not left, f"left behind: {left}"


def _alive() -> set[object]:
    greenlets = {
        found
        for found in gc.get_objects()
        if isinstance(found, gevent.Greenlet) and not found.dead
    }
    return {*sys._current_frames(), *greenlets}
