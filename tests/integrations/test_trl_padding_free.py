"""DPO without padding against TRL's padded DPO: losses, metrics, gradients, weights, batches, refusals."""

import random
import types
import uuid

import datasets
import pytest
import torch
import transformers
import trl
from numerics import RUNS
from peft import PromptTuningConfig, get_peft_model
from repository import ROOT, python
from tiny_trl import (
    ARGS,
    SPECIAL,
    STEPS,
    WORDS,
    Run,
    V,
    assert_equal_runs,
    assert_equal_training,
    model,
    plain_head,
    tokenizer,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from trl.trainer import utils
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_trainers import lora

from fused_po.integrations import packing
from fused_po.integrations.trl import PaddingFreeDPOTrainer, patched
from fused_po.integrations.trl.padding_free import base_of, check_arguments, end_to_end


def uneven_pairs(count: int = 20) -> datasets.Dataset:
    """Preferences of very different lengths, so that most of a padded batch is padding."""
    draw = random.Random(0)
    text = lambda most: " ".join(draw.choice(WORDS) for _ in range(draw.choice([1, 2, most])))  # noqa: E731
    made = datasets.Dataset.from_list(
        [{"prompt": text(20), "chosen": " " + text(40), "rejected": " " + text(9)} for _ in range(count)]
    )
    # TRL caches reference log-probs by this name, and would give them to the next trainer
    made._fingerprint = uuid.uuid4().hex
    return made


def dpo(tmp_path, *, trainer=PaddingFreeDPOTrainer, policy=model, reference=model, collator=None, **args):
    """make(dtype), which builds a fresh trainer. `policy` and `reference` build models from a seed."""
    peft = {"peft_config": args.pop("peft_config")} if "peft_config" in args else {}

    def make(dtype=torch.float32):
        given = dict(model=policy(1).to(dtype), processing_class=tokenizer(), data_collator=collator, **peft)
        if reference is not None:
            given["ref_model"] = reference(2).to(dtype)
        config = trl.DPOConfig(output_dir=str(tmp_path), **ARGS | args)
        made = trainer(args=config, train_dataset=uneven_pairs(), **given)
        made.model.to(dtype)  # including its adapters
        return made

    return make


OPTIONS = {
    "sigmoid": {},
    "eager": {"policy": lambda seed: model(seed, attn_implementation="eager")},
    "every output": {
        "loss_type": ["ipo", "sigmoid"],
        "loss_weights": [0.7, 0.4],
        "use_weighting": True,
        "ld_alpha": 0.5,
    },
    "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_length": 24},
    "lora": {"peft_config": lora(), "learning_rate": 0.5, "reference": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_five_steps(options, tmp_path):
    """Compared with TRL's padded trainer."""
    ours = assert_equal_training(dpo(tmp_path, trainer=trl.DPOTrainer, **options), dpo(tmp_path, **options))
    assert ours.metrics["rewards/margins"].abs().max() > 0


class Seen:
    """Records the shape of every batch that a model's decoder runs, and whether it had a mask."""

    def __init__(self) -> None:
        self.shapes, self.masked = [], False

    def model(self, seed: int):
        made = model(seed)
        made.model.register_forward_pre_hook(self, with_kwargs=True)
        return made

    def __call__(self, decoder, args, kwargs) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        self.masked |= kwargs.get("attention_mask") is not None


ROW = (1, sum(packing.LENGTHS))
PROBE = [ROW, *((1, n) for n in packing.LENGTHS), ROW, ROW, ROW]  # whether sequences are kept apart


def batches(trainer) -> list[tuple[int, int]]:
    """(tokens, padded tokens) of each batch; the list fills as the trainer computes losses."""
    counts, compute = [], trainer._compute_loss

    def count(model, inputs, return_outputs):
        counts.append((int(inputs["attention_mask"].sum()), inputs["attention_mask"].numel()))
        return compute(model, inputs, return_outputs)

    trainer._compute_loss = count
    return counts


COMPILED = dict(torch_compile=True, torch_compile_backend="eager")


@pytest.mark.parametrize("options", [{}, pytest.param(COMPILED, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_only_real_tokens_are_run(options, tmp_path):
    """Policy and reference run one row of the real tokens, in training and in evaluation."""
    policy, reference = Seen(), Seen()
    with patched():
        trainer = dpo(tmp_path, policy=policy.model, reference=reference.model, **options)()
        counts = batches(trainer)
        trainer.train()
        trainer.evaluate(uneven_pairs(4))
    assert len(counts) == STEPS + 1 and all(tokens < 0.8 * padded for tokens, padded in counts)
    for seen in (policy, reference):
        assert seen.shapes == PROBE + [(1, tokens) for tokens, _ in counts] and not seen.masked


def test_precomputed_reference(tmp_path):
    """TRL's own method computes the reference log-probs with our forward."""
    options, seen = dict(reference=None, precompute_ref_log_probs=True), Seen()
    stock = dpo(tmp_path, trainer=trl.DPOTrainer, **options)
    assert_equal_training(stock, dpo(tmp_path, policy=seen.model, **options))
    assert seen.shapes[: len(PROBE)] == PROBE and not seen.masked
    assert len(seen.shapes) == len(PROBE) + 10 + STEPS and all(rows == 1 for rows, _ in seen.shapes)


def test_compute_metrics_has_logits(tmp_path):
    """compute_metrics gets padded logits from a separate forward, as in TRL."""
    given = []
    for trainer in (trl.DPOTrainer, PaddingFreeDPOTrainer):
        with patched():
            made = dpo(tmp_path, trainer=trainer)()
            made.compute_metrics = lambda found: given.append(torch.tensor(found.predictions)) or {}
            made.evaluate(uneven_pairs(2))
    assert given[0].shape[-1] == V and torch.equal(*given)


def test_models_are_unchanged_between_steps(tmp_path):
    """Between steps, and after an error, models have their own forward, so copies and checkpoints are unaffected."""
    with patched():
        trainer = dpo(tmp_path)()
        before = trainer.model.forward, trainer.ref_model.forward
        trainer.train()
        assert (trainer.model.forward, trainer.ref_model.forward) == before
        with pytest.raises(KeyError), trainer._without_padding():
            assert trainer.model.forward is not before[0] and trainer.ref_model.forward is not before[1]
            trainer.model(labels=None, fused_lm_head=True)
        assert (trainer.model.forward, trainer.ref_model.forward) == before


# The forward alone.

FAMILIES = {
    "Llama": {},
    "Gemma3": dict(
        head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=3.0
    ),  # one layer with a window, one without
    "GPT2": dict(n_embd=16, n_head=2, n_layer=2),
    "Qwen3Moe": dict(
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        output_router_logits=True,
        experts_implementation="eager",
    ),
}


def causal_lm(family: str, dtype: torch.dtype = torch.float32, **config):
    """A tiny model with TRL's head."""
    shape = dict(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")(**shape | config)
    torch.manual_seed(4)
    made = transformers.AutoModelForCausalLM.from_config(config)
    utils.add_fused_lm_head(made, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    return made.eval().to(dtype)


def statistics(family: str, batch: dict, dtype: torch.dtype = torch.float32, around=lambda base, forward: forward):
    """(statistics, gradients) by name, for a loss that weights log-probs and entropies unevenly."""
    made = causal_lm(family, dtype, **FAMILIES[family])
    out = around(made, made.forward)(**batch, fused_lm_head=True)
    weigh = torch.linspace(0.5, 1.5, out.log_probs.numel(), dtype=dtype).view_as(out.log_probs)
    total = ((out.log_probs + 0.3 * out.entropy) * weigh).sum() + (out.aux_loss or 0) + out.loss
    parts = dict(made.named_parameters())
    grads = torch.autograd.grad(total, list(parts.values()), allow_unused=True)
    return dict(out), {name: g for name, g in zip(parts, grads) if g is not None}


def full_batch(side: str) -> dict[str, torch.Tensor]:
    """Sequences of several lengths, all tokens labelled, padded on one side."""
    mask = torch.arange(12) < torch.tensor([5, 1, 12, 7, 2])[:, None]
    mask = mask if side == "right" else mask.flip(1)
    ids = torch.randint(len(SPECIAL), V, mask.shape) * mask
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]  # otherwise the padded run scores a first token from padding
    labels = ids.masked_fill(~(mask if side == "right" else mask & before), -100)
    return dict(input_ids=ids, attention_mask=mask.long(), labels=labels)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward(family, side, seed):
    """All statistics and gradients. No first token is scored from the previous sequence."""
    if (family, side) == ("GPT2", "left"):
        pytest.skip("GPT-2 has learned positions, which start at 0 in TRL's batches")
    draws = []
    for batch in [full_batch(side) for _ in range(RUNS)]:
        stock = statistics(family, batch)
        with patched():
            ours = statistics(family, batch, around=end_to_end)
        with plain_head():
            draws.append((stock, ours, statistics(family, batch, torch.float64)))
        scored = (batch["labels"] != -100)[:, 1:]
        for name in ("is_top1", "label_mask"):
            _, one, other = (run[0].pop(name).bool() & scored for run in draws[-1])
            assert torch.equal(one, other)

    def run(found) -> Run:
        values, gradients = ({name: value.detach().double() for name, value in part.items()} for part in found)
        return Run(values, gradients, {})

    draws = [tuple(map(run, draw)) for draw in draws]
    for _, ours, truth in draws:
        assert_equal_runs([(stock, exact) for stock, _, exact in draws], ours, truth)


# Refusals.

MAMBA = dict(mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, head_dim=8)
MIXING = {
    "state space": lambda: causal_lm("FalconH1", **MAMBA),
    "positions by count": lambda: causal_lm("OPT", ffn_dim=24, word_embed_proj_dim=16),
    "no positions": lambda: causal_lm("Bloom", n_layer=2, n_head=2, attn_implementation="eager"),
    "attention": lambda: causal_lm("Llama", attn_implementation="unmasked"),
}


@pytest.mark.parametrize("made", MIXING.values(), ids=MIXING)
def test_models_that_mix_sequences(made):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = lambda *args, **kwargs: None  # noqa: E731
    AttentionInterface.register("unmasked", sdpa_attention_forward)
    AttentionMaskInterface.register("unmasked", causal)
    mixing = made().train()
    row = torch.ones(2, 3, dtype=torch.long)
    message = rf"{type(mixing).__name__} with attn_implementation=.* one row by position_ids; .*trl\.DPOTrainer"
    with patched(), pytest.raises(ValueError, match=message):
        end_to_end(mixing, mixing.forward)(input_ids=row, attention_mask=row, labels=row, fused_lm_head=True)
    assert all(module.training for module in mixing.modules())


def test_configurations(tmp_path):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    t5 = lambda: transformers.T5ForConditionalGeneration(  # noqa: E731
        transformers.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )
    text = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    llava = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text)
    )
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration, an encoder-decoder.*trl\.DPOTrainer"):
        base_of(t5())
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration, a multimodal model.*trl\.DPOTrainer"):
        base_of(transformers.LlavaForConditionalGeneration(llava))
    with pytest.raises(ValueError, match=r"peft_config: prompt learning .*use LoRA"):
        base_of(get_peft_model(model(), prompt))
    with patched():
        with pytest.raises(ValueError, match="peft_config: prompt learning"):
            dpo(tmp_path, peft_config=prompt, reference=None)()
        with pytest.raises(ValueError, match=r"pad_to_multiple_of: got 8.*leave it None"):
            dpo(tmp_path, pad_to_multiple_of=8)()
        for name in ("cp_size", "sp_size"):
            with pytest.raises(ValueError, match=f"{name}: got 2, which shards the padded batch"):
                args = trl.DPOConfig(output_dir=str(tmp_path), **ARGS)
                args.parallelism_config = types.SimpleNamespace(**{name: 2})
                check_arguments(args)


def test_a_batch_of_more_than_tokens(tmp_path):
    pad = DataCollatorForPreference(pad_token_id=0)

    def collator(examples):
        batch = pad(examples)
        return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}

    with (
        patched(),
        pytest.raises(ValueError, match=r"data_collator: its batches have token_type_ids, expected only input_ids"),
    ):
        dpo(tmp_path, collator=collator)().train()


def test_without_a_patch(tmp_path):
    with pytest.raises(RuntimeError, match=r"PaddingFreeDPOTrainer: .*call fused_po\.integrations\.trl\.patch\(\)"):
        PaddingFreeDPOTrainer("it is not even looked for")
    with patched():
        trainer = dpo(tmp_path)()
    with pytest.raises(RuntimeError, match=r"inside `with patched\(\):`"):
        trainer.train()


COLD = """
import sys
import fused_po.integrations.trl as ours
print("trl" in sys.modules, hasattr(ours, "nothing"))
print(ours.PaddingFreeDPOTrainer.__module__, "trl" in sys.modules)
"""


def test_the_class_is_imported_late(tmp_path):
    here = {"PYTHONPATH": str(ROOT)}
    assert python(COLD, tmp_path, here).split() == ["False", "False", "fused_po.integrations.trl.padding_free", "True"]
    code = "import sys; sys.modules['trl'] = None\ntry: from fused_po.integrations.trl import PaddingFreeDPOTrainer\n"
    code += "except ModuleNotFoundError as error: print(error)"
    assert "pip install 'trl>=1.15,<1.17'" in python(code, tmp_path, here)
