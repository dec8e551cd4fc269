"""Training metrics under TRL's names: dicts of detached scalars on the device, without a host sync."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_po import checks
from fused_po.losses.group_relative import plan, ratio_of, reference_kl
from fused_po.losses.numerics import saturating_expm1
from fused_po.losses.pairwise import Beta, log_ratios
from fused_po.losses.policy import clip_sides, padded, tokens
from fused_po.losses.reference_free import log_odds_ratio
from fused_po.losses.sequence_policy import vespo_weight
from fused_po.losses.unpaired import check_desirable, log_ratio

Metrics = dict[str, Tensor]


def masked_mean(values: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """The detached mean of the values where the mask is True; 0 if there are none. Masked values may be NaN."""
    values = checks.tensor("values", values).detach()
    if mask is None:
        total, count = values.sum(), max(1, values.numel())
    else:
        mask = checks.mask_like("mask", mask, values, "values")
        total, count = torch.where(mask, values, 0).sum(), mask.sum().clamp(min=1)
    floating = total.is_floating_point() or total.is_complex()
    return (total if floating else total.float()) / count  # dividing integers would give the default dtype


def token_metrics(mask: Tensor, *, kl: Optional[Tensor] = None, entropy: Optional[Tensor] = None) -> Metrics:
    """The means of kl and entropy over the tokens that count, for those that are passed.

    mask, kl, entropy: tensors of one shape.
    """
    passed = checks.not_none(kl=kl, entropy=entropy)
    checks.tensor("mask", mask)
    return {name: masked_mean(checks.floating(name, value), mask) for name, value in passed.items()}


def preference_metrics(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
) -> Metrics:
    """rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected of pairs.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [B], as for the losses; rewards are beta times log-ratios.
    """
    w, l = (v.detach() for v in log_ratios(chosen, rejected, ref_chosen, ref_rejected))
    beta = checks.positive_like("beta", beta, w, "chosen")
    values = {
        "rewards/chosen": beta * w,
        "rewards/rejected": beta * l,
        "rewards/accuracies": (beta * w > beta * l).to(w.dtype),
        "rewards/margins": beta * (w - l),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    return {name: masked_mean(value) for name, value in values.items()}


def odds_ratio_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """ORPO's log_odds_ratio, the mean of log s(x), and log_odds_chosen, the mean of x = losses.log_odds_ratio."""
    ratio = log_odds_ratio(chosen, rejected)
    return {"log_odds_ratio": masked_mean(torch.nn.functional.logsigmoid(ratio)), "log_odds_chosen": masked_mean(ratio)}


def unpaired_metrics(
    logps: Tensor,
    ref_logps: Optional[Tensor],
    desirable: Tensor,
    *,
    beta: float = 0.1,
    kl: Optional[Tensor] = None,
) -> Metrics:
    """rewards/chosen, rewards/rejected, rewards/margins, logps/chosen, logps/rejected of single answers; kl if given.

    Means over each class; "chosen" means desirable. If a class is missing in the batch, TRL omits its metrics, which
    needs a sync. Here its means and the margin are 0. count/chosen and count/rejected are the sizes of the classes:
    weight by them to average over batches.

    Args:
        logps, ref_logps, desirable: [B], as for `kto`. beta: > 0. kl: a scalar, the result of `kto_kl`.
    """
    rewards = checks.positive("beta", beta) * log_ratio(logps, ref_logps).detach()
    chosen = check_desirable(desirable, logps)
    metrics = {}
    for name, values in (("rewards", rewards), ("logps", logps)):
        metrics |= {f"{name}/chosen": masked_mean(values, chosen), f"{name}/rejected": masked_mean(values, ~chosen)}
    both = chosen.any() & (~chosen).any()
    metrics["rewards/margins"] = torch.where(both, metrics["rewards/chosen"] - metrics["rewards/rejected"], 0)
    metrics |= {"count/chosen": chosen.sum(), "count/rejected": (~chosen).sum()}
    return metrics if kl is None else metrics | {"kl": masked_mean(checks.floating("kl", kl))}


def reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Metrics:
    """min_reward, mean_reward, max_reward over all; accuracy and margin of pairs [B]. As in TRL."""
    checks.same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    both = torch.cat([chosen.flatten(), rejected.flatten()])
    nonempty = both if both.numel() else both.new_zeros(1)
    return {
        "min_reward": nonempty.min(),
        "mean_reward": masked_mean(both),
        "max_reward": nonempty.max(),
        "accuracy": masked_mean((chosen > rejected).to(chosen.dtype)),
        "margin": masked_mean(chosen - rejected),
    }


