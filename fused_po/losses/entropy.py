"""Losses that keep the policy's entropy high, and masks by entropy. Arguments as in losses.policy."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses.numerics import weighted
from fused_po.losses.policy import (
    Tokens,
    clip_range,
    clipped_surrogate,
    importance_ratio,
    padded,
    tokens,
    unreduced,
)


def entropy_bonus(entropy: Tensor, mask: Tensor, *, coef: float) -> Tensor:
    """L = -coef H, a term to add to a policy loss (Mnih et al. 2016, arXiv:1602.01783, section 4.3).

    H is the entropy of the trained distribution, with the temperature applied (`linear_logps(temperature=)` gives
    that). TRL always averages it over tokens; verl and OpenRLHF aggregate it like the policy loss.

    Args:
        entropy: [B, T], nats, with gradients. mask: [B, T]. coef: >= 0.

    Returns:
        [B, T], unreduced; 0 where masked.
    """
    mask = checks.mask_like("mask", mask, padded("entropy", entropy), "entropy")
    coef = checks.number("coef", coef, "finite numbers >= 0", lambda v: v >= 0)
    return unreduced(-coef * torch.where(mask, entropy, 0), mask)


def top_entropy_mask(entropy: Tensor, mask: Tensor, quantile: float = 0.2) -> Tensor:
    """The tokens in the top `quantile` of entropy over the batch, to train only on these "forking tokens".

    Wang et al. 2025, arXiv:2506.01939, with 0.2. TRL's top_entropy_quantile: tokens at or above the interpolated
    (1 - quantile) quantile. TRL takes the quantile over all processes, this function over its arguments. No host sync.

    Args:
        entropy: [B, T], nats. mask: [B, T]. quantile: in (0, 1], the share of tokens to keep.

    Returns:
        [B, T], bool: a subset of the mask.
    """
    mask = checks.mask_like("mask", mask, padded("entropy", entropy), "entropy")
    share = checks.number("quantile", quantile, "numbers in (0, 1]", lambda v: 0 < v <= 1)
    entropy = torch.where(mask, entropy.detach(), torch.inf)
    ordered = entropy.flatten().sort().values  # masked tokens last
    if not len(ordered):
        return mask
    at = ((1 - share) * (mask.sum() - 1).clamp(min=0).to(torch.float64)).reshape(1)
    below, above = (ordered.gather(0, i.long()) for i in (at.floor(), at.ceil()))
    threshold = torch.lerp(below, above, (at - at.floor()).to(below.dtype))
    return mask & (entropy >= threshold)


def covariance(t: Tokens) -> Tensor:
    """[B, T], without gradient: (A - mean A) (log pi - mean log pi), means over the counted tokens of the batch."""
    count = t.mask.sum().clamp(min=1)
    logps, advantages = t.logps.detach(), t.advantages.expand_as(t.logps)
    centered = (torch.where(t.mask, v, 0) - torch.where(t.mask, v, 0).sum() / count for v in (advantages, logps))
    a, lp = centered
    return a * lp


def select_largest(key: Tensor, candidates: Tensor, share: float, mask: Tensor) -> Tensor:
    """The candidates with the largest keys: `share` of the number of counted tokens, rounded down, at least one."""
    order = torch.where(candidates, key, -torch.inf).flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    wanted = (mask.sum().to(torch.float64) * share).floor().clamp(min=1)
    return candidates & (rank.view_as(mask) < wanted)


def ratio_share(name: str, value: object) -> float:
    return checks.number(name, value, "numbers in (0, 1]", lambda v: 0 < v <= 1)


def clip_cov(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: Optional[float] = None,
    clip_cov_ratio: float = 2e-4,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    generator: Optional[torch.Generator] = None,
    log_ratio_clamp: Optional[float] = 20.0,
) -> Tensor:
    """Clip-Cov: `ppo_clip` with loss 0 for a few tokens whose covariance of log-prob and advantage is high.

    Cui et al. 2025, arXiv:2505.22617, section 4. The tokens are selected among those with
    clip_cov_lb < cov < clip_cov_ub that PPO has not clipped; their number is clip_cov_ratio times the number of counted
    tokens, at least one. The authors and verl draw them from the global random generator, with a host sync. Here they
    are drawn with `generator`; without one they are the tokens with the largest covariance, the same in every run. The
    paper's recipe has epsilon = 1. No host sync.

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see losses.policy. Covariances are over the whole batch.
        epsilon: in (0, 1]. epsilon_high: > 0; None: epsilon.
        clip_cov_ratio: in (0, 1]. clip_cov_lb < clip_cov_ub.
        generator: on the tensors' device, or None.

    Returns:
        [B, T], unreduced.
    """
    low, high = clip_range(epsilon, epsilon_high)
    share = ratio_share("clip_cov_ratio", clip_cov_ratio)
    floor = checks.number("clip_cov_lb", clip_cov_lb, "finite numbers", lambda v: True)
    top = checks.number("clip_cov_ub", clip_cov_ub, "numbers > clip_cov_lb = {}", lambda v: v > floor, floor)
    t = tokens(logps, old_logps, advantages, mask)
    ratio = importance_ratio(t.log_ratio, log_ratio_clamp)
    losses = clipped_surrogate(ratio, t.advantages, low, high, None)
    cov = covariance(t)
    candidates = t.mask & (cov > floor) & (cov < top) & ~(losses > -ratio * t.advantages)
    key = cov
    if generator is not None:
        key = torch.rand(cov.shape, generator=generator, device=cov.device)
    return unreduced(losses, t.mask & ~select_largest(key, candidates, share, t.mask))


def kl_cov(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kl_cov_ratio: float = 2e-4,
    ppo_kl_coef: float = 1.0,
    log_ratio_clamp: Optional[float] = 20.0,
) -> Tensor:
    """KL-Cov: L = -rho A, unclipped, plus ppo_kl_coef |log rho| on the tokens with the largest covariance.

    Cui et al. 2025, arXiv:2505.22617, section 4: the number of tokens is kl_cov_ratio times the number of counted
    tokens, at least one. verl computes the same, but selects on the host; here there is no host sync.

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see losses.policy. Covariances are over the whole batch.
        kl_cov_ratio: in (0, 1]. ppo_kl_coef: >= 0.

    Returns:
        [B, T], unreduced.
    """
    share = ratio_share("kl_cov_ratio", kl_cov_ratio)
    coef = checks.number("ppo_kl_coef", ppo_kl_coef, "finite numbers >= 0", lambda v: v >= 0)
    t = tokens(logps, old_logps, advantages, mask)
    ratio = importance_ratio(t.log_ratio, log_ratio_clamp)
    selected = select_largest(covariance(t), t.mask, share, t.mask)
    penalty = torch.where(selected, weighted(coef, t.log_ratio.abs()), 0)
    return unreduced(-weighted(t.advantages, ratio) + penalty, t.mask)
