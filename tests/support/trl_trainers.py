"""TRL's trainers on a tiny model: each function returns `make(dtype)`, which builds a fresh trainer."""

from peft import LoraConfig
from tiny_trl import ARGS, model, reward, rows, say, tokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.a2po import A2POConfig, A2POTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from fused_po.integrations.trl import PaddingFreeDPOTrainer


def maker(tmp_path, trainer, config, fields, *, sampled=False, reference=False, like=None, **args):
    """make(dtype), which builds a fresh trainer. like: the model's configuration; sampled: the trainer samples.

    reference: whether the trainer is given a reference model; otherwise it loads one from the path if it needs one.
    """
    model(2, **(like or {})).save_pretrained(tmp_path / "reference")
    peft = {"peft_config": args.pop("peft_config")} if "peft_config" in args else {}

    def make(dtype):
        policy = model(1, **(like or {})).to(dtype)
        policy.config._name_or_path = str(tmp_path / "reference")
        given = dict(model=policy, args=config(output_dir=str(tmp_path), **ARGS | args), **peft)
        if reference:
            given["ref_model"] = model(2, **(like or {})).to(dtype)
        if sampled:
            say(policy)
            given["reward_funcs"] = reward
        data = rows(*fields)
        if config is KTOConfig:
            data = data.add_column("label", [i % 3 != 1 for i in range(len(data))])
        made = trainer(train_dataset=data, processing_class=tokenizer(), **given)
        made.model.to(dtype)  # including its adapters
        return made

    return make


PAIRS = ("prompt", "chosen", "rejected")


def dpo(tmp_path, **args):
    return maker(tmp_path, DPOTrainer, DPOConfig, PAIRS, reference="peft_config" not in args, **args)


def padding_free(tmp_path, **args):
    return maker(tmp_path, PaddingFreeDPOTrainer, DPOConfig, PAIRS, reference="peft_config" not in args, **args)


def kto(tmp_path, **args):
    args = {"per_device_train_batch_size": 4} | args
    return maker(tmp_path, KTOTrainer, KTOConfig, ("prompt", "completion"), reference=True, **args)


def sft(tmp_path, **args):
    return maker(tmp_path, SFTTrainer, SFTConfig, ("prompt", "completion"), **args)


def grpo(tmp_path, trainer=GRPOTrainer, config=GRPOConfig, **args):
    args = dict(num_generations=2, per_device_train_batch_size=4, max_completion_length=6, beta=0.1) | args
    return maker(tmp_path, trainer, config, ("prompt",), sampled=True, **args)


def rloo(tmp_path, **args):
    return grpo(tmp_path, RLOOTrainer, RLOOConfig, **args)


def cpo(tmp_path, **args):
    return maker(tmp_path, CPOTrainer, CPOConfig, PAIRS, **args)


def orpo(tmp_path, **args):
    return maker(tmp_path, ORPOTrainer, ORPOConfig, PAIRS, **args)


def tpo(tmp_path, **args):
    return maker(tmp_path, TPOTrainer, TPOConfig, (*PAIRS, "reference"), **args)


def online_dpo(tmp_path, **args):
    args = dict(max_new_tokens=6, max_length=16) | args
    return maker(tmp_path, OnlineDPOTrainer, OnlineDPOConfig, ("prompt",), sampled=True, reference=True, **args)


def a2po(tmp_path, **args):
    args = dict(num_value_samples=2, max_completion_length=6) | args
    return maker(tmp_path, A2POTrainer, A2POConfig, ("prompt",), sampled=True, **args)


def lora():
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
