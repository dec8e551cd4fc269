"""Run examples/trl_dpo.py on CPUs, started by `accelerate launch --config_file ...`: stock head, ours, float64.

accelerate does not support FSDP or DeepSpeed on CPUs: it ignores FSDP, and under DeepSpeed it treats every rank as the
only one. So this script makes it use a gloo group, and makes FSDP believe that its devices are not CPUs. The rest
follows the configuration.
"""

import contextlib
import json
import sys
import warnings
from pathlib import Path

import example_runs  # noqa: F401  (puts examples/ on the path)
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from numerics import RUNS, nudge
from tiny_trl import plain_head
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from trainer import models  # isort: skip
import trl_dpo  # isort: skip

engine, folder, data = sys.argv[1:]
stock_init = PartialState.__init__


def init(self, cpu=False, **how):
    stock_init(self, cpu=not engine.startswith("zero"), **how | {"backend": "gloo"})
    if engine == "fsdp2":
        self.distributed_type = DistributedType.MULTI_XPU


def nudged(seed: int) -> str:
    """The path of the first run's start model, with weights moved to adjacent numbers."""
    start, path = Path(folder, "start"), Path(folder, f"nudged-{seed}")
    with PartialState().main_process_first():
        if not path.is_dir():
            model = AutoModelForCausalLM.from_pretrained(start)
            nudge(seed, model)
            models.save(path, model, models.load_tokenizer(start))
    return str(path)


PartialState.__init__ = init
words = ["--dataset", data, "--output_dir", folder, "--max_steps", "3", "--per_device_train_batch_size", "2"]
words += ["--disable_tqdm", "true", "--bf16", "false", "--learning_rate", "1e-2", "--optim", "sgd"]
words += [] if engine.startswith("zero") else ["--use_cpu", "--ddp_backend", "gloo"]
if engine == "truth":
    runs = [("truth", 0, ["--stock", "--dtype", "float64"])]
else:
    runs = [*(("stock", seed, ["--stock"]) for seed in range(RUNS)), ("ours", 0, [])]
for name, seed, more in runs:
    more = [*more, "--model", nudged(seed)] if seed else more
    plain = plain_head() if name == "truth" else contextlib.nullcontext()
    with plain, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = trl_dpo.main([*words, *more])
    wrapped = trainer.model_wrapped
    zero = wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else None
    state = PartialState()
    used = {"ranks": state.num_processes, "fsdp2": isinstance(wrapped, FSDPModule), "zero": zero}
    used |= {"ddp": isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)}
    used["by TRL"] = name != "ours" or any("TRL's own kernel computes" in str(warning.message) for warning in said)
    if state.process_index == 0:
        print(json.dumps({"run": name, "log": trainer.state.log_history[:3], "used": used}), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
