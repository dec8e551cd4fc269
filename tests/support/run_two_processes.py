"""Run TRL's trainers on several processes, each with its own rows; test_trl_two_processes.py starts this script."""

import sys
from pathlib import Path

from accelerate import PartialState
from tiny_trl import assert_equal_training
from torch import distributed
from trl_trainers import cpo, dpo, grpo, lora, online_dpo, orpo, padding_free, sft, tpo

ranks = PartialState(cpu=True, backend="gloo")
assert ranks.num_processes == distributed.get_world_size() == 2

ADAPTERS = dict(peft_config=lora(), learning_rate=0.5)
CASES = {trainer.__name__: (trainer, trainer, {}) for trainer in (dpo, sft, grpo, cpo, orpo, tpo, online_dpo)}
CASES |= {f"{trainer.__name__}_lora": (trainer, trainer, ADAPTERS) for trainer in (dpo, cpo)}
CASES |= {"padding_free": (dpo, padding_free, {}), "padding_free_lora": (dpo, padding_free, ADAPTERS)}
for name, (stock, ours, args) in CASES.items():
    stock, ours = (made(Path(sys.argv[1]) / name, ddp_backend="gloo", **args) for made in (stock, ours))
    ranks.wait_for_everyone()  # until the first process has written the reference model
    patched = assert_equal_training(stock, ours)
    for parameter, weight in patched.weights.items():
        first = weight.clone()
        distributed.broadcast(first, 0)
        assert first.equal(weight), f"{name}, {parameter}: the processes' weights differ"
    # one write, since both processes use the same pipe
    print(f"{name} equal on rank {ranks.process_index}\n", end="", flush=True)
ranks.wait_for_everyone()
ranks.destroy_process_group()
