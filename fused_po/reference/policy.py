"""Policy-gradient losses of tokens: from rows of logits to losses, and on to the gradient in the logits."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po.reference.preference import kl_estimate, times
from fused_po.reference.rows import gradient, statistics

# Rows of tokens[TOKEN_FIELDS, N]. The slope is weight * d loss / d log-prob; clipped is -1 (below), 0 or 1 (above).
SHIFT, NORM, LOGP, ENTROPY, LOSS, KL, RATIO, CLIPPED, SLOPE = range(9)
TOKEN_FIELDS = 9
LOG_RATIO_CLAMP = 20.0


class Form(NamedTuple):
    """What a token's loss is: kind's, plus kl_coef KL, minus entropy_coef H. A is the advantage, rho pi / pi_old.

    clip: -min(rho A, clip(rho, low, high) A), and where A < 0 at most -bound A. weight: -sg(clip(rho, low, high)) A
    log pi. gate: -(4 / tau) s(tau (rho - 1)) A with tau low where A > 0, high elsewhere.
    """

    kind: str
    low: float
    high: float
    bound: float = math.inf
    kl: Optional[str] = None  # "k2" or "k3"
    kl_coef: float = 0.0
    kl_times_ratio: bool = True
    entropy_coef: float = 0.0


class Given(NamedTuple):
    """Numbers of tokens, [N] each, in the statistics' dtype; 0 where a token does not count."""

    advantages: Tensor
    weights: Tensor  # of the tokens' losses in the batch's
    old_logps: Optional[Tensor] = None  # None: rho is 1, and has its gradient
    ref_logps: Optional[Tensor] = None


def policy_term(logp: Tensor, ratio: Tensor, slope: Tensor, a: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its derivative in the log-prob, clipped) without KL and entropy; slope is that of the ratio."""
    if form.kind != "gate":
        negative, minus_a = a < 0, -a
        above, below = (ratio > form.high).logical_and_(a > 0), (ratio < form.low).logical_and_(negative)
        clipped = above.to(logp.dtype).sub_(below.to(logp.dtype))
    if form.kind == "clip":
        held = torch.where(above, form.high, torch.where(below, form.low, ratio))
        flat = above.logical_or_(below)
        if form.bound != math.inf:
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


def token_terms(logp: Tensor, entropy: Tensor, given: Given, form: Form) -> list[Tensor]:
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
    logits: Tensor, labels: Tensor, given: Given, form: Form, outer: float, ignore_index: int, overwrite: bool
) -> Tensor:
    """tokens[TOKEN_FIELDS, N] of logits[O, I, V], labels[O * I]; `overwrite` puts their gradient in the logits' place.

    The gradient is that of sum weights * loss.
    """
    logps, entropy, _, _, saved = statistics(logits, labels, outer, None, ignore_index, 3)
    tokens = torch.stack([*saved.unbind(0), entropy, *token_terms(logps, entropy, given, form)])
    tokens[LOSS:].masked_fill_(labels == ignore_index, 0)
    if overwrite:
        g_entropy = -form.entropy_coef * given.weights if form.entropy_coef else None
        gradient(logits, labels, saved, entropy, tokens[SLOPE], g_entropy, None, outer, None, logits)
    return tokens


def scale(grad: Tensor, factor: Tensor) -> None:
    """Multiply with a number on the device, in place; nothing is read if it is 1."""
    if factor != 1:
        grad.mul_(factor)
