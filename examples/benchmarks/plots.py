"""How does a plot look? The same for every benchmark.

Nothing here imports matplotlib: a figure is given. Our systems have thick lines, floors
are dashed, and a system has one colour in every plot.
"""

from __future__ import annotations

from typing import Any

from results import Result
from systems import SYSTEMS

COLOURS = {
    "ours": ("#0b6e4f", "#35b37e", "#7fcf5f"),
    "ours-process": ("#0077b6", "#6fb7dd"),
    "ours-server": ("#6a3fb5", "#a98be0"),
    "linger": ("#0077b6", "#e07a00", "#b5179e", "#0b6e4f"),
    "floor": ("#555555", "#808080", "#a0a0a0", "#b4b4b4", "#c8c8c8"),
    "ubatch-0.0.2": ("#c1121f", "#f06a74"),
    "service-streamer": ("#e07a00", "#ffb347"),
    "batched": ("#6a3fb5", "#a98be0"),
    "ray-serve": ("#0077b6",),
    "bentoml": ("#b5179e",),
}
DASHES = ("--", "-.", ":", (0, (6, 1)), (0, (1, 1)))


def style(system: str) -> dict[str, Any]:
    """Return the keyword arguments of ``Axes.plot`` for a system."""
    kind = system.partition(":")[0]
    alike = [name for name in SYSTEMS if name.partition(":")[0] == kind]
    shades = COLOURS.get(kind, ("#000000",))
    place = alike.index(system) if system in alike else 0
    return {
        "color": shades[place % len(shades)],
        "linewidth": 2.4 if kind.startswith("ours") else 1.2,
        "linestyle": DASHES[place % len(DASHES)] if kind == "floor" else "-",
        "zorder": 3 if kind.startswith("ours") else 2,
    }


def lines(axes: Any, result: Result, key: str, metric: str, scale: float = 1.0) -> None:
    """Draw a metric over a parameter: a line of medians for each system."""
    for system in result.systems():
        known = [
            (x, y * scale)
            for x in result.values(key)
            if (y := result.median(system, metric, **{key: x})) is not None
        ]
        if known:
            xs, ys = zip(*known)
            axes.plot(xs, ys, marker="o", markersize=4, label=system, **style(system))
    finish(axes)


def finish(axes: Any) -> None:
    """Take away what is not needed, and put the legend outside."""
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8
        )


def bars(axes: Any, result: Result, key: str, metric: str, scale: float = 1.0) -> None:
    """Draw a metric as bars, a row for each system, a hatch for each value of *key*.

    Values of 0 and less are drawn at the axis: it may be logarithmic.
    """
    systems, values = result.systems(), result.values(key)
    height = 0.8 / max(1, len(values))
    for place, value in enumerate(values):
        for row, system in enumerate(systems):
            found = result.median(system, metric, **{key: value})
            if found is None:
                continue
            where, width = row + (place - (len(values) - 1) / 2) * height, found * scale
            colour = style(system)["color"]
            fade = 1.0 - 0.45 * place / max(1, len(values) - 1)
            axes.barh(where, max(0.0, width), height, color=colour, alpha=fade)
            text = f" {value} {width:.3g}"
            axes.text(max(width, 0.0), where, text, va="center", fontsize=7)
    axes.set_yticks(range(len(systems)), systems)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    finish(axes)
    axes.grid(False, axis="y")
