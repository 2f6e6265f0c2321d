"""Measure the cells of one system: what runs in a process, and often an environment,
of its own.

``child.py BENCHMARK SYSTEM PARAMETERS`` prints one JSON line with versions, and one for
each cell as soon as it is measured. Whatever else writes to standard output is sent to
standard error.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Any

from systems import SYSTEMS

NOTED = (
    "ubatch",
    "gevent",
    "greenlet",
    "service_streamer",
    "batched",
    "ray",
    "bentoml",
)


def main(benchmark: str, name: str, parameters: str) -> None:
    """Measure, and leave without waiting for threads that hang."""
    system = SYSTEMS[name]
    if system.patched:
        from gevent import monkey

        monkey.patch_all()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        _measure(benchmark, system, json.loads(parameters), out)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)


def _measure(benchmark: str, system: Any, parameters: Any, out: IO[str]) -> None:
    from registry import load

    wanted = load(benchmark)
    print(json.dumps({"versions": _versions()}), file=out)
    for cell in wanted.cells(system, parameters):
        gc.collect()
        try:
            found: Any = {"metrics": wanted.measure(system, cell, parameters)}
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps({"cell": cell, **found}), file=out)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in NOTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
