"""TRL's DPOTrainer with our head, under the accelerate configurations in examples/accelerate/."""

import json
import os
import subprocess
import sys

import example_runs
import pytest
import torch
import yaml
from numerics import RUNS, assert_error
from repository import ROOT, SUPPORT

CONFIGS = ROOT / "examples" / "accelerate"
USED = {
    "ddp": dict(ddp=True, fsdp2=False, zero=None),
    "fsdp2": dict(ddp=False, fsdp2=True, zero=None),
    "zero2": dict(ddp=False, fsdp2=False, zero=2),
    "zero3": dict(ddp=False, fsdp2=False, zero=3),
}


def launched(engine: str, config: str, folder) -> dict[str, list[dict]]:
    """The logs of each run of run_accelerate_engines.py and the engine it used, by the name of the run."""
    paths = [ROOT, SUPPORT, ROOT / "benchmarks", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))), "OMP_NUM_THREADS": "1"}
    env |= {"USE_LIBUV": "0", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
    data = example_runs.small_data(folder, uneven=True)[1]
    command = [sys.executable, *launch, str(SUPPORT / "run_accelerate_engines.py"), engine, str(folder / engine), data]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    runs: dict[str, list[dict]] = {}
    for line in done.stdout.splitlines():
        if line.startswith('{"run"'):
            run = json.loads(line)
            runs.setdefault(run["run"], []).append(run)
    return runs


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """The stock trainer in float64, also on two ranks, so that batches are the same."""
    return launched("truth", "ddp", tmp_path_factory.mktemp("truth"))["truth"][0]["log"]


def metrics(log: list[dict]) -> dict[str, torch.Tensor]:
    """The logged values that are computed from the model, by name."""
    left_out = ("epoch", "step", "num_tokens", "learning_rate")
    return {k: torch.tensor([row[k] for row in log], dtype=torch.float64) for k in log[0] if k not in left_out}


@pytest.mark.slow
@pytest.mark.parametrize("engine", USED)
def test_dpo_under_a_shipped_configuration(engine, truth, tmp_path):
    """Losses, log-probs and gradient norms of three steps are within `assert_error`'s bound from TRL's own head."""
    if engine.startswith("zero"):
        pytest.importorskip(
            "deepspeed", reason="needs DeepSpeed: pip install deepspeed, ninja and a C++ compiler on a CPU"
        )
    runs = launched(engine, engine, tmp_path)
    assert {name: len(made) for name, made in runs.items()} == {"stock": RUNS, "ours": 1}
    exact, ours, stock = metrics(truth), metrics(runs["ours"][0]["log"]), [metrics(run["log"]) for run in runs["stock"]]
    assert "grad_norm" in exact and exact["rewards/margins"][-1].abs() > 1e-3
    rounding = torch.finfo(torch.float32).eps * max(value.abs().max() for value in exact.values())
    for name, value in exact.items():
        error, *theirs = ((run[name] - value).abs().max().item() for run in (ours, *stock))
        assert_error(name, error, theirs, rounding)
    for name, (run, *_) in runs.items():  # under ZeRO-3 our patch uses TRL's head
        assert run["used"] == USED[engine] | {"ranks": 2, "by TRL": name == "stock" or engine == "zero3"}


@pytest.mark.parametrize("name", USED)
def test_accelerate_knows_every_key_of_a_configuration(name, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = CONFIGS / f"{name}.yaml"
    written = yaml.safe_load(path.read_text())
    read = load_config_from_file(str(path))  # raises for an unknown key
    nested = {key: value for key in ("fsdp_config", "deepspeed_config") for key, value in written.pop(key, {}).items()}
    assert {key: getattr(read, key) for key in written} == written
    assert read.fsdp_config | read.deepspeed_config == nested
    flags = vars(launch_command_parser().parse_args(["script.py"]))
    assert nested.keys() <= flags.keys(), "accelerate launch would leave these out"
    assert (CONFIGS / f"{name}.yaml").read_text().count(f"{name}.yaml --num_processes") == 1
