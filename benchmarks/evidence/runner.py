"""Runs units, each in a process, until all have run or the time is nearly used up. It can be killed at any moment.

A unit begins only if its expected seconds fit into the rest of the budget. It is recorded when it begins and when it
ends. A unit that was killed while it ran is tried once more, with a higher price, and then given up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from evidence import prices
from evidence.stages import REAL, ROOT, STAGES, Stage, Unit
from evidence.state import State, read_json

GRACE = 8.0  # seconds beyond the budget after which running units are killed, before the caller's own limit
PAUSE = 0.05
PR_SET_PDEATHSIG = 1
TOOLS = {
    "nvcc": "no nvcc on PATH and no CUDA_HOME; set CUDA_HOME to the folder of a CUDA toolkit",
    "ncu": "no ncu on PATH; it is part of the CUDA toolkit (Nsight Compute)",
    "compute-sanitizer": "no compute-sanitizer on PATH; it is part of the CUDA toolkit",
}


class Settings(NamedTuple):
    """The options of one call of the runner. device: "cuda", or "cpu" for a trial run, which is no evidence."""

    machine: prices.Machine
    budget: float
    device: str = "cuda"
    keep_going: bool = False
    jobs: int = 1  # at most, in stages that allow several
    memory: int = 1 << 60  # bytes of the GPU
    real: bool = True  # a GPU, not a rehearsal
    patience: float = 1.0  # factor on the limit of a unit: larger if the GPU is not real


def die_with_parent() -> None:
    """Runs in a child before it starts: it gets SIGTERM if the runner is killed, and then kills its own children."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def find_tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit: on PATH, or in CUDA_HOME."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    return shutil.which(name) or next((p for home in homes if (p := shutil.which(name, path=f"{home}/bin"))), None)


def command(unit: Unit, settings: Settings, out: Path, result: Path) -> list[str]:
    """The process of a unit."""
    words = ["--device", settings.device, "--result", str(result), "--out", str(out)]
    return [sys.executable, "-m", "evidence.unit", *unit.arguments, *words]


def environment(stage: Stage, peers: Path | None) -> dict[str, str]:
    """Environment variables of a unit's process."""
    paths = [str(ROOT / "benchmarks"), str(ROOT)]
    if stage.peers and peers is not None:
        paths.append(str(peers))
    old = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths + ([old] if old else [])), "PYTHONUNBUFFERED": "1"}


