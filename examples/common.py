"""What the examples do with files and words: errors, whole files, metrics, pictures, tables."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch


def fail(message: str) -> None:
    """End the program with a message, not a traceback."""
    raise SystemExit(f"error: {message}")


def check_device(device: str) -> None:
    """Refuse a device that is not here, or that no training runs on."""
    try:
        if torch.empty(0, device=device).device.type != "meta":
            return
        reason = "it holds no values"
    except (RuntimeError, AssertionError) as error:  # torch has both for a device that is not there
        reason = str(error).splitlines()[0][:100]
    fail(f"--device: got {device!r}, expected cpu, cuda or cuda:1 ({reason})")


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# What the writers of torch and safetensors say of a disk that takes no more; others say OSError.
CUT_SHORT = re.compile(r"inline_container|PytorchStreamWriter|os error (27|28|30|122)\b")


def write_whole(path: Path, write) -> None:
    """write(temporary path), then rename: what stands at `path` is whole or not there. A full disk is an OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        write(temporary)
    except BaseException as error:
        remove(temporary)
        if CUT_SHORT.search(str(error)):
            raise OSError(errno.ENOSPC, f"No space left for {path.name} ({error})") from error
        raise
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


def checkpoint(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps is."""
    return folder / f"checkpoint-{step:08d}"


def make_folder(folder: Path, flag: str) -> None:
    """The folder that a flag names, if it can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{flag}: {folder} cannot be made ({error.strerror}); name another folder")


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, the newest last."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics file up to the first that is none: the last may have been cut short by an interruption."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not (isinstance(row, dict) and isinstance(row.get("step"), int) and "stage" in row):
            break
        rows.append(row)
    return rows


def pyplot():
    """matplotlib.pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_picture(figure, path: Path) -> None:
    """A PNG, whole or not there."""
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    pyplot().close(figure)


def curves_of(rows: list[dict], name: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of a metric by stage, where it is a number."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if math.isfinite(row.get(name, math.nan)):
            found.setdefault(row["stage"], []).append((row["step"], row[name]))
    return found


def plot_metrics(rows: list[dict], panels: dict[str, str], path: Path, title: str) -> None:
    """A PNG with one panel for each metric that there is (name: title of the panel), over steps, a colour a stage.

    The last stage has the scale on the left, those before it one on the right: a loss that falls from 5 to 0.3 would
    make the next one's a flat line.
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
            look = dict(color=f"C{stages.index(stage)}", linewidth=1.2, marker="." if len(points) < 20 else None)
            name = stage if scale is axis else f"{stage}, scale on the right"
            lines += scale.plot(*zip(*points), label=name, **look)
        axis.legend(handles=lines)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    save_picture(figure, path)


def print_table(title: str, labels: dict[str, str], columns: dict[str, dict[str, float]]) -> None:
    """A line for each label (name: what to call it), a column for each dict of values."""
    width = max(map(len, [title, *labels.values()])) + 1
    print("\n" + f"{title:{width}}" + "".join(f"{name:>12}" for name in columns))
    for name, label in labels.items():
        cells = (f"{column[name]:>12.3f}" if name in column else " " * 12 for column in columns.values())
        print(f"{label:{width}}" + "".join(cells))
