"""Policy-gradient losses of tokens: from rows of logits to losses, and on to the gradient in the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.backend.interface import LOGPS_AND_ENTROPY, Form, PolicyRow, TokenInputs
from fused_po.reference.dpo import kl_estimate, times
from fused_po.reference.gradient import gradient
from fused_po.reference.statistics import statistics

LOG_RATIO_CLAMP = 20.0


def policy_term(logp: Tensor, ratio: Tensor, slope: Tensor, a: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its derivative in the log-prob, clipped) without KL and entropy; slope is that of the ratio."""
    if form.kind != "gate":
        negative, minus_a = a < 0, -a
        above, below = (ratio > form.high).logical_and_(a > 0), (ratio < form.low).logical_and_(negative)
        clipped = above.to(logp.dtype).sub_(below.to(logp.dtype))
    if form.kind == "clip":
        held = torch.where(above, form.high, torch.where(below, form.low, ratio))
        flat = above.logical_or_(below)
        if form.bound != float("inf"):
            bounded = (ratio > form.bound).logical_and_(negative)
            held, flat = torch.where(bounded, form.bound, held), flat.logical_or_(bounded)
        return minus_a * held, torch.where(flat, 0, minus_a * slope), clipped
    if form.kind == "weight":
        weight = ratio.clamp(form.low, form.high)
        slope = weight * minus_a
        return times(slope, logp), slope, clipped
    tau = torch.where(a > 0, form.low, torch.full_like(a, form.high))
    u = tau * (ratio - 1)
    gate, closed = torch.sigmoid(u), torch.sigmoid(-u)
    return -gate * 4 / tau * a, -4 * gate * closed * a * slope, torch.zeros_like(a)


def token_terms(logp: Tensor, entropy: Tensor, given: TokenInputs, form: Form) -> list[Tensor]:
    """[loss, KL, ratio, clipped, slope] of tokens."""
    log_ratio = torch.zeros_like(logp) if given.old_logps is None else logp - given.old_logps
    ratio = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    ratio_slope = torch.where(log_ratio.abs() <= LOG_RATIO_CLAMP, ratio, 0)
    loss, slope, clipped = policy_term(logp, ratio, ratio_slope, given.advantages, form)
    kl = torch.zeros_like(logp)
    if form.kl is not None:
        kl, kl_slope = kl_estimate(logp - given.ref_logps, form.kl)
        if form.kl_times_ratio:
            kl, kl_slope = kl * ratio, kl_slope * ratio + times(ratio_slope, kl)
        if form.kl_coef:  # 0 times an infinite KL would be NaN
            loss, slope = loss + form.kl_coef * kl, slope + form.kl_coef * kl_slope
    if form.entropy_coef:
        loss = loss - form.entropy_coef * entropy
    return [loss, kl, ratio, clipped, times(given.weights, slope)]


def policy(
    logits: Tensor, labels: Tensor, given: TokenInputs, form: Form, outer: float, ignore_index: int, overwrite: bool
) -> Tensor:
    """tokens[PolicyRow.COUNT, N] of logits[O, I, V], labels[O * I]; overwrite: the logits become their gradient.

    The gradient is that of sum weights * loss.
    """
    stats = statistics(logits, labels, outer, None, ignore_index, LOGPS_AND_ENTROPY)
    saved, entropy = stats.saved, stats.entropy
    tokens = torch.stack([*saved.unbind(0), entropy, *token_terms(stats.logps, entropy, given, form)])
    tokens[PolicyRow.LOSS :].masked_fill_(labels == ignore_index, 0)
    if overwrite:
        g_entropy = -form.entropy_coef * given.weights if form.entropy_coef else None
        gradient(logits, labels, saved, entropy, tokens[PolicyRow.SLOPE], g_entropy, None, outer, None, logits)
    return tokens


def scale(grad: Tensor, factor: Tensor) -> None:
    """Multiply with a number on the device, in place; nothing is read if it is 1."""
    if factor != 1:
        grad.mul_(factor)
