"""Policy-gradient losses with one importance ratio per answer.

Arguments are those of losses.policy. Results are [B, T] too: each counted token holds the loss of its answer, so
`reduce.aggregate` works for all losses. "seq-mean-token-mean" gives the papers' mean over answers; with
"seq-mean-token-sum" the weight of an answer is its length (LUSPO).
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses.numerics import weighted
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
    """GSPO: PPO's clipped surrogate with one ratio per answer, s = exp(mean_t log rho_t).

        L = -min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A)

    Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7. `token_level` selects GSPO-token, s_t = sg(s) pi_t / sg(pi_t). Its
    value is the same; its gradient for token t is s A grad log pi_t, where the plain form has the answer's mean of
    grad log pi. For advantages [B] both have the same mean over tokens; advantages [B, T] need the token form. TRL has
    the plain form (importance_sampling_level="sequence"), verl the token form with log s clamped to at most 10.

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see losses.policy.
        epsilon: in (0, 1]. epsilon_high: > 0; None: epsilon. The defaults are the paper's: sequence ratios vary little.
        token_level: whether to use GSPO-token, see above.
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
    """LUSPO: GSPO with each answer weighted by its number of tokens, which removes a bias by length.

    arXiv:2602.05261. The token losses are those of `gspo`; their sum over an answer, "seq-mean-token-sum", is LUSPO.
    TRL's loss_type="luspo" is the same with importance_sampling_level="sequence", which TRL recommends but does not set
    by default. The default clip range is GRPO's 0.2, as in TRL.

    Args:
        As for `gspo`.

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
    """RLOO: PPO's clipped surrogate on whole answers, R = exp(sum_t log rho_t), for leave-one-out advantages.

        L = -min(R A, clip(R, 1 - epsilon, 1 + epsilon_high) A)

    Ahmadian et al. 2024, arXiv:2402.14740, treats an answer as one action, with A from `leave_one_out_advantages`. The
    clip is that of TRL's RLOO trainer. OpenRLHF and verl use these advantages with `ppo_clip`.

    Args:
        logps, old_logps, mask, log_ratio_clamp: see losses.policy. advantages: [B], one per answer.
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
    """GMPO: L = -A exp(mean_t c_t), the geometric mean of token ratios, each clipped on the side of its advantage.

        c_t = min(log rho_t, epsilon_high) where A > 0, max(log rho_t, -epsilon) elsewhere

    Zhao et al. 2025, arXiv:2507.20673. The bounds apply to log rho, so rho is in (e^-epsilon, e^epsilon_high); 0.4 in
    the paper. TRL's GMPO trainer computes the same. verl's geo_mean averages the advantages, clips by its clip_ratio
    and adds 1e-8 to lengths.

    Args:
        logps, old_logps, mask, log_ratio_clamp: see losses.policy. advantages: [B], one per answer.
        epsilon: > 0, the bound on log rho. epsilon_high: > 0; None: epsilon.

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
    """phi of `vespo`, with the shape of the advantages, without gradient. log_ratio is 0 where masked."""
    shape = {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}
    shape = {name: checks.positive(name, value) for name, value in shape.items()}
    # In float64: the rounding error of a large log w is multiplied by k in the exponent of phi.
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
    k = torch.where(positive, shape["k_pos"], torch.full_like(advantages, shape["k_neg"]))
    lam = torch.where(positive, shape["lambda_pos"], torch.full_like(advantages, shape["lambda_neg"]))
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

    arXiv:2602.10693. phi(1) = 1, and phi falls to 0 on both sides of k / lambda, so nothing is clipped. As in TRL's
    loss_type="vespo", log rho_t is clamped to [-20, 20] and log w to [log 1e-8, 20].

    Args:
        logps, old_logps, advantages, mask: see losses.policy.
        weights: [B, T], token weights >= 0 for the sampler (`importance_weights`). They enter w, not the loss.
        k_pos, lambda_pos: > 0, used where A >= 0. k_neg, lambda_neg: > 0, used elsewhere.

    Returns:
        [B, T], unreduced.
    """
    t = tokens(logps, old_logps, advantages, mask)
    shape = {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}
    phi = vespo_weight(t.log_ratio, t.advantages, t.mask, weights, **shape)
    return unreduced(-weighted(phi * t.advantages, t.logps), t.mask)
