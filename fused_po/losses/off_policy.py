"""Corrections for samples from an engine whose policy differs from the trainer's: weights and masks, no gradients."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses.policy import broadcast_advantages, padded, sequence_mean

LEVELS = ("token", "sequence", "geometric")
KINDS = ("truncate", "mask", "reject")


def sampler_log_ratio(name: str, logps: Tensor, sampler_logps: Tensor, mask: Tensor, allow_missing: bool) -> Tensor:
    """log pi - log pi_sampler without gradient; 0 where masked and, if allowed, where sampler_logps is NaN."""
    checks.flags(allow_missing=allow_missing)
    missing = sampler_logps.isnan()
    if not allow_missing:
        checks.finite("sampler_logps", sampler_logps, mask)
    checks.finite(name, logps, mask)
    counted = mask & ~missing if allow_missing else mask
    return torch.where(counted, logps.detach() - sampler_logps.detach(), 0)


def importance_weights(
    old_logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    kind: str = "truncate",
    low: Optional[float] = None,
    high: Optional[float] = 3.0,
    allow_missing: bool = False,
) -> Tensor:
    """Importance weights pi_old / pi_sampler, to multiply a policy loss of tokens that another engine sampled.

        r = log pi_old - log pi_sampler;  w = exp of  token: r_t;  sequence: sum_t r_t;  geometric: mean_t r_t
        truncate: clip(w, low, high);  mask: w where low <= w <= high, else 0;  reject: 1 where so, else 0

    Sequence weights are unbiased. Token weights are a first-order approximation with less variance. Known as

        TIS         token, truncate: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
                    training"; verl's rollout_is="token", TRL's "token_truncate"
        IcePop      token, mask, low 0.5, high 5: arXiv:2510.18855; OpenRLHF's icepop, TRL's "token_mask"
        MIS         sequence, mask: TRL's "sequence_mask", its default; "sequence_truncate" likewise
        rejection   any level, reject: verl's rollout_rs, with low = 1 / high there; a geometric one times token weights
                    is OpenRLHF's seq-mask-tis

    TRL's C_max is 3, verl's threshold 2, OpenRLHF's range (0.5, 5). log w is clamped to [-20, 20], as in verl.

    Args:
        old_logps: [B, T], the trainer's log-probs before the update. sampler_logps: [B, T], those of the sampler.
        mask: [B, T].
        level: "token", "sequence" or "geometric". kind: "truncate", "mask" or "reject".
        low: > 0, or None. high: > low, or None.
        allow_missing: whether NaN in sampler_logps counts as a ratio of 1, as in TRL. False: NaN is an error.

    Returns:
        [B, T], without gradient; 0 where masked. At the other levels all tokens of an answer have the same weight.
    """
    checks.choice("level", level, LEVELS)
    checks.choice("kind", kind, KINDS)
    low = None if low is None else checks.positive("low", low)
    if high is not None:
        checks.number("high", high, "numbers > {}, or None", lambda v: v > (low or 0), low or 0)
    checks.same_shape(old_logps=padded("old_logps", old_logps), sampler_logps=sampler_logps)
    mask = checks.mask_like("mask", mask, old_logps, "old_logps")
    log_w = sampler_log_ratio("old_logps", old_logps, sampler_logps, mask, allow_missing)
    if level != "token":
        log_w = log_w.sum(-1, keepdim=True) if level == "sequence" else sequence_mean(log_w, mask)
    weights = log_w.clamp(-20.0, 20.0).exp()
    if kind == "truncate":
        weights = weights if low is None and high is None else weights.clamp(low, high)
    else:
        kept = torch.ones_like(weights, dtype=torch.bool)
        if low is not None:
            kept = kept & (weights >= low)
        if high is not None:
            kept = kept & (weights <= high)
        weights = torch.where(kept, weights if kind == "mask" else torch.ones_like(weights), 0)
    return torch.where(mask, weights, 0)


def off_policy_sequence_mask(
    logps: Tensor,
    sampler_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    threshold: float,
    allow_missing: bool = False,
) -> Tensor:
    """The mask without answers of negative advantage that the policy has moved away from:

        keep where A >= 0 or mean_t (log pi_sampler - log pi) <= threshold

    DeepSeek-V3.2, arXiv:2512.02556, eq. 9; TRL's off_policy_mask_threshold. Pass the log-probs of the engine that
    sampled, so that the mean covers both its difference from the trainer and the updates since; without such an engine
    pass those of the old policy.

    Args:
        logps: [B, T]. sampler_logps: [B, T]. advantages: [B] or [B, T]. mask: [B, T].
        threshold: > 0, nats per token.
        allow_missing: whether tokens with NaN in sampler_logps add 0 to the mean, as in TRL. False: NaN is an error.

    Returns:
        [B, T], bool, a subset of the mask. Multiply the loss by it and aggregate with the full mask, as TRL does.
    """
    threshold = checks.positive("threshold", threshold)
    checks.same_shape(logps=padded("logps", logps), sampler_logps=sampler_logps)
    mask = checks.mask_like("mask", mask, logps, "logps")
    advantages = broadcast_advantages(advantages, mask)
    kl = sequence_mean(-sampler_log_ratio("logps", logps, sampler_logps, mask, allow_missing), mask)
    return mask & ((advantages >= 0) | (kl <= threshold))
