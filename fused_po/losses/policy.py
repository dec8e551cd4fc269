"""Policy-gradient losses per token, [B, T], unreduced; `reduce.aggregate` reduces them to one number.

All take `logps, old_logps, advantages, mask`: log-probs [B, T] of the tokens under the policy and under the old policy
in the importance ratio; advantages [B] (one per answer) or [B, T]; a mask [B, T], non-zero where a token counts. Masked
positions may hold any value, including NaN, and give exactly 0. An answer without counted tokens contributes 0.
Gradients flow to logps only. Log-probs are fp32 or float64.

With rho = pi / pi_old: `log_ratio_clamp` is the largest |log rho| that is exponentiated, 20 as in verl; beyond it the
gradient is 0. None: rho continues along its tangent beyond e^20, finite and with a gradient. TRL and OpenRLHF have no
clamp and overflow.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses.numerics import weighted


class Tokens(NamedTuple):
    """A checked batch; values are 0 where the mask is False."""

    logps: Tensor  # [B, T]
    log_ratio: Tensor  # [B, T], log pi - log pi_old
    advantages: Tensor  # [B, T], or [B, 1] for one per answer; no gradient
    mask: Tensor  # [B, T], bool


def padded(name: str, value: object) -> Tensor:
    """Return `value` if it is a floating tensor [B, T]."""
    if checks.floating(name, value).ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [B, T]")
    return value


def broadcast_advantages(advantages: object, mask: Tensor, *, per_sequence: bool = False) -> Tensor:
    """Advantages [B] as [B, 1], or [B, T] unchanged; detached, 0 where the mask is False."""
    checks.same_device("advantages", checks.floating("advantages", advantages), mask.device)
    counted, shape = mask, tuple(advantages.shape)
    if shape == tuple(mask.shape[:1]):
        counted, advantages = mask.any(-1, keepdim=True), advantages[:, None]
    elif shape != tuple(mask.shape) or per_sequence:
        expected = "" if per_sequence else f", or {tuple(mask.shape)}, the shape of logps"
        raise ValueError(f"advantages: got shape {shape}, expected {tuple(mask.shape[:1])}, one per answer{expected}")
    checks.finite("advantages", advantages, counted)
    return torch.where(counted, advantages.detach(), 0)


def tokens(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, per_sequence: bool = False) -> Tokens:
    """Check a batch and set values to 0 where the mask is False."""
    checks.same_shape(logps=padded("logps", logps), old_logps=old_logps)
    mask = checks.mask_like("mask", mask, logps, "logps")
    advantages = broadcast_advantages(advantages, mask, per_sequence=per_sequence)
    logps, old_logps = torch.where(mask, logps, 0), torch.where(mask, old_logps.detach(), 0)
    return Tokens(logps, logps - old_logps, advantages, mask)


def unreduced(losses: Tensor, mask: Tensor) -> Tensor:
    """Losses [B, T] or [B, 1] as [B, T]: each counted token holds its own loss or its answer's, the others 0."""
    return torch.where(mask, losses, 0)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 1], the mean over the counted tokens of each answer; values are 0 elsewhere. 0 without counted tokens."""
    return values.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def importance_ratio(log_ratio: Tensor, log_ratio_clamp: Optional[float]) -> Tensor:
    """e^log_ratio: clamped, or for None continued along its tangent beyond e^20."""
    if log_ratio_clamp is not None:
        allowed = "numbers in (0, 80], or None"
        clamp = checks.number("log_ratio_clamp", log_ratio_clamp, allowed, lambda v: 0 < v <= 80)
        return log_ratio.clamp(-clamp, clamp).exp()
    inside = log_ratio.clamp(max=20.0)
    ratio = inside.exp()
    return ratio + ratio.detach() * torch.relu(log_ratio - 20.0)


def clip_range(epsilon: float, epsilon_high: Optional[float]) -> tuple[float, float]:
    """(epsilon, epsilon_high), where None for epsilon_high means epsilon."""
    epsilon = checks.number("epsilon", epsilon, "numbers in (0, 1]", lambda v: 0 < v <= 1)
    return epsilon, epsilon if epsilon_high is None else checks.positive("epsilon_high", epsilon_high)


def ratio_bound(epsilon_high: float, dual_clip: Optional[float], delta: Optional[float]) -> Optional[float]:
    """The bound of the ratio for negative advantages, from whichever of its two names is set."""
    if dual_clip is not None and delta is not None:
        raise ValueError(f"delta: got {delta} with dual_clip={dual_clip}; both name the same bound, pass one of them")
    if dual_clip is not None:
        return checks.number("dual_clip", dual_clip, "numbers > 1", lambda v: v > 1)
    if delta is not None:
        least = 1 + epsilon_high
        return checks.number("delta", delta, "numbers > 1 + epsilon_high = {}", lambda v: v > least, least)
    return None


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float, bound: Optional[float]) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), and at most -bound A where A < 0."""
    objective = torch.minimum(weighted(advantages, ratio), ratio.clamp(1 - low, 1 + high) * advantages)
    if bound is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, bound * advantages), objective)
    return -objective


