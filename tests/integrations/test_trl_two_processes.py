"""TRL's trainers on two processes with gloo and DDP, started by torchrun and by accelerate."""

import os
import subprocess
import sys

import pytest
from repository import ROOT, SUPPORT

TRAINERS = ("dpo", "sft", "grpo", "cpo", "orpo", "tpo", "online_dpo", "padding_free")
ADAPTED = ("dpo_lora", "cpo_lora", "padding_free_lora")
# With --cpu accelerate starts several processes only through MPI. Its other launcher works on any device.
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --main_process_port 0"
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    "accelerate": f"{ACCELERATE} --mixed_precision no --dynamo_backend no",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_processes(launcher, tmp_path):
    paths = [ROOT, SUPPORT, ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    command = [sys.executable, "-m", *launcher.split(), SUPPORT / "run_two_processes.py", tmp_path]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    equal = {line for line in done.stdout.splitlines() if "equal on rank" in line}
    assert equal == {f"{name} equal on rank {rank}" for name in TRAINERS + ADAPTED for rank in (0, 1)}
