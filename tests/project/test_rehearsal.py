"""The rehearsal of the CUDA path: faults it must find, and its short form where torch is built with CUDA."""

import json
import os
import re
import subprocess
import sys

import pytest
from rehearsal import __main__ as rehearsal
from rehearsal import build
from repository import ROOT, SUPPORT

OWN = ROOT / ".rehearsal" / "bin" / "python"
PYTHON = str(OWN) if OWN.exists() else sys.executable

KERNELS = """
import json, sys
sys.path.insert(0, {support!r})
import numpy, torch, triton, triton.language as tl
from rehearsal import approximate, checks

@triton.jit
def copy(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr, HINT: tl.constexpr):
    at = tl.arange(0, BLOCK)
    block = x_ptr + shift
    if HINT:
        block = tl.multiple_of(block, 16)
    tl.store(out_ptr + at, tl.load(block + at, mask=at < n), mask=at < n)

@triton.jit
def powers(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.exp2(tl.load(x_ptr + at)))

def found(x, out, n, shift, hint):
    try:
        with checks.watching("copy", (x, out)):
            copy[(1,)](x, out, n, shift, BLOCK=16, HINT=hint)
    except checks.Fault as fault:
        return str(fault)
    return None

x, out = torch.arange(64.0), torch.zeros(16)
before = found(x[:32], out, 16, 24, False)
checks.install()
print(json.dumps([before is None and torch.equal(out, torch.arange(24.0, 40.0)),
       found(x[:32], out, 16, 24, False), found(x[:32], out, 8, 24, False), found(x, out[:15], 16, 0, False),
       found(x, out, 16, 1, True), found(x, out, 16, 4, True), found(x, out, 0, 1, True),
       found(x[::2], out, 15, 0, False)]))
grid = torch.linspace(-20, 20, 4096)
exact, close = torch.zeros(4096), torch.zeros(4096)
powers[(1,)](grid, exact, BLOCK=4096)
approximate.install()
powers[(1,)](grid, close, BLOCK=4096)
print(((close - exact).abs() / exact).max().item())
"""


def test_accesses_and_hints_are_checked(tmp_path):
    """Only an access out of bounds in an unmasked lane, and an access that uses a false hint, are faults."""
    code = KERNELS.format(support=str(SUPPORT))
    script = tmp_path / "kernels.py"  # Triton reads the source of a kernel from its file
    script.write_text(code, encoding="utf-8")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    answers, error = done.stdout.strip().splitlines()
    copied, beyond, masked, beyond_out, false_hint, true_hint, nothing_read, strided = json.loads(answers)
    assert copied
    assert beyond == "copy: a load of 4 bytes outside all arguments in 8 of 16 lanes"
    assert beyond_out == "copy: a store of 4 bytes outside all arguments in 1 of 16 lanes"
    assert re.fullmatch(r"copy: a load relies on a false multiple_of\(16\): the value is \d+", false_hint)
    assert masked is true_hint is nothing_read is strided is None
    assert 1e-8 < float(error) < 2.0**-21


def test_the_counts_of_pytest_are_read():
    line = "= 2 failed, 31 passed, 4 skipped, 1 xfailed, 12 warnings, 1 error in 5.93s ="
    assert rehearsal.counts(line) == (31, 3, 5)
    assert rehearsal.counts("") == (0, 0, 0)


def test_every_named_file_of_tests_exists_and_stages_are_checked():
    files = {argument for stage in rehearsal.STAGES for command in stage.commands for argument in command}
    named = [ROOT / argument for argument in files if argument.startswith("tests/")]
    assert len(named) > 30 and all(path.is_file() for path in named)
    env = os.environ | {"PYTHONPATH": str(SUPPORT)}
    for words, said in (
        ("sleep", "got sleep; allowed: ops, selfcheck"),
        ("--python", "expected a script"),
        ("--every 0", "got 0"),
        ("ops -- x.py", "which only a run of stages reads"),
        ("--short -- x.py", "which only a run of stages reads"),
        ("--short examples", "got examples; allowed: ops, selfcheck"),
        ("--every 2 -- x.py", "which only a run of stages reads"),
    ):
        command = [sys.executable, "-m", "rehearsal", *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 2 and said in done.stderr, words


@pytest.fixture
def env():
    """Environment variables of `python -m rehearsal`. Skips unless torch is built with CUDA and there is no GPU.

    `make rehearse` creates such an environment.
    """
    if (reason := build.cannot(PYTHON)) is not None:
        pytest.skip(reason)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return env | {"PYTHONPATH": str(SUPPORT)}


def test_a_device_can_be_hidden(env):
    """An empty CUDA_VISIBLE_DEVICES hides it, as tests of several ranks do where there are too few GPUs."""
    code = """import os, subprocess, sys
from rehearsal import build
build.LIBRARY.is_file() or build.build()
for more in ({}, {"CUDA_VISIBLE_DEVICES": ""}):
    seen = "import torch; print(torch.cuda.device_count(), torch.cuda.is_available(), torch.ones(2).sum().item())"
    subprocess.run([sys.executable, "-c", seen], env=build.environment() | more, check=True)
"""
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.splitlines() == ["1 True 2.0", "0 False 2.0"], done.stderr


def test_the_short_form_passes(env):
    done = subprocess.run([PYTHON, "-m", "rehearsal", "--short"], capture_output=True, text=True, env=env, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
