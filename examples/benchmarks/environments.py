"""Where does each system run? In an environment of its own, made when it is needed.

A rival's virtual environment lies below ``.bench/`` and is kept. What cannot be
installed or imported is missing, with one line that says why; it is tried again in the
next run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".bench"
HELD = ("gevent", "greenlet")
"""Installed beside a rival in the release that is installed here."""
PATIENCE = 900.0


class Missing(Exception):
    """A system cannot be measured here; the message is one line."""


@dataclass(frozen=True)
class Environment:
    """What a rival's virtual environment holds."""

    name: str
    requirements: tuple[str, ...]
    imports: str
    """The module that is imported as a proof."""


_failed: dict[Environment, str] = {}


def python_for(environment: Environment | None, more: Sequence[str] = ()) -> str:
    """Return the interpreter of an environment, which is made if it is not there.

    Args:
        environment: None for the interpreter that runs this.
        more: Requirements that this benchmark adds.

    Raises:
        Missing: It cannot be made; once tried, it is not tried again in this run.
    """
    if environment is None:
        return sys.executable
    if environment in _failed:
        raise Missing(_failed[environment])
    try:
        return _made(environment, [*environment.requirements, *more])
    except Missing as missing:
        _failed[environment] = str(missing)
        raise


def variables(environment: Environment | None) -> dict[str, str]:
    """Return the environment variables of a child: ours imports the working tree."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("UBATCH_", "RAY_"))
    }
    more = kept.pop("PYTHONPATH", "")
    if environment is None:
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), more]))
    return kept


def _made(environment: Environment, requirements: list[str]) -> str:
    folder = FOLDER / environment.name
    python, stamp = folder / "bin" / "python", folder / "holds.json"
    base = f"python=={platform.python_version()}"
    holds = json.loads(stamp.read_text()) if stamp.exists() else []
    wanted = [_held(requirement) for requirement in requirements]
    if not {base, *wanted} <= set(holds):
        print(f"making .bench/{environment.name} (once) ...", file=sys.stderr)
        if base not in holds:  # another Python, or left half made
            holds = []
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        pip = [str(python), "-m", "pip", "install", "-q", "--no-input"]
        _run([*pip, "--disable-pip-version-check", *wanted])
        _run([str(python), "-c", f"import {environment.imports}"])
        stamp.write_text(json.dumps(sorted({*holds, base, *wanted})))
    return str(python)


def _held(requirement: str) -> str:
    return (
        f"{requirement}=={version(requirement)}" if requirement in HELD else requirement
    )


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"not installed within {PATIENCE:.0f} s") from None
    if done.returncode:
        errors = [x for x in done.stderr.splitlines() if x.startswith("ERROR")]
        said = last_line("\n".join(errors) or done.stderr)
        raise Missing(said or f"exit status {done.returncode}")


def last_line(text: str) -> str:
    """Return the last line that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
