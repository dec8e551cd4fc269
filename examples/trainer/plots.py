"""Plots of a run's metrics, and the table that is printed at its end."""

from __future__ import annotations

import math
from pathlib import Path

from .run_files import write_whole


def pyplot():
    """matplotlib.pyplot with the backend that draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_picture(figure, path: Path) -> None:
    """Write a figure as PNG and close it."""
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    pyplot().close(figure)


def curves_of(rows: list[dict], name: str) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of a metric by stage; values that are not finite are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if math.isfinite(row.get(name, math.nan)):
            found.setdefault(row["stage"], []).append((row["step"], row[name]))
    return found


def plot_metrics(rows: list[dict], panels: dict[str, str], path: Path, title: str) -> None:
    """Plot metrics over steps into a PNG: one panel for each metric that has values, one color for each stage.

    The last stage uses the left axis, earlier stages use the right one: on a common axis a loss that falls from 5 to
    0.3 in the first stage would make the loss of the next stage a flat line.

    Args:
        panels: name of a metric -> title of its panel.
    """
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    curves = {label: found for name, label in panels.items() if (found := curves_of(rows, name))}
    across = max(1, (len(curves) + 1) // 2)
    figure, axes = pyplot().subplots(2, across, figsize=(10, 6), layout="constrained", squeeze=False)
    for axis, (label, found) in zip(axes.flat, curves.items()):
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
        before, lines = axis.twinx() if len(found) > 1 else None, []
        for stage, points in found.items():
            scale = axis if stage == list(found)[-1] else before
            style = dict(color=f"C{stages.index(stage)}", linewidth=1.2, marker="." if len(points) < 20 else None)
            name = stage if scale is axis else f"{stage}, scale on the right"
            lines += scale.plot(*zip(*points), label=name, **style)
        axis.legend(handles=lines)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    save_picture(figure, path)


def print_table(title: str, labels: dict[str, str], columns: dict[str, dict[str, float]]) -> None:
    """Print a table with one line for each label (metric -> description) and one column for each dict of values."""
    width = max(map(len, [title, *labels.values()])) + 1
    print("\n" + f"{title:{width}}" + "".join(f"{name:>12}" for name in columns))
    for name, label in labels.items():
        cells = (f"{column[name]:>12.3f}" if name in column else " " * 12 for column in columns.values())
        print(f"{label:{width}}" + "".join(cells))
