"""Are the wheel and the sdist in a directory fit to publish? ``make dist`` asks.

Each may hold the package and nothing else of ours, and must work in an environment
that has nothing else in it.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SDIST_TOP = {
    *("CHANGES.rst", "LICENSE", "README.rst", "setup.cfg", "setup.py"),
    *("MANIFEST.in", "PKG-INFO"),
}

SMOKE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gevent
import ubatch

batches = []


def square(numbers):
    batches.append(numbers)
    return [number * number for number in numbers]


home = Path(ubatch.__file__).parent
assert Path(sys.prefix) in home.parents, f"{home} is not in {sys.prefix}"
assert (home / "py.typed").exists()

expected = [number * number for number in range(8)]
with ubatch.UBatch(8, 0.05, handler=square, linger="full", backend="thread") as ub:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ub.ubatch, range(8))) == expected
with ubatch.UBatch(8, 0.05, handler=square, linger="full", backend="gevent") as ub:
    jobs = [gevent.spawn(ub.ubatch, number) for number in range(8)]
    assert [job.get(timeout=10) for job in jobs] == expected
assert sum(map(len, batches)) == 16 and len(batches) < 16, batches
"""


def main(folder: Path) -> None:
    """Check the one wheel and the one sdist in *folder*; exit with what is wrong."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    _check_wheel(wheel)
    _check_sdist(sdist)
    for archive in (wheel, sdist):
        _check_it_works(archive)
        print(f"{archive}: holds only the package, and works in an empty environment")


def _check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    version = wheel.name.split("-")[1]
    metadata = f"ubatch-{version}.dist-info"
    _check_names(wheel, names, {"ubatch", metadata}, {f"{metadata}/licenses/LICENSE"})


def _check_sdist(sdist: Path) -> None:
    root = sdist.name.removesuffix(".tar.gz") + "/"
    with tarfile.open(sdist) as archive:
        names = [member.name for member in archive if member.isfile()]
    inside = [name.removeprefix(root) for name in names]
    _check_names(sdist, inside, SDIST_TOP | {"ubatch", "ubatch.egg-info"}, SDIST_TOP)


def _check_names(archive: Path, names: list[str], top: set[str], due: set[str]) -> None:
    """Refuse what lies under none of *top*, and the absence of *due* or of a source."""
    strangers = sorted(name for name in names if name.split("/")[0] not in top)
    if strangers:
        sys.exit(f"{archive}: must not hold {', '.join(strangers)}")
    sources = {str(path) for path in Path("ubatch").rglob("*.py")}
    missing = sorted((sources | {"ubatch/py.typed"} | due) - set(names))
    if missing:
        sys.exit(f"{archive}: lacks {', '.join(missing)}")


def _check_it_works(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        python = str(Path(scratch) / "venv" / "bin" / "python")
        pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        for step, command in {
            "make an environment": [sys.executable, "-m", "venv", "venv"],
            "install": [*pip, str(archive.resolve())],
            "pass the smoke test": [python, "-I", "-W", "error", "-c", SMOKE],
        }.items():
            if subprocess.run(command, cwd=scratch).returncode:
                sys.exit(f"{archive}: did not {step}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
