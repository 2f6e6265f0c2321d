"""Do imports point one way? The table is the law."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ubatch

PACKAGE = Path(ubatch.__file__).parent

# A module, and all it may import from the package at run time.
LAYERS = {
    "errors": set(),
    "process": set(),
    "log": set(),
    "policy": set(),
    "options": set(),
    "registry": set(),
    "stats": set(),
    "nesting": {"errors"},
    "batch": {"errors"},
    "life": {"process"},
    "deadlines": {"batch"},
    "isolation": {"batch", "errors"},
    "waiting": {"batch", "policy"},
    "future": {"errors", "log", "nesting", "options"},
    "executors": {"batch", "errors", "isolation", "log", "nesting", "options"},
    "backoff": set(),
    "wire": set(),
    "memory": {"process", "wire"},
    "channel": {"memory", "process", "wire"},
    "arrays": set(),
    "parcel": {"arrays", "errors", "wire"},
    "spawn": {"backends.native", "channel", "process"},
    "model": {
        *("backends.native", "batch", "channel", "errors", "isolation", "options"),
        *("parcel", "spawn", "wire"),
    },
    "address": {"errors", "options"},
    "calling": {"options", "parcel", "wire"},
    "link": {"calling", "channel", "origin", "parcel", "wire"},
    "remote": {
        *("address", "batch", "calling", "channel", "errors", "executors", "link"),
        *("log", "options", "origin", "process", "wire"),
    },
    "session": {
        *("batch", "calling", "channel", "errors", "options", "parcel", "wire"),
    },
    "forward": {
        *("batch", "errors", "executors", "parcel", "processes", "session", "wire"),
    },
    "server": {
        *("address", "channel", "errors", "forward", "log", "processes", "session"),
        *("ubatch", "wire"),
    },
    "cli": {
        *("address", "backends.native", "channel", "errors", "forward", "isolation"),
        *("options", "policy", "server", "spawn", "ubatch", "wire"),
    },
    "__main__": {"cli"},
    "keeper": {"backoff", "errors", "log", "parcel", "spawn", "wire"},
    "origin": {"batch", "errors", "executors", "parcel", "wire"},
    "processes": {
        *("batch", "errors", "executors", "isolation", "keeper", "options", "origin"),
        *("parcel", "process", "wire"),
    },
    "pace": {"policy"},
    "strands": {"batch", "errors", "executors", "log", "options", "pace", "policy"},
    "endings": {"batch", "errors", "executors", "future", "log"},
    "collector": {
        *("batch", "deadlines", "endings", "errors", "executors", "future"),
        *("isolation", "life", "options", "process", "stats", "strands", "waiting"),
    },
    "backends": {"backends.base", "backends.gevent", "errors"},
    "backends.base": set(),
    "backends.native": set(),
    "backends.thread": {
        *("backends.gevent", "backends.native", "errors", "executors", "future"),
    },
    "backends.inbox": {"process"},
    "backends.gevent": {
        *("backends.inbox", "backends.thread", "errors", "executors", "future"),
        *("options", "process"),
    },
    "calls": {"future"},
    "ubatch": {
        *("backends", "calls", "collector", "errors", "executors", "future"),
        *("isolation", "life", "log", "nesting", "options", "policy", "process"),
        *("registry", "remote", "stats"),
    },
    "decorators": {
        *("backends", "calls", "executors", "future", "isolation", "options"),
        *("policy", "stats", "ubatch"),
    },
    "drain": {"log", "registry", "stats", "ubatch"},
    "flask": {"errors", "log"},
    "sidecar": {"address", "backends.native", "backoff", "log", "spawn"},
    "gunicorn": {
        *("address", "drain", "isolation", "log", "policy", "processes", "registry"),
        *("remote", "sidecar", "ubatch"),
    },
    "": {"decorators", "errors", "future", "processes", "remote", "stats", "ubatch"},
}
ONLY_IN = {
    "gevent": {"backends.gevent", "backends.inbox", "executors", "server"},
    "greenlet": {"backends.gevent"},
    "threading": {"backends.thread"},
    "_thread": {"backends.native", "backends.thread"},
    "flask": {"flask"},
    "flask_restx": set(),
    "gunicorn": {"gunicorn"},
    "numpy": set(),
}
STDLIB = {"threading", "_thread"}


def modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[name.removesuffix("__init__").rstrip(".")] = path
    return names


def imports(path: Path) -> set[str]:
    """Return what a module imports at run time, by full name."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            if node.module == "ubatch":
                found |= {f"ubatch.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def test_the_table_names_every_module() -> None:
    """A new module needs its place in the table."""
    assert set(LAYERS) == set(modules())


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_module_imports_only_what_it_may(name: str) -> None:
    """No module reaches up, or sideways where the table does not say so."""
    found = imports(modules()[name])
    ours = {one.removeprefix("ubatch.") for one in found if one.startswith("ubatch")}
    assert ours <= LAYERS[name]


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_is_imported_only_in_its_file(library: str) -> None:
    """What is optional, or differs between backends, is asked for in one place."""
    users = {
        name
        for name, path in modules().items()
        if any(one.split(".")[0] == library for one in imports(path))
    }
    assert users <= ONLY_IN[library]


def test_import_ubatch_imports_nothing_optional() -> None:
    """import ubatch, decorate and start: what it can do without stays out."""
    code = (
        "import sys, ubatch\n"
        "ubatch.ubatch_decorator(1, 0.0)(lambda xs: xs)\n"
        f"print(*sorted({set(ONLY_IN) - STDLIB} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "" == done.stdout.strip()
