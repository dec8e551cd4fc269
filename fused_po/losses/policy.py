"""Policy-gradient losses of tokens, [B, T], unreduced; `reduce.aggregate` makes a number of them.

All take `logps, old_logps, advantages, mask`: log-probs [B, T] of the tokens under the policy and under the one whose
ratio the loss takes; advantages, [B] (one an answer) or [B, T]; the mask, [B, T], non-zero where a token counts. Masked
positions may hold anything, NaN too, and give exactly 0; an answer without counted tokens contributes 0. Gradients
flow to logps alone. Log-probs in fp32 or float64.

With rho = pi / pi_old: `log_ratio_clamp` is the largest |log rho| that is exponentiated, 20 as in verl, and what lies
beyond gets no gradient. None: rho goes on along its tangent beyond e^20, finite and never without a gradient. TRL and
OpenRLHF have no clamp and overflow.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses.numerics import weighed


class Tokens(NamedTuple):
    """A checked batch: 0 wherever nothing counts."""

    logps: Tensor  # [B, T]
    log_ratio: Tensor  # [B, T], log pi - log pi_old
    advantages: Tensor  # [B, T], or [B, 1] of one an answer; constants
    mask: Tensor  # [B, T], bool


def padded(name: str, value: object) -> Tensor:
    """`value` if it is a floating tensor [B, T]."""
    if checks.floating(name, value).ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [B, T]")
    return value


def broadcast_advantages(advantages: object, mask: Tensor, *, per_sequence: bool = False) -> Tensor:
    """Advantages [B] as [B, 1], or [B, T] as they are; constants, 0 where nothing counts."""
    checks.same_device("advantages", checks.floating("advantages", advantages), mask.device)
    counted, shape = mask, tuple(advantages.shape)
    if shape == tuple(mask.shape[:1]):
        counted, advantages = mask.any(-1, keepdim=True), advantages[:, None]
    elif shape != tuple(mask.shape) or per_sequence:
        expected = "" if per_sequence else f" or {tuple(mask.shape)}, that of logps"
        raise ValueError(f"advantages: got shape {shape}, expected {tuple(mask.shape[:1])}, one an answer{expected}")
    checks.finite("advantages", advantages, counted)
    return torch.where(counted, advantages.detach(), 0)


def tokens(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, per_sequence: bool = False) -> Tokens:
    """Check a batch and put zeros where nothing counts."""
    checks.alike(logps=padded("logps", logps), old_logps=old_logps)
    mask = checks.mask_like("mask", mask, logps, "logps")
    advantages = broadcast_advantages(advantages, mask, per_sequence=per_sequence)
    logps, old_logps = torch.where(mask, logps, 0), torch.where(mask, old_logps.detach(), 0)
    return Tokens(logps, logps - old_logps, advantages, mask)


def unreduced(losses: Tensor, mask: Tensor) -> Tensor:
    """[B, T] of losses [B, T] or [B, 1]: each counted token holds its own or its answer's, the others 0."""
    return torch.where(mask, losses, 0)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 1], the mean over an answer's counted tokens of values that are 0 elsewhere; 0 without any."""
    return values.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def importance_ratio(log_ratio: Tensor, log_ratio_clamp: Optional[float]) -> Tensor:
    """e^log_ratio, clamped or, for None, along its tangent beyond e^20."""
    if log_ratio_clamp is not None:
        allowed = "numbers in (0, 80], or None"
        clamp = checks.number("log_ratio_clamp", log_ratio_clamp, allowed, lambda v: 0 < v <= 80)
        return log_ratio.clamp(-clamp, clamp).exp()
    inside = log_ratio.clamp(max=20.0)
    ratio = inside.exp()
    return ratio + ratio.detach() * torch.relu(log_ratio - 20.0)


def clip_range(epsilon: float, epsilon_high: Optional[float]) -> tuple[float, float]:
    """(epsilon, epsilon_high), the latter epsilon where it is None."""
    epsilon = checks.number("epsilon", epsilon, "numbers in (0, 1]", lambda v: 0 < v <= 1)
    return epsilon, epsilon if epsilon_high is None else checks.positive("epsilon_high", epsilon_high)


