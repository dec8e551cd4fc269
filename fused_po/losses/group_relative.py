"""`grpo`: the GRPO family of losses, selected by the names of TRL's GRPO trainer.

    grpo, bnpo, dr_grpo, dapo, luspo, gspo: -min(min(rho, delta) A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)
    cispo: -sg(min(rho, epsilon_high)) A log pi        sapo, vespo, gmpo: the functions of these names

The losses of the first line differ in how tokens are reduced to the loss of a batch: `GRPO_MODES[loss_type]`, a mode of
`reduce.aggregate`. DeepSeekMath, arXiv:2402.03300, eq. 3 and 4; BNPO (batch normalized, TRL); Dr. GRPO,
arXiv:2503.20783; DAPO, arXiv:2503.14476. rho is always e^(log pi - log pi_old): with pi_old = sg(pi) its value is 1 and
its gradient is kept.

The KL estimate is k3, by default times rho, as in TRL 1.16 (DeepSeek-V3.2, arXiv:2512.02556), which makes its gradient
an unbiased one of the reverse KL. Gradients flow through this rho, so it matters at rho = 1 too. TRL's GMPO trainer
never multiplies by rho.

Differences from TRL: an argument that the loss_type does not use is an error; None selects the loss_type's own level
(luspo: "sequence"; TRL uses "token" and warns) and CISPO's cap of 5 (TRL uses epsilon's 0.2); rho is clamped, see
losses.policy.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses.divergence import kl_loss
from fused_po.losses.numerics import weighted
from fused_po.losses.policy import (
    Tokens,
    cispo_weight,
    clip_range,
    clipped_surrogate,
    importance_ratio,
    padded,
    ratio_bound,
    sequence_mean,
    soft_gate,
    tokens,
    unreduced,
)
from fused_po.losses.sequence_policy import gmpo, vespo_weight

# loss_type -> the mode of reduce.aggregate that reduces its token losses
GRPO_MODES: dict[str, str] = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "dapo": "token-mean",
    "luspo": "seq-mean-token-sum",
    "cispo": "token-mean",
    "sapo": "seq-mean-token-mean",
    "vespo": "token-mean",
    "gspo": "seq-mean-token-mean",
    "gmpo": "seq-mean-token-mean",
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo")
LEVELS = ("token", "sequence")


class Defaults(NamedTuple):
    """The value that a loss_type uses for an argument of None. None here: it does not have the argument."""

    epsilon: Optional[float] = None
    epsilon_high: Optional[float] = None  # None: epsilon
    level: Optional[str] = None


DEFAULTS = {
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo"), Defaults(0.2, None, "token")),
    "luspo": Defaults(0.2, None, "sequence"),
    "gspo": Defaults(3e-4, 4e-4, "sequence"),
    "gmpo": Defaults(0.4),
    "cispo": Defaults(None, 5.0, "token"),
    "sapo": Defaults(None, None, "token"),
    "vespo": Defaults(),
}
# loss_type -> {TRL's name of a setting: the argument of `soft_gate` or `vespo_weight`}
SETTINGS = {
    "sapo": {"sapo_temperature_pos": "temperature_pos", "sapo_temperature_neg": "temperature_neg"},
    "vespo": {f"vespo_{name}": name for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")},
}


class Plan(NamedTuple):
    """The checked arguments of a loss_type, with defaults filled in."""

    low: Optional[float]
    high: Optional[float]
    bound: Optional[float]
    level: Optional[str]
    settings: dict[str, float]


def _named(*loss_types: str) -> str:
    """Loss types as a condition in error messages."""
    return "loss_type " + ", ".join(map(repr, loss_types))


def plan(
    loss_type: str,
    epsilon: Optional[float],
    epsilon_high: Optional[float],
    delta: Optional[float],
    level: Optional[str],
    settings: dict,
) -> Plan:
    """Check the arguments of a loss_type and fill in its defaults. An argument that it does not use is an error."""
    checks.choice("loss_type", loss_type, GRPO_MODES)
    default = DEFAULTS[loss_type]
    takes_low, takes_high = default.epsilon is not None, default.epsilon is not None or loss_type == "cispo"
    checks.only_with("epsilon", epsilon, None, takes_low, _named(*CLIPPED, "gmpo"))
    checks.only_with("epsilon_high", epsilon_high, None, takes_high, _named(*CLIPPED, "gmpo", "cispo"))
    checks.only_with("delta", delta, None, loss_type in CLIPPED, _named(*CLIPPED))
    with_levels = tuple(name for name, defaults in DEFAULTS.items() if defaults.level)
    checks.only_with("importance_sampling_level", level, None, default.level is not None, _named(*with_levels))
    if level is not None:
        checks.choice("importance_sampling_level", level, LEVELS if loss_type != "gspo" else ("sequence",))
    known = SETTINGS.get(loss_type, {})
    for name, value in settings.items():
        if name not in known:
            raise ValueError(
                f"{name}: got {value}, not a setting of loss_type={loss_type!r}, which has "
                f"{', '.join(known) or 'none'}; leave it out"
            )
    own = {known[name]: value for name, value in settings.items()}
    high = default.epsilon_high if epsilon_high is None and epsilon is None else epsilon_high
    low = default.epsilon if epsilon is None else epsilon
    if loss_type in CLIPPED:
        low, high = clip_range(low, high)
    bound = ratio_bound(high, None, delta) if loss_type in CLIPPED else None
    return Plan(low, high, bound, level or default.level, own)


def ratio_of(t: Tokens, level: Optional[str], log_ratio_clamp: Optional[float]) -> Tensor:
    """The importance ratio at this level: [B, T] for tokens, [B, 1] for answers."""
    log_ratio = sequence_mean(t.log_ratio, t.mask) if level == "sequence" else t.log_ratio
    return importance_ratio(log_ratio, log_ratio_clamp)


def weight_like(weights: Tensor, mask: Tensor) -> Tensor:
    """Weights [B, T] or [B, 1], bool or floating, checked and detached; 0 where masked."""
    shapes = (tuple(mask.shape), tuple(mask[:, :1].shape))
    if tuple(checks.tensor("weights", weights).shape) not in shapes:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {shapes[0]} or {shapes[1]}")
    if weights.dtype != torch.bool:
        checks.floating("weights", weights)
    checks.same_device("weights", weights, mask.device)
    return torch.where(mask, weights.detach(), 0)


def reference_kl(t: Tokens, ref_logps: Tensor, ratio: Optional[Tensor]) -> Tensor:
    """[B, T]: k3 of each counted token, multiplied by the ratio unless it is None."""
    checks.same_shape(logps=t.logps, ref_logps=ref_logps)
    kl = kl_loss(t.logps, torch.where(t.mask, ref_logps, t.logps.detach()), "k3")
    return kl if ratio is None else weighted(ratio, kl)


def policy_term(t: Tokens, ratio: Tensor, loss_type: str, p: Plan, weights: Optional[Tensor]) -> Tensor:
    """The loss without the KL term, [B, T] or [B, 1]; not for gmpo."""
    if loss_type == "vespo":
        phi = vespo_weight(t.log_ratio, t.advantages, t.mask, weights, **p.settings)
        return -weighted(phi * t.advantages, t.logps)
    if loss_type == "cispo":
        return -weighted(cispo_weight(ratio, p.high, None, None) * t.advantages, t.logps)
    if loss_type == "sapo":
        return soft_gate(ratio, t.advantages, **p.settings)
    return clipped_surrogate(ratio, t.advantages, p.low, p.high, p.bound)


def grpo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logps: Optional[Tensor] = None,
    *,
    loss_type: str = "grpo",
    beta: float = 0.0,
    epsilon: Optional[float] = None,
    epsilon_high: Optional[float] = None,
    delta: Optional[float] = None,
    importance_sampling_level: Optional[str] = None,
    use_bias_correction_kl: bool = True,
    weights: Optional[Tensor] = None,
    log_ratio_clamp: Optional[float] = 20.0,
    **settings: float,
) -> Tensor:
    """Losses of the GRPO family by TRL's names: weights * (policy loss) + beta * KL; see the module docstring.

    Args:
        logps, old_logps, advantages, mask, log_ratio_clamp: see losses.policy. gmpo: advantages [B].
        ref_logps: [B, T], log-probs of the reference, without gradient; required if beta > 0, else it must be None.
        loss_type: a key of GRPO_MODES. beta: >= 0.
        epsilon, epsilon_high, delta: as for `ppo_clip`. Defaults: epsilon 0.2 (gspo 3e-4, gmpo 0.4), epsilon_high equal
            to epsilon (gspo 4e-4), no delta. cispo's epsilon_high is the cap on rho; gmpo's range is one of log rho.
        importance_sampling_level: "token" or "sequence" (rho from the mean log-ratio of the answer, as in GSPO).
        use_bias_correction_kl: whether the KL is multiplied by rho.
        weights: [B, T] or [B, 1], without gradient: `importance_weights`, or masks of answers or tokens. They multiply
            the policy loss, not the KL; with vespo, as in TRL, they enter its phi instead.
        settings: sapo_temperature_pos, sapo_temperature_neg of `sapo`; vespo_k_pos, vespo_lambda_pos, vespo_k_neg,
            vespo_lambda_neg of `vespo`.

    Returns:
        [B, T], unreduced; 0 where masked.
    """
    p = plan(loss_type, epsilon, epsilon_high, delta, importance_sampling_level, settings)
    beta = checks.number("beta", beta, "finite numbers >= 0", lambda v: v >= 0)
    if (ref_logps is None) if beta else (ref_logps is not None):  # not a comparison of booleans: beta may be symbolic
        got = "None" if ref_logps is None else "a tensor"
        raise ValueError(f"ref_logps: got {got} with beta={beta}, expected a tensor if beta > 0, else None")
    checks.flags(use_bias_correction_kl=use_bias_correction_kl)
    checks.only_with("use_bias_correction_kl", use_bias_correction_kl, True, beta > 0, "beta > 0")
    uses_ratio = beta > 0 or loss_type != "vespo"
    where = 'beta > 0 or a loss_type other than "vespo"'
    checks.only_with("log_ratio_clamp", log_ratio_clamp, 20.0, uses_ratio, where)
    t = tokens(logps, old_logps, advantages, mask)
    ratio = ratio_of(t, p.level, log_ratio_clamp)
    if loss_type == "gmpo":
        clips = {"epsilon": p.low, "epsilon_high": p.high, "log_ratio_clamp": log_ratio_clamp}
        losses = gmpo(logps, old_logps, advantages, mask, **clips)
    else:
        losses = policy_term(t, ratio, loss_type, p, weights)
    if weights is not None and loss_type != "vespo":
        losses = weighted(weight_like(weights, t.mask), losses)
    if ref_logps is not None:
        kl = reference_kl(t, padded("ref_logps", ref_logps), ratio if use_bias_correction_kl else None)
        losses = losses + beta * kl
    return unreduced(losses, t.mask)
