"""The exact KL of policy p and reference q over the whole vocabulary, and its gradient; formulas in ops/kl.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_po.reference.rows import FLOOR, clear_rows, log_norm, row_blocks, scaled, stats_dtype, without_label

# Rows of tokens[TOKEN_FIELDS, N]: results, then what the backward needs.
KL, LOGP, REF_LOGP, ENTROPY, SHIFT, NORM, REF_SHIFT, REF_NORM, CENTER = range(9)
TOKEN_FIELDS = 9


def _normaliser(z: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
    """(shift, norm) [rows] of z [rows, V]; from a label's log-prob on, that is exact: see rows.py."""
    shift = z.amax(1, keepdim=True)
    e = (z - shift).exp_()
    norm = (
        e.sum(1, keepdim=True).log()
        if label is None
        else log_norm(*without_label(e, label), z.gather(1, label) - shift)
    )
    return shift[:, 0], norm[:, 0]


def _both_sides(
    x: Tensor, y: Tensor, scaling: tuple, ref_scaling: tuple, sides: Tensor | None = None, label: Tensor | None = None
) -> tuple:
    """(log p, log q, sides, slope of a softcap or None) of logits x, y [rows, V]; sides[4, rows]: shifts, norms.

    label [rows, 1]: whose log-probs are to be exact, or None.
    """
    (z, t), (other, _) = scaled(x, *scaling), scaled(y, *ref_scaling)
    other = other.to(z.dtype)
    if sides is None:
        sides = torch.stack([*_normaliser(z, label), *_normaliser(other, label)])
    logs = ((v - s[:, None]).sub_(n[:, None]) for v, s, n in ((z, sides[0], sides[1]), (other, sides[2], sides[3])))
    return *logs, sides, None if t is None else (1 - t * t) * scaling[1]


def _weighed(p: Tensor, apart: Tensor) -> Tensor:
    """p times a difference of logs, 0 where p is 0."""
    return torch.where(p > 0, p * apart, p)


def _above_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(log p - log m, log q - log m), m = weight q + (1 - weight) p; both exactly 0 where p = q."""
    apart = log_q - log_p
    own, other = (torch.full_like(apart, w) for w in (1 - weight, weight))
    share, rest = torch.where(apart > 0, own, other), torch.where(apart > 0, other, own)
    down = share * torch.expm1(-apart.abs())
    far = (rest + share * (-apart.abs()).exp()).log()  # 1 - share where nothing else is left: not from a rounded share
    of_larger = -torch.where(down < -0.5, far, torch.log1p(down))
    return of_larger - apart.clamp(min=0), of_larger + apart.clamp(max=0)


def _mixture_sums(log_p: Tensor, log_q: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(KL(p || m), KL(q || m)) [rows], m = weight q + (1 - weight) p; over some columns, their share of it."""
    above = zip((log_p, log_q), _above_mixture(log_p, log_q, weight))
    return tuple(_weighed(log.exp(), apart).sum(1) for log, apart in above)


def kl(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, scaling: tuple, ref_scaling: tuple, direction: str | float,
    with_labels: bool,
) -> Tensor:  # fmt: skip
    """tokens[9, N] (see the rows' names) of logits and ref_logits[O, I, V], labels[N] >= 0 where a row counts.

    direction: "reverse" KL(p || q), "forward" KL(q || p), or the weight w of w KL(q || m) + (1 - w) KL(p || m).
    """
    tokens = torch.zeros(9, labels.numel(), dtype=stats_dtype(logits.dtype), device=logits.device)
    tokens[NORM] = math.inf
    for rows, where, x in row_blocks(logits, labels >= 0):
        label = labels[rows][:, None] if with_labels else None
        log_p, log_q, sides, _ = _both_sides(x, ref_logits[where], scaling, ref_scaling, label=label)
        tokens[SHIFT:CENTER, rows] = sides
        p = log_p.exp()
        if direction == "reverse":
            tokens[KL, rows] = tokens[CENTER, rows] = _weighed(p, log_p - log_q).sum(1)
        elif direction == "forward":
            tokens[KL, rows] = _weighed(log_q.exp(), log_q - log_p).sum(1)
        else:
            of_p, of_q = _mixture_sums(log_p, log_q, direction)
            tokens[CENTER, rows], tokens[KL, rows] = of_p, direction * of_q + (1 - direction) * of_p
        if with_labels:
            tokens[LOGP, rows], tokens[REF_LOGP, rows] = (v.gather(1, label)[:, 0] for v in (log_p, log_q))
            tokens[ENTROPY, rows] = -log_p.clamp(min=FLOOR).mul_(p).sum(1)
    tokens[KL].clamp_(min=0)  # rounding; NaN stays
    return tokens


def mixture(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, scaling: tuple, ref_scaling: tuple, weight: float
) -> Tensor:
    """[2, N]: what the columns of logits, ref_logits[O, I, V] add to KL(p || m) and KL(q || m), see `kl`.

    tokens: of whole rows, of which V may be a part.
    """
    sums = torch.zeros_like(tokens[:2])
    for rows, where, x in row_blocks(logits, tokens[NORM] != math.inf):
        log_p, log_q, *_ = _both_sides(x, ref_logits[where], scaling, ref_scaling, tokens[SHIFT:CENTER, rows])
        sums[0, rows], sums[1, rows] = _mixture_sums(log_p, log_q, weight)
    return sums


def kl_gradient(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, tokens: Tensor, grads: Tensor, scaling: tuple,
    ref_scaling: tuple, direction: str | float, with_labels: bool, out: Tensor,
) -> None:  # fmt: skip
    """Write into out[O, I, V] the gradient in logits[O, I, V]; out may be either of the logits. tokens: from `kl`.

    Of a block of the vocabulary's columns, with labels counted from its first.

    grads[3, N]: of the KL, and, read only with labels, of the log-prob and the entropy.
    """
    live = (tokens[NORM] != math.inf) & (grads != 0).any(0)
    clear_rows(out, ~live)
    for rows, where, x in row_blocks(logits, live):
        sides = tokens[SHIFT:CENTER, rows]
        log_p, log_q, _, slope = _both_sides(x, ref_logits[where], scaling, ref_scaling, sides)
        (g_kl, g_logp, g_entropy), center = grads[:, rows, None], tokens[CENTER, rows, None]
        if with_labels:
            label = labels[rows]
            here = ((label >= 0) & (label < logits.shape[2])).nonzero().squeeze(1)
            of_label = tokens[LOGP, rows][here], tokens[REF_LOGP, rows][here]
            log_p[here, label[here]], log_q[here, label[here]] = of_label
        p = log_p.exp()
        if direction == "reverse":
            dz = g_kl * (_weighed(p, log_p - log_q) - p * center)
        elif direction == "forward":
            dz = g_kl * (p - log_q.exp())
        else:
            p_above, _ = _above_mixture(log_p, log_q, direction)
            dz = g_kl * (1 - direction) * (_weighed(p, p_above) - p * center)
        if with_labels:
            at_label = dz[here, label[here]]
            if direction == "forward":
                at_label = g_kl[here, 0] * (torch.expm1(of_label[0]) - torch.expm1(of_label[1]))
            at_label = at_label - g_logp[here, 0] * torch.expm1(of_label[0])
            dz.sub_(g_logp * p)[here, label[here]] = at_label
            dz.sub_(g_entropy * p * (log_p.clamp(min=FLOOR) + tokens[ENTROPY, rows, None]))
        dz *= scaling[0]
        out[where] = (dz if slope is None else dz.mul_(slope)).to(out.dtype)
