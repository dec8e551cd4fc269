"""Policy-gradient losses with one importance ratio an answer. Arguments as in losses.policy, results [B, T] too:
each counted token holds its answer's loss, so `reduce.aggregate` works on all. With "seq-mean-token-mean" the batch's
loss is the mean over answers that the papers have; with "seq-mean-token-sum" each answer weighs its length (LUSPO).
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses.numerics import weighed
from fused_po.losses.policy import (
    clip_range,
    clipped_surrogate,
    importance_ratio,
    ratio_bound,
    sequence_mean,
    tokens,
    unreduced,
)


def gspo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 3e-4,
    epsilon_high: Optional[float] = 4e-4,
    token_level: bool = False,
    delta: Optional[float] = None,
    log_ratio_clamp: Optional[float] = 20.0,
) -> Tensor:
    """GSPO: PPO's clipped surrogate of the answer's ratio, s = exp(mean_t log rho_t).

        L = -min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A)

    Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7. `token_level` is its GSPO-token, s_t = sg(s) pi_t / sg(pi_t): the
    same value, and a gradient of s A grad log pi_t where the plain form gives every token of the answer the answer's
    mean. Averaged over tokens they are one, for advantages [B]; advantages [B, T] want the token form.
    TRL: the plain form (importance_sampling_level="sequence"). verl: the token form, log s clamped to 10 from above.

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see losses.policy.
        epsilon: in (0, 1]. epsilon_high: > 0; None: epsilon. Defaults: the paper's; ratios of answers move little.
        token_level: whose gradient, see above.
        delta: > 1 + epsilon_high, or None: see `ppo_clip`.

    Returns:
        [B, T], unreduced, to be averaged with "seq-mean-token-mean".
    """
    low, high = clip_range(epsilon, epsilon_high)
    bound = ratio_bound(high, None, delta)
    t = tokens(logps, old_logps, advantages, mask)
    ratio = importance_ratio(sequence_mean(t.log_ratio, t.mask), log_ratio_clamp)
    checks.flags(token_level=token_level)
    if token_level:
        ratio = ratio.detach() * (t.logps - t.logps.detach()).exp()
    return unreduced(clipped_surrogate(ratio, t.advantages, low, high, bound), t.mask)


def luspo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: Optional[float] = None,
    delta: Optional[float] = None,
    log_ratio_clamp: Optional[float] = 20.0,
) -> Tensor:
    """LUSPO: GSPO whose answers weigh as many times as they have tokens, so that length brings no bias.

    arXiv:2602.05261. The tokens' losses are `gspo`'s; their sum over an answer, "seq-mean-token-sum", is LUSPO. TRL's
    loss_type="luspo" is this with importance_sampling_level="sequence", which it recommends without making it the
    default; its clip range is GRPO's 0.2, kept here.

    Args:
        As `gspo`.

    Returns:
        [B, T], unreduced, to be summed with "seq-mean-token-sum".
    """
    return gspo(
        logps,
        old_logps,
        advantages,
        mask,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        log_ratio_clamp=log_ratio_clamp,
    )


def rloo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: Optional[float] = None,
    log_ratio_clamp: Optional[float] = 20.0,
) -> Tensor:
    """RLOO: PPO's clipped surrogate of whole answers, R = exp(sum_t log rho_t), with leave-one-out advantages.

        L = -min(R A, clip(R, 1 - epsilon, 1 + epsilon_high) A)

    Ahmadian et al. 2024, arXiv:2402.14740, takes an answer as one action and A from `leave_one_out_advantages`; TRL's
    RLOO trainer has the clip. OpenRLHF and verl use the advantages with `ppo_clip`.

    Args:
        logps, old_logps, mask, log_ratio_clamp: see losses.policy. advantages: [B], one an answer.
        epsilon: in (0, 1]. epsilon_high: > 0; None: epsilon.

    Returns:
        [B, T], unreduced, to be averaged with "seq-mean-token-mean".
    """
    low, high = clip_range(epsilon, epsilon_high)
    t = tokens(logps, old_logps, advantages, mask, per_sequence=True)
    ratio = importance_ratio(t.log_ratio.sum(-1, keepdim=True), log_ratio_clamp)
    return unreduced(clipped_surrogate(ratio, t.advantages, low, high, None), t.mask)


def gmpo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.4,
    epsilon_high: Optional[float] = None,
    log_ratio_clamp: Optional[float] = 20.0,
) -> Tensor:
    """GMPO: L = -A exp(mean_t c_t), the geometric mean of token ratios clipped each where the advantage pushes it.

        c_t = min(log rho_t, epsilon_high) where A > 0, max(log rho_t, -epsilon) elsewhere

    Zhao et al. 2025, arXiv:2507.20673. The range is one of logs, (e^-epsilon, e^epsilon_high), 0.4 in the paper. TRL's
    GMPO trainer agrees; verl's geo_mean takes the mean of the advantages, clips by its clip_ratio, and adds 1e-8 to
    lengths.

    Args:
        logps, old_logps, mask, log_ratio_clamp: see losses.policy. advantages: [B], one an answer.
        epsilon: > 0, of log rho. epsilon_high: > 0; None: epsilon.

    Returns:
        [B, T], unreduced, to be averaged with "seq-mean-token-mean".
    """
    low = checks.positive("epsilon", epsilon)
    high = low if epsilon_high is None else checks.positive("epsilon_high", epsilon_high)
    t = tokens(logps, old_logps, advantages, mask, per_sequence=True)
    clipped = torch.where(t.advantages > 0, t.log_ratio.clamp(max=high), t.log_ratio.clamp(min=-low))
    ratio = importance_ratio(sequence_mean(torch.where(t.mask, clipped, 0), t.mask), log_ratio_clamp)
    return unreduced(-ratio * t.advantages, t.mask)


LOWEST = math.log(1e-8)  # VESPO's smallest log w


def vespo_weight(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Optional[Tensor] = None,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """phi of `vespo`, like the advantages, a constant; log_ratio is 0 where masked."""
    given = {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}
    given = {name: checks.positive(name, value) for name, value in given.items()}
    # In float64: k times the rounding of a large log w would be the error of phi.
    log_w = log_ratio.detach().double().clamp(-20.0, 20.0).sum(-1, keepdim=True)
    if weights is not None:
        if checks.floating("weights", weights).shape not in (mask.shape, mask[:, :1].shape):
            shapes = f"{tuple(mask.shape)} or {tuple(mask[:, :1].shape)}"
            raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {shapes}")
        checks.same_device("weights", weights, mask.device)
        log_weights = weights.detach().double().log().clamp(LOWEST, 20.0)
        counted = mask if weights.shape == mask.shape else mask.any(-1, keepdim=True)
        log_w = log_w + torch.where(counted, log_weights, 0).sum(-1, keepdim=True)
    log_w = log_w.clamp(LOWEST, 20.0)
    positive = advantages >= 0
    k = torch.where(positive, given["k_pos"], torch.full_like(advantages, given["k_neg"]))
    lam = torch.where(positive, given["lambda_pos"], torch.full_like(advantages, given["lambda_neg"]))
    return (k * log_w - lam * log_w.expm1()).clamp(max=60.0).exp().to(log_ratio.dtype)


def vespo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Optional[Tensor] = None,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """VESPO: L = -sg(phi(w)) A log pi, w = prod_t rho_t the answer's ratio, phi(w) = e^lambda w^k e^(-lambda w).

    arXiv:2602.10693. phi(1) = 1; phi falls to 0 on both sides of k / lambda, so nothing is clipped. log rho_t is taken
    within +-20 and log w in [log 1e-8, 20], as TRL does, whose loss_type="vespo" agrees.

    Args:
        logps, old_logps, advantages, mask: see losses.policy.
        weights: the sampler's token weights >= 0, [B, T] (`importance_weights`), which enter w, not the loss.
        k_pos, lambda_pos: > 0, where A >= 0. k_neg, lambda_neg: > 0, elsewhere.

    Returns:
        [B, T], unreduced.
    """
    t = tokens(logps, old_logps, advantages, mask)
    shape = {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}
    phi = vespo_weight(t.log_ratio, t.advantages, t.mask, weights, **shape)
    return unreduced(-weighed(phi * t.advantages, t.logps), t.mask)
