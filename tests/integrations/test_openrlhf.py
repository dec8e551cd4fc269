"""fused_po.integrations.openrlhf in the installed OpenRLHF: `make integrations`.

The package openrlhf.models imports flash-attn, which needs CUDA. Its modules utils and loss do not; without flash-attn
they are imported without the package.
"""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from fused_po import modules
from fused_po.integrations import openrlhf as fused

found = importlib.util.find_spec("openrlhf")
if found is None:
    pytest.skip("OpenRLHF is not installed", allow_module_level=True)
if importlib.util.find_spec("flash_attn") is None:
    models = types.ModuleType("openrlhf.models")
    models.__path__ = [str(Path(found.origin).parent / "models")]
    sys.modules["openrlhf.models"] = models

from openrlhf.models import loss, utils  # noqa: E402

B, T, V = 4, 6, 31


@pytest.fixture
def installed():
    theirs = {name: getattr(loss, name) for name in fused.LOSSES}
    fused.install()
    yield theirs
    fused.uninstall()


def test_install_and_uninstall():
    theirs = utils.log_probs_from_logits, loss.PolicyLoss
    fused.install()
    fused.install()
    assert (utils.log_probs_from_logits, loss.PolicyLoss) == (fused.log_probs_from_logits, fused.PolicyLoss)
    assert utils.compute_approx_kl is fused.compute_approx_kl
    fused.uninstall()
    assert (utils.log_probs_from_logits, loss.PolicyLoss) == theirs
    fused.uninstall()


@pytest.mark.parametrize("temperature", (1.0, 0.6))
def test_log_probs_from_logits(temperature, seed):
    leaf, labels = torch.randn(B, T, V, requires_grad=True), torch.randint(0, V, (B, T))
    results = []
    for function in (fused.log_probs_from_logits, utils.log_probs_from_logits):
        logits = leaf * 1
        value = function(logits, labels, temperature)
        results.append((value, torch.autograd.grad(value.square().sum(), leaf)[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("unbiased", (False, True))
@pytest.mark.parametrize("kind", ("k1", "k2", "k3"))
@pytest.mark.parametrize("scale", (0.3, 8.0))
def test_compute_approx_kl(kind, unbiased, scale, seed):
    logps = (-torch.rand(B, T)).requires_grad_()
    base, old = logps.detach() + scale * torch.randn(B, T), logps.detach() + scale * torch.randn(B, T)
    results = []
    for function in (fused.compute_approx_kl, utils.compute_approx_kl):
        value = function(logps, base, old, kind, unbiased)
        results.append((value, torch.autograd.grad((value * torch.linspace(0, 1, T)).sum(), logps)[0]))
    torch.testing.assert_close(*results)


MASK = torch.arange(T) < torch.tensor([[6], [3], [5], [1]])
POLICY = [
    {},
    {"token_level_loss": False},
    {"dual_clip": 1.5},
    {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "is_correction_level": "seq"},
    {"is_correction_level": "token", "is_correction_threshold": (0.9, 1.2)},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.9, 1.2)},
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.2)},
    {"is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": (-1.0, 0.01)},
    {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (-1.0, 0.1)},
]


@pytest.mark.parametrize("counts", ({}, {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 9.0}))
@pytest.mark.parametrize("how", POLICY, ids=lambda how: "-".join(map(str, how.values())) or "ppo")
def test_policy_loss(how, counts, installed, seed):
    logps = (-torch.rand(B, T) - 0.05).requires_grad_()
    old, rollout = (logps.detach() * (0.2 * torch.randn(B, T)).exp() for _ in range(2))
    args = logps, old, torch.randn(B, T), MASK.float(), rollout
    ours, theirs = (cls(**how)(*args, **counts) for cls in (loss.PolicyLoss, installed["PolicyLoss"]))
    assert issubclass(loss.PolicyLoss, modules.PolicyLoss) and len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other)
    torch.testing.assert_close(*(torch.autograd.grad(v[0], logps)[0] for v in (ours, theirs)))


def test_the_other_losses(installed, seed):
    tokens, rewards, logits = torch.randn(3, B, T), torch.randn(2, B), torch.randn(B, T, V)
    labels = torch.randint(0, V, (B, T)).masked_fill(~MASK, -100)
    calls = {
        "ValueLoss": ({"clip_eps": 0.2}, (*tokens, MASK.float())),
        "SFTLoss": ({}, (tokens[0], MASK.float())),
        "GPTLMLoss": ({}, (logits, labels)),
        "PairWiseLoss": ({}, (*rewards, torch.rand(B))),
        "LogExpLoss": ({}, tuple(rewards)),
        "DPOLoss": ({"beta": 0.3, "label_smoothing": 0.1}, (*rewards, *rewards)),
    }
    for name, (how, args) in calls.items():
        ours, theirs = getattr(loss, name)(**how)(*args), installed[name](**how)(*args)
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")