def clip_sides(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where PPO clips: (ratio < 1 - low with a negative advantage, ratio > 1 + high with a positive advantage)."""
    return (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)


def reinforce(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """L = -A log pi: the policy gradient for tokens that the policy itself sampled.

    Williams 1992, "Simple statistical gradient-following algorithms", with the baseline in A. Samples from an
    older policy need the importance ratio: `ppo_clip`, or this loss times `importance_weights`. REINFORCE++
    (arXiv:2501.03262) is `ppo_clip` with its own advantages; RLOO is `rloo`. Equal to verl's gpg.

    Args:
        logps: [B, T]. advantages: [B] or [B, T], no gradient. mask: [B, T].

    Returns:
        [B, T], unreduced.
    """
    t = tokens(logps, logps, advantages, mask)
    return unreduced(-weighted(t.advantages, t.logps), t.mask)


def ppo_clip(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: Optional[float] = None,
    dual_clip: Optional[float] = None,
    delta: Optional[float] = None,
    log_ratio_clamp: Optional[float] = 20.0,
) -> Tensor:
    """PPO's clipped surrogate.

        L = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A),  and at most -c A where A < 0

    Schulman et al. 2017, arXiv:1707.06347, eq. 7. epsilon_high > epsilon is DAPO's clip-higher (arXiv:2503.14476,
    eq. 10). The bound c has two names: `dual_clip`, from dual-clip PPO (arXiv:1912.09729; verl's clip_ratio_c, 3.0 by
    default there; OpenRLHF's dual_clip), and `delta`, from INTELLECT-2's two-sided clip (arXiv:2505.07291; TRL), which
    must be above 1 + epsilon_high.

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see the module docstring.
        epsilon: in (0, 1]. epsilon_high: > 0; None: epsilon.
        dual_clip: > 1, or None. delta: > 1 + epsilon_high, or None. Not both.

    Returns:
        [B, T], unreduced.
    """
    low, high = clip_range(epsilon, epsilon_high)
    bound = ratio_bound(high, dual_clip, delta)
    t = tokens(logps, old_logps, advantages, mask)
    ratio = importance_ratio(t.log_ratio, log_ratio_clamp)
    return unreduced(clipped_surrogate(ratio, t.advantages, low, high, bound), t.mask)


def cispo_weight(
    ratio: Tensor, cap: Optional[float], epsilon: Optional[float], epsilon_high: Optional[float]
) -> Tensor:
    """The clipped ratio, detached."""
    if (cap is None) == (epsilon_high is None):
        got = f"cap={cap} and epsilon_high={epsilon_high}"
        raise ValueError(
            f"cap: got {got}, expected exactly one: cap bounds rho (TRL), epsilon_high bounds rho - 1 (verl)"
        )
    if cap is not None:
        checks.only_with("epsilon", epsilon, None, False, "epsilon_high")
        return ratio.detach().clamp(max=checks.positive("cap", cap))
    floor = 0.0 if epsilon is None else 1 - clip_range(epsilon, None)[0]
    return ratio.detach().clamp(floor, 1 + checks.positive("epsilon_high", epsilon_high))


def cispo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cap: Optional[float] = None,
    epsilon: Optional[float] = None,
    epsilon_high: Optional[float] = None,
    log_ratio_clamp: Optional[float] = 20.0,
) -> Tensor:
    """CISPO: L = -sg(clip(rho)) A log pi. The clipped ratio is a weight, so every token keeps a gradient.

    MiniMax-M1, arXiv:2506.13585, eq. 4 and 5; the paper tunes the upper bound only. TRL: clip(rho) = min(rho, cap),
    with the cap called epsilon_high (5.0 in ScaleRL, arXiv:2510.13786; TRL's default is PPO's 0.2). verl: clip(rho,
    1 - epsilon, 1 + epsilon_high).

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see the module docstring.
        cap: > 0, the upper bound on rho; or
        epsilon_high: > 0, the upper bound on rho - 1, then also epsilon: in (0, 1]; None: no lower bound.

    Returns:
        [B, T], unreduced.
    """
    t = tokens(logps, old_logps, advantages, mask)
    weight = cispo_weight(importance_ratio(t.log_ratio, log_ratio_clamp), cap, epsilon, epsilon_high)
    return unreduced(-weighted(weight * t.advantages, t.logps), t.mask)


def soft_gate(ratio: Tensor, advantages: Tensor, temperature_pos: float = 1.0, temperature_neg: float = 1.05) -> Tensor:
    """-(4 / tau) s(tau (rho - 1)) A."""
    pos, neg = checks.positive("temperature_pos", temperature_pos), checks.positive("temperature_neg", temperature_neg)
    tau = torch.where(advantages > 0, pos, torch.full_like(advantages, neg))  # where() of two numbers would give fp32
    # Not sigmoid, whose gradient s (1 - s) loses its digits near s = 1.
    gate = torch.nn.functional.logsigmoid(tau * (ratio - 1)).exp()
    return -gate * 4 / tau * advantages


def sapo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
    log_ratio_clamp: Optional[float] = 20.0,
) -> Tensor:
    """SAPO: L = -(4 / tau) s(tau (rho - 1)) A with the sigmoid s: a soft gate in place of PPO's clip.

    The derivative of -L with respect to rho at rho = 1 is A. Gao et al. 2025, arXiv:2511.20347, eq. 5 and 6. TRL, verl
    and Liger compute the same.

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see the module docstring.
        temperature_pos: tau > 0 where A > 0. temperature_neg: tau > 0 elsewhere. A larger tau makes the gate narrower.

    Returns:
        [B, T], unreduced.
    """
    t = tokens(logps, old_logps, advantages, mask)
    ratio = importance_ratio(t.log_ratio, log_ratio_clamp)
    return unreduced(soft_gate(ratio, t.advantages, temperature_pos, temperature_neg), t.mask)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_eps: Optional[float] = 0.2,
    factor: float = 0.5,
) -> Tensor:
    """PPO's loss for the critic, with clipped values.

        L = factor max((v - R)^2, (v_old + clip(v - v_old, -clip_eps, clip_eps) - R)^2)

    Schulman et al. 2017, arXiv:1707.06347, eq. 9 has (v - R)^2 with factor 1; the clip comes from OpenAI Baselines.
    Factor 0.5: OpenRLHF's ValueLoss, verl, TRL's PPO. OpenRLHF does not clip by default; verl clips at 0.5.

    Args:
        values: [B, T], the critic's, with gradient. old_values: [B, T], those at sampling. returns: [B, T].
        mask: [B, T]. clip_eps: > 0, or None for no clip (old_values is then not used; pass values, for example).
        factor: > 0.

    Returns:
        [B, T], unreduced; 0 where masked.
    """
    checks.same_shape(values=padded("values", values), old_values=old_values, returns=returns)
    mask, factor = checks.mask_like("mask", mask, values, "values"), checks.positive("factor", factor)
    checks.finite("returns", returns, mask)
    values, old_values = torch.where(mask, values, 0), torch.where(mask, old_values.detach(), 0)
    returns = torch.where(mask, returns.detach(), 0)
    squares = (values - returns).square()
    if clip_eps is not None:
        clip_eps = checks.positive("clip_eps", clip_eps)
        clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
        squares = torch.maximum(squares, (clipped - returns).square())
    return factor * squares
