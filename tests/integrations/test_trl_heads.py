"""CPO, ORPO, TPO and A2PO on models whose logits TRL's fused head does not reproduce.

TRL's head knows scales and softcaps by a few names. The stock trainers use the model's own logits. The patch measures
the scaling of the head, or leaves the model to TRL.
"""

import warnings

import pytest
import torch
import transformers
import trl_trainers as runs
from tiny_trl import V, model, train
from torch import nn
from torch.nn.utils import prune
from trl_trainers import a2po, cpo, orpo, tpo

from fused_po.integrations.trl import patched

BASE = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
MAMBA = dict(mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4)
MPT = dict(
    vocab_size=V, d_model=16, n_heads=2, n_layers=2, max_seq_len=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
RECURRENT = dict(num_hidden_layers=3, lru_width=16, attention_window_size=16, logits_soft_cap=0.7)
# (family, its settings, whether the patch handles it)
KINDS = {
    "Falcon-H1": ("FalconH1", BASE | MAMBA | dict(lm_head_multiplier=3.0), True),
    "HyperCLOVA X": ("HyperCLOVAX", BASE | dict(logits_scaling=4.0), True),
    "RecurrentGemma": ("RecurrentGemma", BASE | RECURRENT, True),
    "MPT": ("Mpt", MPT | dict(logit_scale=0.25), True),
    "Gemma 2": ("Gemma2", BASE | dict(head_dim=8, final_logit_softcapping=0.7), True),
    "ModernBERT decoder": ("ModernBertDecoder", BASE, False),
}


def made(family, settings, seed=1):
    torch.manual_seed(seed)
    built = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    with torch.no_grad():
        built.get_output_embeddings().weight.normal_(std=0.4)
    return built


def trainer_of(make, kind, monkeypatch, tmp_path, **args):
    family, settings, _ = KINDS[kind]
    monkeypatch.setattr(runs, "model", lambda seed=1, **config: made(family, settings, seed))
    return make(tmp_path, **args)


def assert_same_training(make):
    """Metrics, gradients and weights of a stock and a patched run agree up to rounding; a wrong head is far off."""
    stock = train(make(torch.float32))
    with patched():
        ours = train(make(torch.float32))
    for kind, a, b in zip(stock._fields, stock, ours):
        assert a.keys() == b.keys()
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()) + 1e-5, msg=kind)


def warned(seen):
    return [str(w.message) for w in seen if "uses TRL's own logits" in str(w.message)]


@pytest.mark.parametrize("kind", KINDS)
def test_cpo(kind, monkeypatch, tmp_path):
    """Losses, metrics, gradients and weights equal those of the stock trainer, which uses the model's logits."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert_same_training(trainer_of(cpo, kind, monkeypatch, tmp_path))
    assert bool(warned(seen)) != KINDS[kind][2], warned(seen)


@pytest.mark.parametrize("make", (orpo, tpo, a2po), ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ("RecurrentGemma", "ModernBERT decoder"))
def test_other_trainers(make, kind, monkeypatch, tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert_same_training(trainer_of(make, kind, monkeypatch, tmp_path))
    assert bool(warned(seen)) != KINDS[kind][2], warned(seen)


class Strange(transformers.LlamaForCausalLM):
    """A model whose logits are neither scaled nor capped logits of the head."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 1, V, dtype=out.logits.dtype)
        return out


def masked(module, args, out):
    return out * torch.linspace(0.5, 1, V, dtype=out.dtype)


CHANGES = {
    "its class": lambda m: setattr(m, "__class__", Strange),
    "hook": lambda m: m.lm_head.register_forward_hook(masked) and None,
    "pre-hook": lambda m: m.lm_head.register_forward_pre_hook(lambda h, args: (args[0] * 1.5,)) and None,
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m.lm_head) and None,
    "prune": lambda m: prune.l1_unstructured(m.lm_head, "weight", 0.5) and None,
    "forward": lambda m: setattr(m.lm_head, "forward", lambda h: h @ m.lm_head.weight.T.square()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_changes_stays_with_trl(change, monkeypatch, tmp_path):
    def changed(seed=1, **config):
        policy = model(seed, **config)
        if seed == 1:
            CHANGES[change](policy)
        return policy

    monkeypatch.setattr(runs, "model", changed)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert_same_training(cpo(tmp_path))
    assert warned(seen)


def test_a_setting_changed_between_steps(monkeypatch, tmp_path):
    """A softcap that changes at the third batch is measured again."""

    def run():
        make = trainer_of(cpo, "Gemma 2", monkeypatch, tmp_path)
        trainer = make(torch.float32)
        stock, calls = trainer.get_batch_loss_metrics, []

        def changing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                trainer.model.config.final_logit_softcapping = 0.2
            return stock(*args, **kwargs)

        trainer.get_batch_loss_metrics = changing
        return train(trainer)

    stock = run()
    with patched():
        ours = run()
    torch.testing.assert_close(ours.metrics["loss"], stock.metrics["loss"], rtol=1e-4, atol=1e-5)


def test_measured_once(monkeypatch, tmp_path):
    """A training run measures its model only in the first step."""
    from fused_po.integrations import probe

    counts, measure = [], probe.measure
    monkeypatch.setattr(probe, "measure", lambda *args: counts.append(1) or measure(*args))
    with patched():
        train(cpo(tmp_path)(torch.float32))
    assert len(counts) == 1
