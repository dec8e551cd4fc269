"""No [N, V] tensor under the patch: the most rows of a tensor [..., V] in a step of every trainer."""

import types

import pytest
import torch
from numerics import assert_error, assert_with_runs
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_trl import model, nudged, plain_head
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl_trainers import a2po, cpo, dpo, grpo, kto, lora, online_dpo, orpo, rloo, sft, tpo

from fused_po import Schedule
from fused_po.integrations.trl import patched
from fused_po.integrations.trl.experimental import scoring_base

WIDE = 336  # differs from every other dimension; full vectors, so that a tile's rows have no padding
ROWS = 4  # rows of a tile


class Tallest(TorchDispatchMode):
    """Records the most rows of a tensor [..., WIDE], inside custom operators too, without views (of the head)."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = OPDEFS.get(func._schema.name)
        if inside is not None:
            with self:
                return inside._init_fn(*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for value in tree_leaves(out):
            wide = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[-1] == WIDE
            if wide and value.untyped_storage().data_ptr() not in given:
                self.rows = max(self.rows, value.numel() // WIDE)
        return out


def tallest(trainer) -> int:
    with Tallest() as seen:
        trainer.train()
    return seen.rows


LIKE = {"like": {"vocab_size": WIDE}, "max_steps": 1}
TRAINERS = [dpo, kto, sft, grpo, rloo, cpo, orpo, tpo, online_dpo, a2po]


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda f: f.__name__)
def test_no_logits(trainer, tmp_path):
    """No tensor has more rows than a tile. The stock trainer shows that the probe sees full logits."""
    make = trainer(tmp_path, **LIKE)
    with plain_head():
        assert tallest(make(torch.float32)) > 3 * ROWS
    schedule = Schedule(logits_budget=0, tile_bytes=ROWS * 4 * WIDE)
    with patched(schedule):
        assert 0 < tallest(make(torch.float32)) <= ROWS


@pytest.mark.parametrize("trainer", [dpo, cpo], ids=lambda f: f.__name__)
def test_no_logits_with_lora(trainer, tmp_path):
    make = trainer(tmp_path, peft_config=lora(), **LIKE)
    with patched(Schedule(logits_budget=0, tile_bytes=ROWS * 4 * WIDE)):
        assert 0 < tallest(make(torch.float32)) <= ROWS


@pytest.mark.parametrize("trainer", [dpo, cpo, orpo, tpo], ids=lambda f: f.__name__)
def test_evaluation(trainer, tmp_path):
    """`evaluate` gives the same losses and metrics without logits."""
    make = trainer(tmp_path, **LIKE)

    def evaluated(made) -> dict[str, float]:
        found = made.evaluate(made.train_dataset)
        return {name: value for name, value in found.items() if not name.endswith(("runtime", "per_second"))}

    with plain_head():
        truth = evaluated(make(torch.float64))
    made = make(torch.float32)
    with patched(Schedule(tile_bytes=ROWS * 4 * WIDE)), Tallest() as seen:
        ours = evaluated(made)
    assert 0 < seen.rows <= ROWS
    rounding = torch.finfo(torch.float32).eps * max(abs(v) for n, v in truth.items() if "logps" in n)

    def check(stock: list[dict]) -> None:
        assert ours.keys() == stock[0].keys() == truth.keys()
        for name, value in truth.items():
            assert_error(name, abs(ours[name] - value), [abs(run[name] - value) for run in stock], rounding)

    assert_with_runs(lambda seed: evaluated(nudged(make, seed)), check)


def test_evaluation_with_metrics_gets_logits(tmp_path):
    """TPO's evaluation with the user's metrics needs all logits, which TRL's code computes."""
    made = tpo(tmp_path, **LIKE)(torch.float32)
    inputs = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    with patched():
        loss, outputs = made.compute_loss(made.model, inputs, return_outputs=True)
        assert outputs.logits.shape == (*inputs["input_ids"].shape, WIDE)
        assert loss.item() == pytest.approx(made.compute_loss(made.model, inputs).item(), rel=1e-6)
    assert "forward" not in vars(made.model)  # nothing is left on the model


def test_an_adapter_on_the_head_is_trained(tmp_path):
    """CPO with LoRA on `lm_head` keeps TRL's logits and warns; the adapter is trained."""
    config = lora()
    config.target_modules = {"q_proj", "lm_head"}
    made = cpo(tmp_path, peft_config=config, max_steps=2)(torch.float32)
    with patched(), pytest.warns(UserWarning, match="CPOTrainer uses TRL's own logits: its LM head is Linear"):
        made.train()
    learnt = {n: p for n, p in made.model.named_parameters() if "lm_head.lora_B" in n}
    assert learnt and all(p.any() for p in learnt.values())


# Cases that keep TRL's logits.


def adapted(config):
    return get_peft_model(model(), config)


def quantised():
    made = model()
    made.lm_head = type("Linear4bit", (torch.nn.Linear,), {})(16, WIDE, bias=False)
    return made


KEPT = {
    "LoRA on the head": (lambda: adapted(LoraConfig(target_modules=["lm_head"])), "LM head is Linear, not a plain"),
    "prompt learning": (
        lambda: adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "prompt learning",
    ),
    "quantised": (quantised, "Linear4bit"),
    "no head": (lambda: torch.nn.Linear(2, 2), "NoneType"),
}


@pytest.mark.parametrize("make, said", KEPT.values(), ids=KEPT)
def test_models_that_keep_trls_logits(make, said):
    trainer = types.SimpleNamespace(accelerator=types.SimpleNamespace(unwrap_model=lambda m: m))
    base, reason = scoring_base(trainer, make())
    assert base is None and said in reason
    trainer.is_encoder_decoder = True
    assert scoring_base(trainer, model()) == (None, "the model is an encoder-decoder")
