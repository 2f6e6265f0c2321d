"""What did all benchmarks measure? Tables and plots of ``results/*.json``.

Writes ``TABLES.rst`` and an SVG for each benchmark beside the results; the same results
make the same files, byte for byte. Run by itself, it reports what is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from registry import NAMES, Benchmark, load
from results import FOLDER, Aim, Result, brief, table

UNIT = {"x": ""}


def report(folder: Path = FOLDER) -> str:
    """Write the tables and the plots of every result in *folder*; return the text."""
    parts = ["Benchmarks", "=========="]
    for name in NAMES:
        path = folder / f"{name}.json"
        if path.exists():
            benchmark, result = load(name), Result.read(path)
            draw(benchmark, result, folder)
            parts += ["", section(benchmark, result)]
    text = "\n".join(parts) + "\n"
    (folder / "TABLES.rst").write_text(text)
    return text


def section(benchmark: Benchmark, result: Result) -> str:
    """Return one benchmark's part: the question, the tables, the aims, the machine."""
    title = f"{benchmark.name}: {benchmark.question}"
    parts = [f"{title}\n{'-' * len(title)}", benchmark.table(result)]
    aims = list(benchmark.aims(result))
    if aims:
        parts.append(f"Aims:\n\n{aims_table(aims)}")
    if failed := _failures(result):
        parts.append(failed)
    if missing := result.data["missing"]:
        rows = [(name, f"missing: {reason}") for name, reason in missing.items()]
        parts.append(f"Not measured:\n\n{table(('system', 'why'), rows)}")
    return "\n\n".join([*parts, _conditions(result)])


def aims_table(aims: Iterable[Aim]) -> str:
    """Return what was aimed at, what was measured, and whether that is enough."""
    rows = [
        (
            aim.text,
            f"{brief(aim.limit)} {UNIT.get(aim.unit, aim.unit)}".strip(),
            f"{brief(aim.measured)} {UNIT.get(aim.unit, aim.unit)}".strip(),
            aim.verdict,
        )
        for aim in aims
    ]
    return table(("aim", "at most", "measured", "verdict"), rows)


def draw(benchmark: Benchmark, result: Result, folder: Path) -> None:
    """Save a benchmark's plot, readable on any background."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "ubatch", "svg.fonttype": "path"}):
        figure = Figure(figsize=(8.5, 4.5), facecolor="white", layout="constrained")
        FigureCanvasSVG(figure)
        benchmark.plot(result, figure)
        path = folder / f"{benchmark.name}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _failures(result: Result) -> str:
    """Return the cells that failed, in some repeats or in all, and the last reason."""
    rows = []
    for cell in result.cells:
        keys = {k: v for k, v in cell.items() if k not in NOT_KEYS}
        if cell.get("failures"):
            where = " ".join(f"{key}={value}" for key, value in keys.items())
            rows.append(
                (cell["system"], where or "-", str(cell["failures"]), cell["failed"])
            )
    head = ("system", "where", "repeats", "reason")
    return f"Failed:\n\n{table(head, rows)}" if rows else ""


NOT_KEYS = ("system", "metrics", "failed", "failures")


def _conditions(result: Result) -> str:
    """Return what is needed to judge, or to repeat, the figures."""
    data = result.data
    machine, load_average = data["machine"], data["load"]
    versions = ", ".join(f"{name} {found}" for name, found in data["versions"].items())
    before, after = load_average["before"][0], load_average["after"][0]
    lines = [
        f"Medians of {data['repeats']} repeats (min-max), {data['date']}.",
        f"{versions}.",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}.",
        f"Load average {before:.1f} before, {after:.1f} after; "
        f"{data['seconds']:.0f} s in all.",
    ]
    if data["quick"]:
        lines.append("A quick try-out: these figures mean little.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
