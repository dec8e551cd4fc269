"""Helpers for tests of the examples: small data, runs, weights of checkpoints, and a run killed inside a step."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint
from repository import ROOT, SUPPORT  # noqa: F401

EXAMPLES = ROOT / "examples"
sys.path.insert(1, str(EXAMPLES))  # after tests/support

from trainer import checkpoints, comparisons, run_files  # noqa: E402

# Kills its own process inside a step: after the backward, before the weights change.
KILL = """
import importlib, os, signal, sys
sys.path.insert(0, {examples!r})
import torch
torch.set_num_threads({threads})
script = importlib.import_module({script!r})
clip, calls = torch.nn.utils.clip_grads_with_norm_, []
def counted(*args, **how):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*args, **how)
torch.nn.utils.clip_grads_with_norm_ = counted
script.train(script.parse({words!r}))
"""


def script(name: str):
    """examples/<name>.py."""
    return importlib.import_module(name)


def small_data(folder: Path, train: int = 60, test: int = 8, uneven: bool = False) -> list[str]:
    """Flags for a few rows of the shipped data sets, so that evaluation is fast.

    uneven: make some answers longer. The shipped answers have one length, which would hide a wrong mean over tokens.
    """
    words = []
    for flag, source, count in (("--dataset", comparisons.TRAIN, train), ("--test-dataset", comparisons.TEST, test)):
        rows = [json.loads(line) for line in source.read_text().splitlines()[:count]]
        for number, row in enumerate(rows):
            if uneven and number % 3 == 0:
                row["chosen" if number % 2 else "rejected"] += " It is larger than the other number."
        path = folder / source.name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words += [flag, str(path)]
    return [*words, "--device", "cpu"]


def run(name: str, words: list[str], output: Path, *more: str):
    """Run a script; returns what its train() returns."""
    return script(name).train(script(name).parse([*words, "--output", str(output), *more]))


def weights(output: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, by default the last one. Any number of ranks may have written it."""
    path = run_files.checkpoint(output, step or run_files.checkpoints(output)[-1])
    reader = checkpoint.HuggingFaceStorageReader(str(path))
    names = reader.read_metadata().state_dict_metadata
    state = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in names.items() if n.startswith("/model/")}
    with checkpoints.alone():
        checkpoint.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix("/model/"): value for name, value in state.items()}


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def killed(name: str, words: list[str], output: Path, at: int) -> None:
    """Run the script in its own process, which kills itself in optimizer step number `at`."""
    how = dict(examples=str(EXAMPLES), threads=torch.get_num_threads(), script=name, at=at)
    code = KILL.format(**how, words=[*words, "--output", str(output)])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