def clip_metrics(low: Tensor, high: Tensor, mask: Tensor) -> Metrics:
    """TRL's clip_ratio metrics. low, high: clipped from below, from above; [B, T] of tokens or [B, 1] of answers."""
    region = low | high
    if low.shape != mask.shape:  # an answer counts once, if it has tokens
        mask = mask.any(-1, keepdim=True)
    low, high, region = (torch.where(mask, v, False).float() for v in (low, high, region))
    counted, count = mask.any(-1), mask.sum(-1).clamp(min=1)
    lows, highs = low.sum(-1) / count, high.sum(-1) / count
    return {
        "clip_ratio/low_mean": masked_mean(low, mask),
        "clip_ratio/high_mean": masked_mean(high, mask),
        "clip_ratio/region_mean": masked_mean(region, mask),
        "clip_ratio/low_min": torch.where(
            counted.any(), pad(torch.where(counted, lows, 1), (0, 1), value=1.0).amin(), 0
        ),
        "clip_ratio/high_max": pad(torch.where(counted, highs, 0), (0, 1)).amax(),
    }


@torch.no_grad()
def policy_metrics(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logps: Optional[Tensor] = None,
    entropy: Optional[Tensor] = None,
    *,
    loss_type: str = "grpo",
    epsilon: Optional[float] = None,
    epsilon_high: Optional[float] = None,
    importance_sampling_level: Optional[str] = None,
    use_bias_correction_kl: bool = True,
    weights: Optional[Tensor] = None,
    **settings: float,
) -> Metrics:
    """The metrics that TRL's GRPO trainer logs for a batch. Takes the arguments of `grpo`.

    clip_ratio/low_mean, high_mean, region_mean: the share of tokens (at sequence level: answers) that the loss clips.
    clip_ratio/low_min, high_max: the smallest and the largest share in an answer. cispo has cispo_clip_ratio instead
    (positive advantages above the cap), vespo has vespo/phi_seq_mean, sapo none. kl: with ref_logps, multiplied by the
    ratio as in the loss. entropy: if passed. approx_kl: the mean of rho - 1 - log rho, which estimates KL(pi_old || pi)
    and is >= 0 (Schulman 2020; verl's ppo_kl is the mean of -log rho, which may be negative). All metrics are of this
    process only.

    Args:
        logps, old_logps, advantages, mask, ref_logps: as for `grpo`. entropy: [B, T].
        weights: as for `grpo`, only with loss_type="vespo".
    """
    p = plan(loss_type, epsilon, epsilon_high, None, importance_sampling_level, settings)
    name = 'loss_type="vespo"'
    checks.only_with("weights", None if weights is None else "a tensor", None, loss_type == "vespo", name)
    checks.flags(use_bias_correction_kl=use_bias_correction_kl)
    checks.only_with("use_bias_correction_kl", use_bias_correction_kl, True, ref_logps is not None, "ref_logps")
    t = tokens(logps, old_logps, advantages, mask)
    ratio, a = ratio_of(t, p.level, 20.0), t.advantages
    metrics = {"approx_kl": masked_mean(saturating_expm1(t.log_ratio) - t.log_ratio, t.mask)}
    if ref_logps is not None:
        kl = reference_kl(t, padded("ref_logps", ref_logps), ratio if use_bias_correction_kl else None)
        metrics["kl"] = masked_mean(kl, t.mask)
    if entropy is not None:
        metrics["entropy"] = masked_mean(padded("entropy", entropy), t.mask)
    if loss_type == "cispo":
        none = torch.zeros_like(ratio, dtype=torch.bool)
        clipped = clip_metrics(none, (ratio > p.high) & (a > 0), t.mask)
        metrics["cispo_clip_ratio"] = clipped["clip_ratio/high_mean"]
    elif loss_type == "vespo":
        phi = vespo_weight(t.log_ratio, a, t.mask, weights, **p.settings)
        metrics["vespo/phi_seq_mean"] = masked_mean(phi, t.mask if phi.shape == t.mask.shape else t.mask.any(-1, True))
    elif loss_type == "gmpo":
        high = p.low if p.high is None else p.high
        metrics |= clip_metrics((t.log_ratio < -p.low) & (a < 0), (t.log_ratio > high) & (a > 0), t.mask)
    elif loss_type != "sapo":
        metrics |= clip_metrics(*clip_sides(ratio, a, p.low, p.high), t.mask)
    return metrics
