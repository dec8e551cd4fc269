"""The files in OUT: one JSON per GPU with all units, logs, and the tests that passed. At most 8, of 16 MiB each.

A JSON file is replaced atomically, and a line is appended in one write. So everything that was finished is kept if the
run is killed.
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
OF_A_UNIT = 256 << 10  # bytes that one unit may add: half from its beginning, half from its end
TESTS = "tests-ended.jsonl"
UNFINISHED = ("running", "interrupted")
TRIES = 2  # tries of a unit that is killed while it runs


class Unusable(Exception):
    """OUT cannot be used; the message says why and what to do."""


def strict(value):
    """The same with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def write_json(path: Path, value) -> None:
    """Replace a file with this value atomically."""
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
    """The content of a file of strict JSON."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)


def code_digest() -> str:
    """A digest of the measured code: fused_po/ and kernels/."""
    found = hashlib.sha256()
    for folder in ("fused_po", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h"):
                found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def slug(name: str) -> str:
    """The name of a GPU in file names: h100, h200, or the whole name."""
    known = re.search(r"\b([abhl]\d{2,3}s?|gh200|gb200)\b", name, re.IGNORECASE)
    short = known[1] if known and "rehearsal" not in name else name
    return re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-")


def open_folder(out: Path, before: Path | None) -> None:
    """Create OUT and try to write in it; copy the results of an earlier call from the folder `before`."""
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
        raise Unusable(f"FROM: {before} is not a folder; expected the OUT of an earlier call, or leave it out")
    for path in before.iterdir():
        if path.is_file() and not path.name.startswith(".") and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


class State:
    """Units by key, for one GPU: {"status", "attempts", "seconds", "reason", "result", "code", ...}.

    status: done, failed (it failed, or took too long), cannot (something that it needs is missing), running (it is
    running, or was killed with the runner), interrupted (killed by the runner when the time was used up).
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
            self.notes.append(
                f"{self.path.name} cannot be read ({error}); it is kept as {aside.name}, and all units run again"
            )
            return {}

    def begin_call(self, command: str, budget: float) -> None:
        self.calls.append({"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "budget": budget, "seconds": 0})
        self.calls[-1] |= {"command": command, "code": self.code}

    def save(self) -> None:
        write_json(self.path, {"format": FORMAT, **self.about, "calls": self.calls, "units": self.units})

    def record(self, key: str, **values) -> None:
        """Change the record of a unit; it is on disk when this returns."""
        self.units.setdefault(key, {"attempts": 0}).update(values)
        self.save()

    def forget_failures(self) -> None:
        """RETRY=1: units that failed or were given up run again."""
        self.units = {key: unit for key, unit in self.units.items() if unit["status"] in ("done", "cannot")}

    def given_up(self, key: str) -> bool:
        unit = self.units.get(key, {})
        return unit.get("status") in UNFINISHED and unit["attempts"] >= TRIES

    def finished(self, key: str) -> bool:
        """Whether a unit runs again only with RETRY=1."""
        return self.units.get(key, {}).get("status") in ("done", "failed") or self.given_up(key)

    def log(self, stage: str, title: str, text: str) -> None:
        """Append the output of a unit to the log of its stage."""
        path = self.out / (STAGES[stage].log if stage in STAGES else f"{stage}.log")
        raw = text.encode("utf-8", "replace")
        if len(raw) > OF_A_UNIT:
            half, left = OF_A_UNIT // 2, len(raw) - OF_A_UNIT
            raw = raw[:half] + f"\n... {left} bytes left out ...\n".encode() + raw[-half:]
        block = f"==== {title} ====\n".encode() + raw + b"\n"
        with contextlib.suppress(OSError):  # a log must not stop the run
            size = path.stat().st_size if path.exists() else 0
            if size + len(block) > LARGEST:
                block = f"==== {title} ====\n... left out: this log is full ...\n".encode()
            if size < LARGEST + 65536:
                with open(path, "ab") as file:
                    file.write(block)
