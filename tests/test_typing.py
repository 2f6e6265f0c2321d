"""Do the types say what works, and only that?"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATCHED

HERE = Path(__file__).parent / "typing"
ROOT = HERE.parent.parent

pytestmark = pytest.mark.skipif(PATCHED, reason="types are the same when patched")


def mypy(path: Path) -> str:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    command += ["--hide-error-context", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "" and done.returncode in (0, 1), done.stderr
    return done.stdout


def test_typical_uses_are_accepted() -> None:
    """mypy --strict has nothing to say about right.py."""
    assert "" == mypy(HERE / "right.py")


def test_wrong_uses_are_rejected() -> None:
    """mypy --strict complains of every marked line of wrong.py, and of no other."""
    lines = (HERE / "wrong.py").read_text().splitlines()
    marked = {n for n, line in enumerate(lines, 1) if "# wrong:" in line}
    found = re.findall(r"wrong\.py:(\d+): error", mypy(HERE / "wrong.py"))
    assert marked == {int(number) for number in found}
