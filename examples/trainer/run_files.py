"""Files of a run: writes that finish or leave nothing, checkpoint folders, and metrics.jsonl."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import fail

# torch and safetensors report a full disk in these words; other writers raise OSError.
DISK_FULL = re.compile(r"inline_container|PytorchStreamWriter|os error (27|28|30|122)\b")


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename the result to `path`: a partly written file never has that name.

    Raises:
        OSError: the disk is full, whatever the writer itself raised.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        write(temporary)
    except BaseException as error:
        remove(temporary)
        if DISK_FULL.search(str(error)):
            raise OSError(errno.ENOSPC, f"No space left for {path.name} ({error})") from error
        raise
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


def make_folder(folder: Path, flag: str) -> None:
    """Create the folder that a flag names; end the program if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{flag}: {folder} cannot be created ({error.strerror}); name another folder")


def checkpoint(folder: Path, step: int) -> Path:
    """The path of the checkpoint written after `step` steps."""
    return folder / f"checkpoint-{step:08d}"


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, newest last."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl up to the first invalid one: an interruption may have cut the last line short."""
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
