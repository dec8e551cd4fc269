"""The trainers on several processes, each with its own rows: run by torchrun, see test_integrations_trl_launch.py."""

import sys
from pathlib import Path

from accelerate import PartialState
from test_integrations_trl_runs import cpo, dpo, grpo, lora, online_dpo, orpo, sft, tpo
from torch import distributed
from trl_tiny import assert_equal_training

ranks = PartialState(cpu=True, backend="gloo")
assert ranks.num_processes == distributed.get_world_size() == 2

CASES = [(trainer, {}) for trainer in (dpo, sft, grpo, cpo, orpo, tpo, online_dpo)]
CASES += [(trainer, dict(peft_config=lora(), learning_rate=0.5)) for trainer in (dpo, cpo)]
for number, (trainer, args) in enumerate(CASES):
    make = trainer(Path(sys.argv[1]) / str(number), ddp_backend="gloo", **args)
    ranks.wait_for_everyone()  # the first has written the reference model
    patched = assert_equal_training(make)[1]
    for name, weight in patched.weights.items():
        first = weight.clone()
        distributed.broadcast(first, 0)
        assert first.equal(weight), f"{trainer.__name__}, {name}: the processes' weights differ"
print("equal on rank", ranks.process_index)
ranks.wait_for_everyone()
ranks.destroy_process_group()
