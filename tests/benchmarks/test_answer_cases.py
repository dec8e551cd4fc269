"""The benchmark's GRPO and KTO cases: all providers compute the loss that the exact values are of."""

import math

import cases
import measure
import peers
import providers
import pytest
import torch
from test_providers import NAMED, nll


class LigerLosses:
    """Liger's chunked losses of single answers in plain PyTorch, with its signatures; they return (loss, metrics)."""

    class LigerFusedLinearGRPOLoss:
        def __init__(
            self,
            beta=0.04,
            compiled=True,
            use_ref_model=True,
            chunk_size=1,
            epsilon_low=0.2,
            epsilon_high=0.2,
            loss_type="dapo",
            max_completion_length=None,
        ):
            assert beta == 0 and not use_ref_model and loss_type == "dapo"
            self.range = 1 - epsilon_low, 1 + epsilon_high

        def __call__(
            self,
            _input,
            lin_weight,
            selected_token_ids,
            attention_mask,
            advantages,
            bias=None,
            ref_per_token_logps=None,
            old_per_token_logps=None,
        ):
            assert _input.ndim == 3 and selected_token_ids.min() >= 0 and advantages.shape == _input.shape[:1]
            logps = -nll(_input.flatten(0, 1), lin_weight, selected_token_ids.flatten()).view(attention_mask.shape)
            ratio = (logps - old_per_token_logps).exp()
            both = torch.stack([ratio, ratio.clamp(*self.range)]) * advantages[:, None]
            return -(both.amin(0) * attention_mask).sum() / attention_mask.sum(), ()

    class LigerFusedLinearKTOLoss:
        def __init__(self, ignore_index=-100, beta=0.1, compiled=True, use_ref_model=False, average_log_prob=False):
            assert ignore_index == cases.IGNORE and use_ref_model and not average_log_prob
            self.beta = beta

        def __call__(
            self,
            _input,
            lin_weight,
            target,
            bias=None,
            preference_labels=None,
            ref_input=None,
            ref_weight=None,
            ref_bias=None,
            kl=None,
        ):
            assert preference_labels.dtype == torch.bool and preference_labels.shape == target.shape[:1]

            def sums(hidden, weight):
                return -nll(hidden.flatten(0, 1), weight, target.flatten()).view(target.shape).sum(-1)

            gain = self.beta * (sums(_input, lin_weight) - sums(ref_input, ref_weight).detach() - kl)
            return (1 - torch.sigmoid(torch.where(preference_labels, gain, -gain))).sum() / len(target), ()


@pytest.mark.parametrize("task", ["grpo", "kto"])
def test_losses_of_answers_match_the_case(task, monkeypatch):
    """fused_po, eager PyTorch and a stand-in for Liger agree with the case; a wrong bound or weight is noticed."""
    monkeypatch.setattr(peers, "code", {"liger losses": LigerLosses}.get)
    p = cases.problem(cases.Case(96, 500, 32, prompt=0.5, task=task, reference="live"), "cpu")
    truth, eps = cases.exact(p), torch.finfo(torch.float32).eps
    plain = measure.plain_errors(p, truth)
    values = NAMED["eager"].values(p).view(p.labels.shape)
    ref = None
    if task == "kto":
        ref = providers.eager(p.ref_hidden.flatten(0, 1), p.ref_weight, p.labels.flatten()).view(p.labels.shape)
    expected = cases.loss_of(p, values, ref)
    for name in ("fused_po", "fused_po, none kept", "eager", "Liger"):
        assert NAMED[name].refuses(p.case, "cpu") is None
        torch.testing.assert_close(NAMED[name].loss(p), expected, rtol=1e-5, atol=1e-6)
        errors, _ = measure.errors_of(NAMED[name], p, truth)
        assert measure.wrong(errors, plain, eps) is None, (name, errors)
    for module in (cases, providers, peers):  # with another constant no provider agrees with the exact values
        monkeypatch.setattr(module, *{"grpo": ("EPSILON", 0.9), "kto": ("KTO_KL", 1.0)}[task])
    for name in ("fused_po", "eager", "Liger"):
        errors, _ = measure.errors_of(NAMED[name], p, truth)
        assert measure.wrong(errors, plain, eps).startswith("d_hidden"), name


def test_grpos_ratios_are_not_close_to_the_clip_bounds():
    p = cases.problem(cases.Case(1600, 500, 32, "bf16", prompt=0.5, task="grpo"), "cpu")
    ratio = (NAMED["eager"].values(p).view(p.labels.shape) - p.old_logps).exp()[p.labels != cases.IGNORE]
    outside = (ratio - 1).abs() > cases.EPSILON
    assert 0.06 < outside.float().mean() < 0.25 and p.advantages.sign().unique().numel() == 2
    for end in (1 - cases.EPSILON, 1 + cases.EPSILON):
        assert (ratio.log() - math.log(end)).abs().min() > 0.1
