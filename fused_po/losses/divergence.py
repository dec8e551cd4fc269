"""KL divergence: estimates from log-probs of sampled tokens, exact forms, and where to use each of them.

With r = log pi - log pi_ref of tokens that pi sampled (Schulman 2020, "Approximating KL divergence"):

    k1 = r        k2 = r^2 / 2        k3 = e^-r - 1 + r        abs = |r|

- k1 is for the reward: reward - beta k1. As a loss, its expected gradient over the policy's own samples is zero.
- k2 is for the loss: on-policy, its gradient is that of the reverse KL(pi || pi_ref), as with k1 in the reward.
  k2, k3 and abs are >= 0; in the reward they can only lower the probabilities of sampled tokens.
- k3's value is an unbiased estimate with lower variance. As a loss, its gradient equals k2's to first order in r and is
  biased where the policies differ.
- With samples from an older policy, k times pi / pi_old estimates the KL of pi, in value and gradient.

(tests/losses/test_divergence.py verifies each statement by enumeration.)
"""

from __future__ import annotations

import math
import warnings
from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.losses.numerics import k3_estimate, saturating_expm1, weighted
from fused_po.losses.pairwise import dpo

# Names in other packages. verl: kl, mse, low_var_kl, abs; verl and OpenRLHF: k1, k2, k3.
ESTIMATORS = {"k1": "k1", "kl": "k1", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3", "abs": "abs"}
_warned: set[str] = set()


def _warn_once(key: str, message: str) -> None:
    if key not in _warned and not torch.compiler.is_compiling():
        _warned.add(key)
        warnings.warn(message, UserWarning, stacklevel=3)


def _estimator(name: object) -> str:
    """k1, k2, k3 or abs for any of the names in ESTIMATORS."""
    if name == "full":
        raise ValueError(
            "estimator: got 'full', but the exact KL needs whole distributions, not log-probs of sampled tokens: use "
            f"losses.categorical_kl; allowed are {', '.join(map(repr, ESTIMATORS))}"
        )
    checks.choice("estimator", name, ESTIMATORS)
    return ESTIMATORS[str(name)]


def _estimate(r: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return r
    if estimator == "k2":
        return 0.5 * r * r
    if estimator == "abs":
        return r.abs()
    return k3_estimate(r)


def _log_ratio(logps: Tensor, ref_logps: Tensor, clamp: Optional[float]) -> Tensor:
    checks.same_shape(logps=logps, ref_logps=ref_logps)
    r = logps - ref_logps.detach()
    return r if clamp is None else r.clamp(-checks.positive("clamp", clamp), clamp)


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str = "k3", *, clamp: Optional[float] = None) -> Tensor:
    """The KL estimate of each token for logging: no gradient, and no warning about the choice of estimator.

    Arguments and formulas are those of `kl_loss`.
    """
    return _estimate(_log_ratio(logps, ref_logps, clamp).detach(), _estimator(estimator))


def kl_loss(
    logps: Tensor,
    ref_logps: Tensor,
    estimator: str = "k3",
    *,
    old_logps: Optional[Tensor] = None,
    straight_through: bool = False,
    clamp: Optional[float] = None,
) -> Tensor:
    """The KL estimate of each token as a loss term; the module docstring describes the estimators.

    On-policy, the gradient of k2 is that of the KL. k1 warns once: its expected gradient is zero. k3 continues along
    its tangent below r = -20, so that it stays finite; verl clamps r to [-20, 20] (and the result to [-10, 10]), which
    has no gradient there: pass `clamp` for that.

    Args:
        logps: [...], log-probs of the policy. ref_logps: [...], log-probs of the reference, without gradient.
        estimator: "k1" ("kl"), "k2" ("mse"), "k3" ("low_var_kl") or "abs".
        old_logps: [...], log-probs of the policy that sampled, or None. Multiplies the estimate by pi / pi_old, through
            which gradients flow: DeepSeek-V3.2's unbiased estimate, TRL's use_bias_correction_kl.
        straight_through: use the estimator's value with the gradient of k2 (verl's "k1+", "k3+"); the factor pi /
            pi_old then has no gradient.
        clamp: the largest |r|, or None.

    Returns:
        [...], unreduced.
    """
    kind = _estimator(estimator)
    checks.flags(straight_through=straight_through)
    if kind == "k1" and not straight_through and old_logps is None:
        _warn_once(
            "k1 as a loss",
            "fused_po: k1 as a loss has an expected gradient of zero over the policy's own samples; use 'k2' for the "
            "gradient of the reverse KL, or put k1 into the reward (losses.kl_in_reward)",
        )
    r = _log_ratio(logps, ref_logps, clamp)
    kl = _estimate(r, kind)
    if straight_through:
        kl = kl.detach() + (_estimate(r, "k2") - _estimate(r, "k2").detach())
    if old_logps is None:
        return kl
    checks.same_shape(logps=logps, old_logps=old_logps)
    ratio = saturating_expm1(logps - old_logps.detach()) + 1
    return weighted(ratio.detach() if straight_through else ratio, kl)


def kl_in_reward(
    rewards: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    *,
    beta: float,
    estimator: str = "k1",
    clamp: Optional[float] = None,
) -> Tensor:
    """Per-token rewards minus the KL penalty: reward_t - beta k_t, without gradient.

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2. Use k1 here: the policy gradient for the reward -k1 is that of the
    reverse KL. Estimators that are never negative warn once. OpenRLHF clamps its estimates to [-10, 10]; `clamp` clamps
    r.

    Args:
        rewards: [B], added at the last counted token of each answer, or [B, T]. logps, ref_logps: [B, T].
        mask: [B, T], True where a token counts; masked tokens give 0.
        beta: >= 0. estimator, clamp: as for `kl_loss`.

    Returns:
        [B, T], without gradient.
    """
    kind = _estimator(estimator)
    if kind != "k1":
        _warn_once(
            f"{kind} as a reward",
            f"fused_po: {kind} is never negative; in the reward it can only lower the probabilities of the sampled "
            "tokens, even where the policy is below the reference; use k1 in rewards",
        )
    beta = checks.number("beta", beta, "finite numbers >= 0", lambda v: v >= 0)
    r = _log_ratio(logps, ref_logps, clamp).detach()
    mask = checks.mask_like("mask", mask, logps, "logps")
    checks.same_device("rewards", checks.floating("rewards", rewards), logps.device)
    penalty = torch.where(mask, weighted(beta, _estimate(r, kind)), 0)
    if rewards.shape == logps.shape:
        return torch.where(mask, rewards.detach(), 0) - penalty
    if rewards.shape != logps.shape[:1]:
        expected = f"{tuple(logps.shape[:1])} or {tuple(logps.shape)}"
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected {expected}")
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(last, rewards.detach()[:, None], 0) - penalty


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) of whole distributions [..., V] -> [...], in nats, with gradients to both.

    Both must be normalized. -inf in log_p counts as 0; -inf in log_q where p > 0 gives inf. Do not use it for large
    batches with a whole vocabulary: it keeps three tensors of the input's size for the backward.
    """
    checks.same_shape(log_p=log_p, log_q=log_q)
    counted = log_p > -torch.inf
    difference = torch.where(counted, log_p, 0) - torch.where(counted, log_q, 0)
    return (log_p.exp() * difference).sum(-1)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """The generalized Jensen-Shannon divergence for on-policy distillation, between softmax(logits / temperature):

        beta KL(teacher || m) + (1 - beta) KL(student || m),  m = beta teacher + (1 - beta) student

    Agarwal et al. 2023, arXiv:2306.13649, eq. 1. beta = 0 is KL(teacher || student) and beta = 1 is KL(student ||
    teacher), as in TRL's GKD and Liger. This is plain PyTorch, for small logits or logits that exist anyway. The fused
    versions are `kl_from_logits` and `linear_kl` with direction="js" and js_weight=beta, or "forward" for beta = 0 and
    "reverse" for beta = 1.

    Args:
        student_logits, teacher_logits: [..., V]; gradients flow to the student's. beta: in [0, 1]. temperature: > 0.

    Returns:
        [...], in nats, unreduced.
    """
    checks.same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    beta = checks.number("beta", beta, "0 <= beta <= 1", lambda v: 0 <= v <= 1)
    temperature = checks.positive("temperature", temperature)
    log_p = (student_logits / temperature).log_softmax(-1)
    log_q = (teacher_logits.detach() / temperature).log_softmax(-1)
    if beta in (0, 1):
        return categorical_kl(log_q, log_p) if beta == 0 else categorical_kl(log_p, log_q)
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)  # logaddexp has a NaN gradient there
    p, q = log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0)
    log_m = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    return beta * categorical_kl(log_q, log_m) + (1 - beta) * categorical_kl(log_p, log_m)


def gaussian_kl(mean_p: Tensor, mean_q: Tensor, std_p: float | Tensor, std_q: float | Tensor) -> Tensor:
    """KL(p || q) between isotropic Gaussians in k dimensions:

        k (ln(std_q / std_p) + std_p^2 / (2 std_q^2) - 1/2) + |mean_p - mean_q|^2 / (2 std_q^2)

    Args:
        mean_p, mean_q: [..., k]. std_p, std_q: > 0, numbers or [...].

    Returns:
        [...], in nats, with gradients to all.
    """
    checks.same_shape(mean_p=mean_p, mean_q=mean_q)
    if mean_p.ndim == 0:
        raise ValueError("mean_p: got a 0-dim tensor, expected [..., k], means in k dimensions")
    squares = (mean_p - mean_q).square().sum(-1)
    for name, std in (("std_p", std_p), ("std_q", std_q)):
        checks.positive_like(name, std, squares, "the means without the last dimension")
    std_p, std_q = (torch.as_tensor(std, dtype=squares.dtype, device=squares.device) for std in (std_p, std_q))
    of_std = torch.log(std_q / std_p) + 0.5 * (std_p / std_q).square() - 0.5
    return mean_p.shape[-1] * of_std + squares / (2 * std_q.square())


def diffusion_dpo(
    chosen_kl: Tensor, rejected_kl: Tensor, ref_chosen_kl: Tensor, ref_rejected_kl: Tensor, *, beta: float = 5000.0
) -> Tensor:
    """Diffusion-DPO: L = -log s(-beta [(chosen_kl - ref_chosen_kl) - (rejected_kl - ref_rejected_kl)]).

    Each argument is KL(q || p) for one denoising step, between the posterior q(x_{t-1} | x_t, x_0) and the model's
    p(x_{t-1} | x_t): the `gaussian_kl` of their means. With equal variances this is a weight times |noise - predicted
    noise|^2, the form of Wallace et al. 2023, arXiv:2311.12908, eq. 14; beta includes the number of steps T.

    Args:
        chosen_kl, rejected_kl, ref_chosen_kl, ref_rejected_kl: [B], >= 0, of the model and the reference. beta: > 0.
    """
    checks.per_sequence(
        chosen_kl=chosen_kl, rejected_kl=rejected_kl, ref_chosen_kl=ref_chosen_kl, ref_rejected_kl=ref_rejected_kl
    )
    return dpo(-chosen_kl, -rejected_kl, -ref_chosen_kl, -ref_rejected_kl, beta=beta)


def _check_update(current_kl: float, n_steps: int) -> None:
    checks.number("current_kl", current_kl, "finite numbers", lambda v: True)
    checks.number("n_steps", n_steps, "finite numbers >= 0", lambda v: v >= 0)


class FixedKLController:
    """A constant KL coefficient with the interface of `AdaptiveKLController`."""

    def __init__(self, kl_coef: float) -> None:
        self.value = checks.number("kl_coef", kl_coef, "finite numbers >= 0", lambda v: v >= 0)

    def update(self, current_kl: float, n_steps: int) -> None:
        """Check the arguments and change nothing."""
        _check_update(current_kl, n_steps)


class AdaptiveKLController:
    """A KL coefficient that is adapted to a target KL:

        value *= 1 + clip((KL - target) / target, -0.2, 0.2) n_steps / horizon

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2. Names as in verl.

    Args:
        init_kl_coef: > 0. target_kl: > 0, in the unit of the KL passed to `update`, for example nats per answer.
        horizon: > 0, in samples.
    """

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: float) -> None:
        self.value = checks.positive("init_kl_coef", init_kl_coef)
        self.target = checks.positive("target_kl", target_kl)
        self.horizon = checks.positive("horizon", horizon)

    def update(self, current_kl: float, n_steps: int) -> None:
        """Update the coefficient with the KL of `n_steps` samples, a Python number: sync once per step to get it."""
        _check_update(current_kl, n_steps)
        error = current_kl / self.target - 1
        self.value *= 1 + min(max(error, -0.2), 0.2) * n_steps / self.horizon