def ratio_bound(epsilon_high: float, dual_clip: Optional[float], delta: Optional[float]) -> Optional[float]:
    """The bound of the ratio where the advantage is negative, under either of its names."""
    if dual_clip is not None and delta is not None:
        raise ValueError(f"delta: got {delta} beside dual_clip {dual_clip}; they are one bound under two names")
    if dual_clip is not None:
        return checks.number("dual_clip", dual_clip, "numbers > 1", lambda v: v > 1)
    if delta is not None:
        least = 1 + epsilon_high
        return checks.number("delta", delta, "numbers > 1 + epsilon_high = {}", lambda v: v > least, least)
    return None


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float, bound: Optional[float]) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), no more than -bound A where A < 0."""
    objective = torch.minimum(weighed(advantages, ratio), ratio.clamp(1 - low, 1 + high) * advantages)
    if bound is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, bound * advantages), objective)
    return -objective


def reinforce(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """L = -A log pi: the policy gradient of tokens that the policy itself sampled.

    Williams 1992, "Simple statistical gradient-following algorithms", with the baseline in A. Samples of an
    older policy need its ratio: `ppo_clip`, or weights of `importance_weights` times this. REINFORCE++
    (arXiv:2501.03262) is `ppo_clip` with its own advantages, RLOO is `rloo`. verl's gpg agrees.

    Args:
        logps: [B, T]. advantages: [B] or [B, T], constants. mask: [B, T].

    Returns:
        [B, T], unreduced.
    """
    t = tokens(logps, logps, advantages, mask)
    return unreduced(-weighed(t.advantages, t.logps), t.mask)


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

        L = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A),  and where A < 0 at most -c A

    Schulman et al. 2017, arXiv:1707.06347, eq. 7. epsilon_high above epsilon is DAPO's clip-higher (arXiv:2503.14476,
    eq. 10). c is dual-clip PPO's (arXiv:1912.09729; verl's clip_ratio_c, always on there, 3.0; OpenRLHF's
    dual_clip) and, as a cap on rho above the clip range, INTELLECT-2's two-sided delta (arXiv:2505.07291; TRL): one
    bound under two names, of which delta must lie above 1 + epsilon_high.

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see the module.
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
    """The clipped ratio as a constant."""
    if (cap is None) == (epsilon_high is None):
        got = f"cap {cap} and epsilon_high {epsilon_high}"
        raise ValueError(f"cap: got {got}, expected one: cap bounds rho itself (TRL), epsilon_high rho - 1 (verl)")
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
    """CISPO: L = -sg(clip(rho)) A log pi. The ratio is a weight, clipped; every token keeps a gradient.

    MiniMax-M1, arXiv:2506.13585, eq. 4 and 5, which tunes the upper end alone. TRL: clip(rho) = min(rho, cap), and
    calls the cap epsilon_high (5.0 in ScaleRL, arXiv:2510.13786; TRL's default is the 0.2 of PPO). verl: clip(rho,
    1 - epsilon, 1 + epsilon_high).

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see the module.
        cap: > 0, of rho itself; or
        epsilon_high: > 0, of rho - 1, and with it epsilon: in (0, 1]; None: no lower end.

    Returns:
        [B, T], unreduced.
    """
    t = tokens(logps, old_logps, advantages, mask)
    weight = cispo_weight(importance_ratio(t.log_ratio, log_ratio_clamp), cap, epsilon, epsilon_high)
    return unreduced(-weighed(weight * t.advantages, t.logps), t.mask)


def soft_gate(ratio: Tensor, advantages: Tensor, temperature_pos: float = 1.0, temperature_neg: float = 1.05) -> Tensor:
    """-(4 / tau) s(tau (rho - 1)) A."""
    pos, neg = checks.positive("temperature_pos", temperature_pos), checks.positive("temperature_neg", temperature_neg)
    tau = torch.where(advantages > 0, pos, torch.full_like(advantages, neg))  # of two numbers it would be fp32
    gate = torch.nn.functional.logsigmoid(tau * (ratio - 1)).exp()  # the sigmoid's own slope, s (1 - s), cancels near 1
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
    """SAPO: L = -(4 / tau) s(tau (rho - 1)) A, s the sigmoid: a soft gate where PPO clips; its slope at rho = 1 is A.

    Gao et al. 2025, arXiv:2511.20347, eq. 5 and 6. TRL, verl and Liger agree.

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see the module.
        temperature_pos: tau > 0 where A > 0. temperature_neg: tau > 0 elsewhere; larger closes the gate sooner.

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
    """The critic's loss, PPO's with a clip.

        L = factor max((v - R)^2, (v_old + clip(v - v_old, -clip_eps, clip_eps) - R)^2)

    Schulman et al. 2017, arXiv:1707.06347, eq. 9 has (v - R)^2, factor 1; the clip is that of OpenAI's baselines.
    factor 0.5: OpenRLHF's ValueLoss, verl, TRL's PPO. OpenRLHF clips only if told to, verl at 0.5 by default.

    Args:
        values: [B, T], the critic's. old_values: [B, T], those at sampling. returns: [B, T]. Constants but for values.
        mask: [B, T]. clip_eps: > 0, or None for no clip (old_values is then not used, and may be values).
        factor: > 0.

    Returns:
        [B, T], unreduced; 0 where masked.
    """
    checks.alike(values=padded("values", values), old_values=old_values, returns=returns)
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
