"""The files under OUT: one JSON of all units a GPU, logs, and the tests that have passed. At most 8, of 16 MiB each.

A file of JSON is replaced whole, and a line is appended in one write: whenever the run is killed, what was finished is
there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

from evidence.stages import ROOT, STAGES

FORMAT = "fused_po evidence 1"
LARGEST = 15 << 20  # bytes of a log
OF_A_UNIT = 256 << 10  # bytes that one unit may add to it: the first and the last half of them
TESTS = "tests-ended.jsonl"
UNFINISHED = ("running", "interrupted")
TRIES = 2  # of a unit that is killed while it runs


class Unusable(Exception):
    """OUT cannot be used; the message says why and what to do."""


def strict(value):
    """The same without NaN and infinities, which JSON has not: None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def write_json(path: Path, value) -> None:
    """Replaces a file by this value, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(strict(value), file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def read_json(path: Path):
    """A file of strict JSON."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)


def code_digest() -> str:
    """A name for the code that is measured: fused_po/ and kernels/."""
    found = hashlib.sha256()
    for folder in ("fused_po", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h"):
                found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def slug(name: str) -> str:
    """A GPU's name as part of a file's: h100, h200, or the whole name."""
    known = re.search(r"\b([abhl]\d{2,3}s?|gh200|gb200)\b", name, re.IGNORECASE)
    short = known[1] if known and "rehearsal" not in name else name
    return re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-")


def open_folder(out: Path, before: Path | None) -> None:
    """Makes OUT and tries to write in it; takes over what an earlier call left in the folder `before`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe.tmp"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise Unusable(f"OUT: {out} cannot be written ({error.strerror}); name another folder") from error
    for left in out.glob(".*.tmp"):
        left.unlink(missing_ok=True)
    if before is None or before.resolve() == out.resolve():
        return
    if not before.is_dir():
        raise Unusable(f"FROM: {before} is no folder; it names the OUT of an earlier call, or leave it out")
    for path in before.iterdir():
        if path.is_file() and not path.name.startswith(".") and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


class State:
    """Units by key, for one GPU: {"status", "attempts", "seconds", "reason", "result", "code", ...}.

    status: done, failed (it ended badly, or took too long), cannot (something it needs is not here), running (in
    flight, or killed with the runner), interrupted (killed by the runner when its time was up).
    """

    def __init__(self, out: Path, about: dict) -> None:
        self.out, self.code, self.notes = out, code_digest(), []
        self.path = out / f"evidence-{slug(about['device'])}{'-tiny' * (about['suite'] == 'tiny')}.json"
        found = self._load()
        self.units: dict[str, dict] = found.get("units", {})
        self.calls: list[dict] = found.get("calls", [])
        self.about = about
        for unit in self.units.values():
            if unit["status"] == "running":  # the runner was killed with it
                unit |= {"status": "interrupted", "reason": "killed with the runner"}

    def _load(self) -> dict:
        if not self.path.exists():
            return {}
        try:
            found = read_json(self.path)
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
            if not all({"status", "stage", "attempts"} <= unit.keys() for unit in found["units"].values()):
                raise ValueError("a unit has no status")
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            aside = self.path.with_name(f"{self.path.stem}.damaged.json")
            os.replace(self.path, aside)
            self.notes.append(f"{self.path.name} cannot be read ({error}); kept as {aside.name}, all units run again")
            return {}

    def begin_call(self, command: str, budget: float) -> None:
        self.calls.append({"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "budget": budget, "seconds": 0})
        self.calls[-1] |= {"command": command, "code": self.code}

    def save(self) -> None:
        write_json(self.path, {"format": FORMAT, **self.about, "calls": self.calls, "units": self.units})

    def record(self, key: str, **values) -> None:
        """Changes a unit's record, on disk before this returns."""
        self.units.setdefault(key, {"attempts": 0}).update(values)
        self.save()

    def forget_failures(self) -> None:
        """RETRY=1: what failed or was given up runs again."""
        self.units = {key: unit for key, unit in self.units.items() if unit["status"] in ("done", "cannot")}

    def given_up(self, key: str) -> bool:
        unit = self.units.get(key, {})
        return unit.get("status") in UNFINISHED and unit["attempts"] >= TRIES

    def finished(self, key: str) -> bool:
        """Whether it is not run again without RETRY=1."""
        return self.units.get(key, {}).get("status") in ("done", "failed") or self.given_up(key)

    def log(self, stage: str, title: str, text: str) -> None:
        """Appends a unit's output to its stage's log."""
        path = self.out / (STAGES[stage].log if stage in STAGES else f"{stage}.log")
        raw = text.encode("utf-8", "replace")
        if len(raw) > OF_A_UNIT:
            half, left = OF_A_UNIT // 2, len(raw) - OF_A_UNIT
            raw = raw[:half] + f"\n... {left} bytes left out ...\n".encode() + raw[-half:]
        block = f"==== {title} ====\n".encode() + raw + b"\n"
        with contextlib.suppress(OSError):  # a log is not worth the run
            size = path.stat().st_size if path.exists() else 0
            if size + len(block) > LARGEST:
                block = f"==== {title} ====\n... left out: this log is full ...\n".encode()
            if size < LARGEST + 65536:
                with open(path, "ab") as file:
                    file.write(block)
