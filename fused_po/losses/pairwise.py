"""Losses of a chosen and a rejected answer relative to a reference policy.

All take sequence log-probs [B] in nats, `chosen, rejected, ref_chosen, ref_rejected`, and return [B], unreduced. Below,
s is the sigmoid, `w = chosen - ref_chosen` and `l = rejected - ref_rejected` are the log-ratios, and `beta * w` and
`beta * l` the implicit rewards. A reference of None means log-prob 0. References never get gradients. `beta` is the
strength of the KL constraint: a number > 0, or [B], one per pair. `sequence_logps(..., average=)` gives the sums or
means over tokens, and with `ld_alpha` LD-DPO's log-probs.

For another f-divergence pass `f_divergence_score(chosen, ref_chosen, ...)` as `chosen`, the same for `rejected`, and no
reference. This is valid only for losses of the difference w - l.
"""

from __future__ import annotations

import math
from typing import Optional, Union

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_po import checks
from fused_po.losses.numerics import saturating_expm1, weighted
from fused_po.losses.reward import plackett_luce

Beta = Union[float, Tensor]
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def log_ratios(
    chosen: Tensor, rejected: Tensor, ref_chosen: Optional[Tensor] = None, ref_rejected: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """Check the shapes and return (w, l), with the references detached."""
    references = checks.not_none(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    checks.per_sequence(chosen=chosen, rejected=rejected, **references)
    w = chosen if ref_chosen is None else chosen - ref_chosen.detach()
    l = rejected if ref_rejected is None else rejected - ref_rejected.detach()
    return w, l


def smoothing(value: object) -> float:
    """Return `value` if it is a label smoothing in [0, 0.5)."""
    return checks.number("label_smoothing", value, "0 <= label_smoothing < 0.5", lambda v: 0 <= v < 0.5)


def smoothed_logistic(h: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(h) - e log s(-h), without overflow."""
    if label_smoothing == 0:
        return -logsigmoid(h)
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def f_divergence_score(
    logps: Tensor, ref_logps: Optional[Tensor] = None, divergence: str = "reverse_kl", *, alpha: float = 0.5
) -> Tensor:
    """The score that replaces the log-ratio r = logps - ref_logps for another divergence: f'(e^r) minus a constant.

        reverse_kl           r                                  forward_kl    1 - e^-r
        alpha_divergence     (e^((alpha - 1) r) - 1) / (alpha - 1)
        js_divergence        log 2 + log s(r)

    f-DPO: Wang et al. 2023, arXiv:2309.16240, table 1; the paper's alpha is 1 minus this one. The names correspond to
    TRL's f_divergence_type and f_alpha_divergence_coef. TRL clamps the exponent at 80; here it continues along its
    tangent beyond 20, with a gradient. alpha = 1 is reverse_kl, alpha = 0 is forward_kl.

    Args:
        logps, ref_logps: [B], or any shape. divergence: one of F_DIVERGENCES. alpha: used by "alpha_divergence".
    """
    checks.choice("divergence", divergence, F_DIVERGENCES)
    checks.same_shape(logps=logps, **checks.not_none(ref_logps=ref_logps))
    checks.number("alpha", alpha, "finite numbers", lambda v: True)
    r = logps if ref_logps is None else logps - ref_logps.detach()
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(r)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(divergence, alpha - 1)
    return r if abs(power) < 1e-6 else saturating_expm1(power * r) / power


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
    label_smoothing: float = 0.0,
    margin: Beta = 0.0,
) -> Tensor:
    """DPO's sigmoid loss.

    L = -(1 - e) log s(h) - e log s(-h),  h = beta (w - l) - margin

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7. e is the assumed share of flipped preferences: cDPO (Mitchell 2023),
    as in OpenRLHF and torchtune; TRL's "sigmoid" has no smoothing. The margin is that of ODPO (Amini et al. 2024,
    arXiv:2402.10571).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [B], see the module docstring. beta: > 0, a number or [B].
        label_smoothing: e, in [0, 0.5).
        margin: how much larger the chosen answer's reward should be, a number or [B].
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    h = checks.positive_like("beta", beta, w, "chosen") * (w - l)
    if isinstance(margin, Tensor):
        checks.same_shape(chosen=chosen, margin=margin)
        h = h - margin.detach()
    elif margin != 0:
        h = h - checks.number("margin", margin, "finite numbers", lambda v: True)
    return smoothed_logistic(h, smoothing(label_smoothing))


def robust_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Robust DPO: an unbiased estimate of DPO's loss when preferences are flipped with probability e.

    L = [-(1 - e) log s(h) + e log s(-h)] / (1 - 2e),  h = beta (w - l)

    Chowdhury et al. 2024, arXiv:2403.00409; TRL's and Liger's "robust". It may be negative and has no lower bound for
    e > 0.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [B]. beta: > 0, a number or [B].
        label_smoothing: e, the share of flipped preferences, in [0, 0.5).
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    e = smoothing(label_smoothing)
    h = checks.positive_like("beta", beta, w, "chosen") * (w - l)
    return (-(1 - e) * logsigmoid(h) + weighted(e, logsigmoid(-h))) / (1 - 2 * e)


def hinge(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """SLiC's hinge loss on the implicit rewards: L = max(0, 1 - beta (w - l)).

    Zhao et al. 2023, arXiv:2305.10425, section 2, normalized by the reference as in RSO (Liu et al. 2023,
    arXiv:2309.06657, eq. 10). TRL's "hinge"; beta is the reciprocal of the paper's margin.
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    gap = 1 - checks.positive_like("beta", beta, w, "chosen") * (w - l)
    return torch.where(gap <= 0, 0, gap)  # not relu: its backward reads the result, which callers may modify in place


def lengths_of(chosen_length: Optional[Tensor], rejected_length: Optional[Tensor], like: Tensor) -> tuple:
    """Both lengths as divisors >= 1 in the dtype of `like`."""
    if chosen_length is None or rejected_length is None:
        raise ValueError("chosen_length, rejected_length: got None; pass both, the number of tokens of each answer [B]")
    lengths = []
    for name, value in (("chosen_length", chosen_length), ("rejected_length", rejected_length)):
        if checks.tensor(name, value).shape != like.shape:
            expected = f"{tuple(like.shape)}, the shape of chosen"
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}")
        lengths.append(value.to(like).clamp(min=1))
    return tuple(lengths)


def ipo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
    chosen_length: Optional[Tensor] = None,
    rejected_length: Optional[Tensor] = None,
) -> Tensor:
    """IPO: L = (w - l - 1 / (2 beta))^2, or with lengths (w / chosen_length - l / rejected_length - 1 / (2 beta))^2.

    Azar et al. 2023, arXiv:2310.12036, eq. 17; beta is the paper's tau. Without lengths it uses sums, as in the paper
    and OpenRLHF; TRL divides by the lengths.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [B]. beta: > 0, a number or [B].
        chosen_length, rejected_length: [B], numbers of answer tokens; both or neither.
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    beta = checks.positive_like("beta", beta, w, "chosen")
    if chosen_length is not None or rejected_length is not None:
        chosen_length, rejected_length = lengths_of(chosen_length, rejected_length, w)
        w, l = w / chosen_length, l / rejected_length
    return (w - l - 1 / (2 * beta)).square()


def sigmoid_norm(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: Beta = 0.1,
) -> Tensor:
    """Length-normalized DPO: L = -log s(beta (w / chosen_length - l / rejected_length)).

    Lambert et al. 2024, Tulu 3, arXiv:2411.15124, eq. 6. TRL's "sigmoid_norm".
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    chosen_length, rejected_length = lengths_of(chosen_length, rejected_length, w)
    beta = checks.positive_like("beta", beta, w, "chosen")
    return -logsigmoid(beta * (w / chosen_length - l / rejected_length))


def exo_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """EXO for pairs, the reverse KL from (s(h), s(-h)) to (1 - e, e):

    L = s(h) [log s(h) - log(1 - e)] + s(-h) [log s(-h) - log e],  h = beta (w - l)

    Ji et al. 2024, arXiv:2402.00856, eq. 16, with e = 1e-3. e = 0 would be an infinite loss; it is an error, as in TRL.
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    allowed = "0 < label_smoothing < 0.5 (the paper uses 1e-3)"
    e = checks.number("label_smoothing", label_smoothing, allowed, lambda v: 0 < v < 0.5)
    h = checks.positive_like("beta", beta, w, "chosen") * (w - l)
    chosen_term = weighted(torch.sigmoid(h), logsigmoid(h) - math.log1p(-e))
    return chosen_term + weighted(torch.sigmoid(-h), logsigmoid(-h) - math.log(e))


def discopop(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
    tau: float = 0.05,
) -> Tensor:
    """DiscoPOP's log-ratio modulated loss: L = -(1 - m) log s(h) + m e^-h,  m = s(h / tau),  h = beta (w - l).

    Lu et al. 2024, arXiv:2406.08414, eq. 5, with tau = 0.05; TRL's discopop_tau. Where e^-h is large and m is small,
    their product is computed from logarithms. For tau > 1 the product is unbounded.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [B]. beta: > 0, a number or [B]. tau: in (0, 1].
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    tau = checks.number("tau", tau, "0 < tau <= 1", lambda v: 0 < v <= 1)
    h = checks.positive_like("beta", beta, w, "chosen") * (w - l)
    m, log_sigmoid = torch.sigmoid(h / tau), logsigmoid(h)
    above, finite = h.clamp(min=-10), h.clamp(min=torch.finfo(h.dtype).min)
    near = m * (torch.exp(-above) + logsigmoid(above))  # one factor m, so its two gradient terms cancel before rounding
    far = torch.exp(logsigmoid(finite / tau) - finite) + weighted(m, log_sigmoid)
    return torch.where(h < -10, far, near) - log_sigmoid


def dpop(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.3,
    penalty: float = 50.0,
) -> Tensor:
    """DPO-Positive: L = -log s(beta (w - l - penalty max(0, -w))). It penalizes falling log-probs of chosen answers.

    Pal et al. 2024 (Smaug), arXiv:2402.13228, eq. 3, with the paper's lambda = 50 and beta = 0.3 as defaults.
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    penalty = checks.number("penalty", penalty, "finite numbers >= 0", lambda v: v >= 0)
    return -logsigmoid(checks.positive_like("beta", beta, w, "chosen") * (w - l - weighted(penalty, torch.relu(-w))))


def rpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    chosen_length: Tensor,
    beta: Beta = 0.1,
    alpha: float = 1.0,
) -> Tensor:
    """RPO: DPO plus alpha times the chosen answer's NLL per token, L = -log s(beta (w - l)) - alpha chosen / length.

    Pang et al. 2024 (Iterative RPO), arXiv:2404.19733, eq. 1. In TRL it is the mixture ["sigmoid", "sft"], with the NLL
    averaged over all tokens of the batch: `preference_loss` has that.
    """
    alpha = checks.number("alpha", alpha, "finite numbers >= 0", lambda v: v >= 0)
    loss = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    return loss - weighted(alpha, chosen) / lengths_of(chosen_length, chosen_length, chosen)[0]


def tdpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor],
    ref_rejected: Optional[Tensor],
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: Beta = 0.1,
    alpha: Optional[float] = 0.5,
) -> Tensor:
    """Token-level DPO, with the sequence KL divergences from the reference:

        TDPO1 (alpha None)    L = -log s(beta (w - l) - beta (rejected_kl - chosen_kl))
        TDPO2                 L = -log s(beta (w - l) - alpha beta (rejected_kl - sg(chosen_kl)))

    Zeng et al. 2024, arXiv:2404.11999; sg stops the gradient; alpha = 0.5 is the default of the paper's code.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [B]. beta: > 0, a number or [B].
        chosen_kl, rejected_kl: [B], the exact KL(pi_ref || pi) of each token, summed over the answer.
        alpha: >= 0, or None.
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    checks.same_shape(chosen=chosen, chosen_kl=chosen_kl, rejected_kl=rejected_kl)
    if alpha is None:
        shift = rejected_kl - chosen_kl
    else:
        alpha = checks.number("alpha", alpha, "finite numbers >= 0, or None", lambda v: v >= 0)
        shift = weighted(alpha, rejected_kl - chosen_kl.detach())
    return -logsigmoid(checks.positive_like("beta", beta, w, "chosen") * (w - l - shift))


def plackett_luce_dpo(
    logps: Tensor, ref_logps: Optional[Tensor] = None, mask: Optional[Tensor] = None, *, beta: float = 0.1
) -> Tensor:
    """DPO for rankings: `plackett_luce` on the implicit rewards beta (logps - ref_logps), the best answer first.

    Rafailov et al. 2023, arXiv:2305.18290, appendix A.3, eq. 20. Lists of two answers give `dpo`.

    Args:
        logps, ref_logps: [B, K], in the order of the ranking; a reference of None means 0. beta: > 0.
        mask: [B, K], True where there is an answer, for lists of unequal lengths. None: everywhere.

    Returns:
        [B], unreduced.
    """
    checks.same_shape(logps=logps, **checks.not_none(ref_logps=ref_logps))
    if logps.ndim != 2:
        raise ValueError(f"logps: got shape {tuple(logps.shape)}, expected [B, K], the best answer first")
    ratios = logps if ref_logps is None else logps - ref_logps.detach()
    return plackett_luce(checks.positive("beta", beta) * ratios, mask)


def wpo_weights(logps: Tensor, mask: Tensor, log_sum_sq_probs: Optional[Tensor] = None) -> Tensor:
    """WPO's weight of each pair: the product of exp(mean log-prob) of both answers under the policy.

    Zhou et al. 2024, arXiv:2406.11827, eq. 2. With `log_sum_sq_probs` (an output of `linear_logps`) each token's
    probability is divided by sum_v p_v^2, the expected probability of a token that the policy samples: the paper's
    sampled alignment, as in TRL. Multiply a loss of pairs by it; not AOT, whose losses do not belong to pairs.

    Args:
        logps: [2B, T], chosen answers first. mask: [2B, T], True where a token counts.
        log_sum_sq_probs: [2B, T].

    Returns:
        [B], without gradient.
    """
    checks.same_shape(logps=logps, **checks.not_none(log_sum_sq_probs=log_sum_sq_probs))
    if logps.ndim != 2 or len(logps) % 2:
        raise ValueError(f"logps: got shape {tuple(logps.shape)}, expected [2B, T], the chosen answers first")
    mask = checks.mask_like("mask", mask, logps, "logps")
    aligned = (logps if log_sum_sq_probs is None else logps - log_sum_sq_probs).detach()
    means = torch.where(mask, aligned, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    chosen, rejected = means.chunk(2)
    return (chosen + rejected).exp()