class Running:
    """A running unit. Its output goes to a file, so that no pipe can fill up."""

    def __init__(self, unit: Unit, argv: list[str], result: Path, env: dict[str, str], limit: float) -> None:
        self.unit, self.result, self.began, self.limit = unit, result, time.monotonic(), limit
        self.output = tempfile.TemporaryFile()  # noqa: SIM115, closed with this object
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def kill(self) -> None:
        """Ends it and everything that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read().decode("utf-8", "replace")


class Runner:
    """One call: `run()` until no unit is left that may begin."""

    def __init__(
        self,
        units: list[Unit],
        state: State,
        settings: Settings,
        *,
        argv: Callable[..., list[str]] = command,
        peers: Path | None = None,
        began: float | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.units, self.state, self.settings, self.argv, self.peers = units, state, settings, argv, peers
        self.began, self.say = time.monotonic() if began is None else began, say
        self.running: list[Running] = []
        self.stopped: str | None = None  # why no more units begin, apart from the budget
        self.folder = Path(tempfile.mkdtemp(prefix="evidence-"))

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def price(self, unit: Unit) -> float:
        """Expected seconds; at least 1.5 times as long as the unit ran when it was killed."""
        known = self.state.units.get(unit.key, {})
        return max(unit.price(self.settings.machine), known.get("at_least", 0.0))

    def obstacle(self, unit: Unit) -> str | None:
        """Why a unit cannot run here, or None."""
        missing = [TOOLS[name] for name in unit.needs if name in TOOLS and find_tool(name) is None]
        if REAL in unit.needs and not self.settings.real:
            missing.append("a rehearsal or a CPU does not run machine code of a GPU")
        if missing:
            return "; ".join(missing)
        if unit.memory > self.settings.memory:
            need, have = unit.memory / prices.GIB, self.settings.memory / prices.GIB
            return f"needs {need:.1f} GiB of GPU memory, this one has {have:.1f}"
        return None

    def red(self, stage: str) -> list[str]:
        """Failed units of a stage."""
        keys = [key for key, unit in self.state.units.items() if unit["stage"] == stage]
        return [key for key in keys if self.state.units[key]["status"] == "failed" or self.state.given_up(key)]

    def open_units(self) -> list[Unit]:
        """Units that may begin, in order: none after a stage that has to pass first."""
        flying = {r.unit.key for r in self.running}
        found: list[Unit] = []
        for stage in STAGES.values():
            mine = [u for u in self.units if u.stage == stage.name]
            left = [u for u in mine if not self.done_with(u) and u.key not in flying]
            found += left
            if not stage.gate:
                continue
            busy = any(u.key in flying for u in mine)
            red = self.red(stage.name)
            if red and not (left or busy) and not self.settings.keep_going:
                self.stopped = f"{stage.name} failed ({', '.join(red)}): fix it first, or use KEEP_GOING=1"
            if left or busy or (red and not self.settings.keep_going):
                break
        found += [u for u in self.units if u.stage not in STAGES and not self.done_with(u) and u.key not in flying]
        return found

    def done_with(self, unit: Unit) -> bool:
        known = self.state.units.get(unit.key, {})
        return self.state.finished(unit.key) or (known.get("status") == "cannot" and known.get("call") == self.call)

    @property
    def call(self) -> int:
        return len(self.state.calls)

    def choose(self) -> Unit | None:
        """The unit to begin now, or None."""
        left = self.settings.budget - self.elapsed()
        for unit in self.open_units():
            if self.running:
                stage = STAGES.get(unit.stage)
                jobs = min(stage.jobs if stage else 1, self.settings.jobs)
                beside = all(r.unit.stage == unit.stage and not r.unit.alone for r in self.running)
                if len(self.running) >= jobs or not beside or unit.alone:
                    continue
            if self.price(unit) <= left:
                return unit
        return None

    def begin(self, unit: Unit) -> None:
        reason = self.obstacle(unit)
        if reason is not None:
            self.state.record(unit.key, stage=unit.stage, status="cannot", reason=reason, call=self.call)
            self.say(f"[{self.elapsed():4.0f} s] {unit.key}: not run: {reason}")
            return
        price, attempts = self.price(unit), self.state.units.get(unit.key, {}).get("attempts", 0) + 1
        self.state.record(
            unit.key,
            stage=unit.stage,
            status="running",
            attempts=attempts,
            expected=round(price, 1),
            reason=None,
            at_least=1.5 * price,
            code=self.state.code,
            call=self.call,
        )
        result = self.folder / (unit.key.replace("/", "-") + ".json")
        result.unlink(missing_ok=True)
        stage = STAGES.get(unit.stage, Stage(unit.stage, "", ""))
        argv = self.argv(unit, self.settings, self.state.out, result)
        limit = (4 * price + 60) * self.settings.patience
        self.running.append(Running(unit, argv, result, environment(stage, self.peers), limit))

    def end(self, r: Running, status: str | None = None, reason: str | None = None) -> None:
        """Remove a process that has ended, or end it, and record its result."""
        if status is not None:
            r.kill()
        self.running.remove(r)
        found, text = None, r.text()
        with contextlib.suppress(OSError, ValueError):
            found = read_json(r.result)
        code = r.process.returncode
        if status is None:
            good = code == 0 and isinstance(found, dict)
            status = "done" if good else "failed"
            if not good:
                last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
                ended = f"signal {-code}" if code < 0 else f"status {code}" if code else "no result"
                reason = (found or {}).get("reason") or f"ended with {ended}: {last[:300]}"
        extra = {"at_least": 1.5 * r.seconds} if status == "interrupted" else {"at_least": 0.0}
        self.state.log(r.unit.stage, f"{r.unit.key}: {status}, {r.seconds:.1f} s", text)
        self.state.calls[-1]["seconds"] = round(self.elapsed(), 1)
        self.state.record(r.unit.key, status=status, seconds=round(r.seconds, 2), reason=reason, result=found, **extra)
        expected = self.state.units[r.unit.key]["expected"]
        why = f": {reason}" if reason else ""
        self.say(f"[{self.elapsed():4.0f} s] {r.unit.key}: {status} in {r.seconds:.0f} s, expected {expected:.0f}{why}")

    def run(self) -> None:
        """Run until no unit may begin and none is running."""
        try:
            while True:
                for r in list(self.running):
                    if r.process.poll() is not None:
                        self.end(r)
                    elif r.seconds > r.limit:
                        # tests continue where they were stopped; other units would only take as long again
                        again = r.unit.stage in STAGES and STAGES[r.unit.stage].gate
                        self.end(r, "interrupted" if again else "failed", f"stopped after {r.limit:.0f} s, its limit")
                    elif self.elapsed() > self.settings.budget + GRACE:
                        self.end(r, "interrupted", "stopped because the time of the call was used up")
                unit = self.choose()
                if unit is not None:
                    self.begin(unit)
                elif self.running:
                    time.sleep(PAUSE)
                else:
                    return
        except KeyboardInterrupt:
            for r in list(self.running):
                self.end(r, "interrupted", "stopped by a signal")
            self.stopped = "stopped by a signal"
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def unfinished(self) -> list[Unit]:
        """Units that a further call would run."""
        return [u for u in self.units if not self.done_with(u)]
