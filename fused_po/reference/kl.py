"""The exact KL of policy p and reference q over the whole vocabulary, and its gradient; formulas in ops/kl.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_po.backend.interface import KLRow, stats_dtype
from fused_po.reference.rows import FLOOR, put_rows, row_blocks, row_views, rows_of, scaled, set_labels
from fused_po.reference.statistics import norm_of


def _log_probs(
    z: Tensor, label: Tensor | None, side: list[Tensor] | None, buffer: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """(log p [rows, V], [shift, norm] [rows, 1]) of z; from a label's log-prob on, the norm is exact: see rows.py.

    side: shift and norm where they are known. buffer: like z, for exponentials, where they are not.
    """
    if side is not None:
        return (z - side[0]).sub_(side[1]), side
    shift = z.amax(1, keepdim=True)
    u = z - shift
    e = torch.exp(u, out=buffer)
    if label is None:
        norm = e.sum(1, keepdim=True).log_()
    else:
        norm, _ = norm_of(e.scatter_(1, label, 0).sum(1, keepdim=True), u.gather(1, label))
    return u.sub_(norm), [shift, norm]


def _both_sides(
    x: Tensor,
    y: Tensor,
    scaling: tuple,
    ref_scaling: tuple,
    sides: list[Tensor] | None = None,
    label: Tensor | None = None,
) -> tuple:
    """(log p, log q, sides, slope of a softcap or None, buffer) of logits x, y [rows, V].

    sides: 4 shifts and norms [rows, 1]. label [rows, 1]: whose log-probs are to be exact, or None. buffer: memory of
    [rows, V] that nothing needs any more.
    """
    (z, t), (other, _) = scaled(x, *scaling), scaled(y, *ref_scaling)
    other = other if other.dtype == z.dtype else other.to(z.dtype)
    known, buffer = (None, None) if sides is None else (sides[:2], sides[2:]), torch.empty_like(z)
    log_p, own = _log_probs(z, label, known[0], buffer)
    log_q, theirs = _log_probs(other, label, known[1], buffer)
    return log_p, log_q, [*own, *theirs], None if t is None else (1 - t * t) * scaling[1], buffer


def _weighted(p: Tensor, apart: Tensor) -> Tensor:
    """p times a difference of logs, which is overwritten; 0 where p is 0."""
    return apart.mul_(p).masked_fill_(p == 0, 0)


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
    return tuple(_weighted(log.exp(), apart).sum(1) for log, apart in above)


def kl(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    scaling: tuple,
    ref_scaling: tuple,
    direction: str | float,
    with_labels: bool,
) -> Tensor:
    """tokens[9, N] (see the rows' names) of logits and ref_logits[O, I, V], labels[N] >= 0 where a row counts.

    direction: "reverse" KL(p || q), "forward" KL(q || p), or the weight w of w KL(q || m) + (1 - w) KL(p || m).
    """
    n_rows, blocks = labels.numel(), []
    new = {"dtype": stats_dtype(logits.dtype), "device": logits.device}
    for rows, pick, (x, y) in row_blocks(labels >= 0, row_views(logits, ref_logits)):
        x, y = rows_of(x, pick), rows_of(y, pick)
        label = labels[rows, None] if with_labels else None
        log_p, log_q, sides, _, buffer = _both_sides(x, y, scaling, ref_scaling, label=label)
        p, none = torch.exp(log_p, out=buffer), torch.zeros_like(sides[0])
        of_label = [none, none, none]
        if with_labels:
            entropy = (log_p.clamp(min=FLOOR)).mul_(p).sum(1, keepdim=True).neg_()
            of_label = [log_p.gather(1, label), log_q.gather(1, label), entropy]
        if direction == "reverse":
            value = center = _weighted(p, log_p.sub_(log_q)).sum(1, keepdim=True)
        elif direction == "forward":
            value, center = _weighted(log_q.exp(), log_q.sub_(log_p)).sum(1, keepdim=True), none
        else:
            center, of_q = (v[:, None] for v in _mixture_sums(log_p, log_q, direction))
            value = direction * of_q + (1 - direction) * center
        blocks.append((rows, torch.stack([value, *of_label, *sides, center]).squeeze(2)))
    if len(blocks) == 1 and blocks[0][1].shape[1] == n_rows:
        tokens = blocks[0][1]
    else:
        tokens = torch.zeros(KLRow.COUNT, n_rows, **new)
        tokens[KLRow.NORM] = math.inf
        for rows, fields in blocks:
            tokens[:, rows] = fields
    tokens[KLRow.KL].clamp_(min=0)  # rounding; NaN stays
    return tokens


def mixture(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, scaling: tuple, ref_scaling: tuple, weight: float
) -> Tensor:
    """[2, N]: what the columns of logits, ref_logits[O, I, V] add to KL(p || m) and KL(q || m), see `kl`.

    tokens: of whole rows, of which V may be a part.
    """
    sums = torch.zeros_like(tokens[:2])
    for rows, pick, (x, y) in row_blocks(tokens[KLRow.NORM] != math.inf, row_views(logits, ref_logits)):
        x, y = rows_of(x, pick), rows_of(y, pick)
        log_p, log_q, *_ = _both_sides(
            x, y, scaling, ref_scaling, tokens[KLRow.SHIFT : KLRow.CENTER, rows, None].unbind(0)
        )
        sums[0, rows], sums[1, rows] = _mixture_sums(log_p, log_q, weight)
    return sums


def kl_gradient(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    tokens: Tensor,
    grads: Tensor,
    scaling: tuple,
    ref_scaling: tuple,
    direction: str | float,
    with_labels: bool,
    out: Tensor,
) -> None:
    """Write into out[O, I, V] the gradient in logits[O, I, V]; out may be either of the logits. tokens: from `kl`.

    Of a block of the vocabulary's columns, with labels counted from its first.

    grads[3, N]: of the KLRow.KL, and, read only with labels, of the log-prob and the entropy.
    """
    live = (tokens[KLRow.NORM] != math.inf).logical_and_(grads.any(0))
    with_logp, with_entropy = grads[1:].any(1).tolist() if with_labels and logits.shape[2] else (False, False)
    for rows, pick, (x, y, into) in row_blocks(live, row_views(logits, ref_logits, out), 2):
        x, y = rows_of(x, pick), rows_of(y, pick)
        _, logp, ref_logp, entropy, *sides, center = tokens[:, rows, None].unbind(0)
        log_p, log_q, _, slope, buffer = _both_sides(x, y, scaling, ref_scaling, sides)
        g_kl, g_logp, g_entropy = (grads if scaling[0] == 1 else grads * scaling[0])[:, rows, None].unbind(0)
        if with_labels:
            label = labels[rows, None]
            set_labels(log_p, label, logp)
            set_labels(log_q, label, ref_logp)
        p = torch.exp(log_p, out=buffer)
        if direction == "reverse":
            dz = _weighted(p, torch.sub(log_p, log_q, out=log_q)).addcmul_(p, center, value=-1).mul_(g_kl)
        elif direction == "forward":
            dz = torch.sub(p, log_q.exp_(), out=log_q).mul_(g_kl)
        else:
            p_above, _ = _above_mixture(log_p, log_q, direction)
            dz = _weighted(p, p_above).addcmul_(p, center, value=-1).mul_(g_kl * (1 - direction))
        if with_labels and (with_logp or direction == "forward") and logits.shape[2]:
            if direction == "forward":
                at_label = g_kl * (torch.expm1(logp) - torch.expm1(ref_logp))
            else:
                at_label = dz.gather(1, label.clamp(0, logits.shape[2] - 1))
            dz.addcmul_(p, g_logp, value=-1)
            set_labels(dz, label, at_label - g_logp * torch.expm1(logp))
        if with_entropy:
            dz.addcmul_(log_p.clamp_(min=FLOOR).add_(entropy).mul_(p), g_entropy, value=-1)
        put_rows(into, pick, dz if slope is None else dz.mul_(slope))
