"""The trainers under torchrun, on two processes with gloo: DDP's hooks see the head's gradients."""

import os
import subprocess
import sys

import pytest
from test_packaging import ROOT


@pytest.mark.slow
def test_two_processes(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [ROOT, ROOT / "tests", ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    script = ROOT / "tests" / "trl_two_processes.py"
    done = subprocess.run([*launch, script, tmp_path], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert {line for line in done.stdout.splitlines() if "equal on rank" in line} == {
        "equal on rank 0",
        "equal on rank 1",
    }
