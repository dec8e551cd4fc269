"""The gradient in rows of logits from those of their statistics, and the same from a kept basis."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from fused_po.backend.interface import SavedRow
from fused_po.reference.rows import FLOOR, buffer_in, put_rows, row_blocks, row_views, rows_of, scaled, set_labels


def gradient(
    logits: Tensor,
    labels: Tensor,
    saved: Tensor,
    entropy: Tensor,
    g_logps: Tensor | None,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
    outer: float,
    inner: float | None,
    out: Tensor,
    first_col: int = 0,
) -> None:
    """Write into out[O, I, V] the gradient with respect to logits[O, I, V]; either may be strided, or both the same.

    dz_v = g_logps (1[v = y] - p_v) - g_entropy p_v (log p_v + H) + g_lse p_v, then the chain through the scaling.
    Without incoming gradients (all None): the basis, d log p_y / d x. first_col: the vocabulary index of column 0.
    """
    live = saved[SavedRow.NORM] != math.inf
    if g_logps is None and g_entropy is None and g_lse is None:
        g_logps = torch.ones_like(saved[0])
    else:
        live.logical_and_(any_nonzero(g_logps, g_entropy, g_lse))
    for rows, pick, (x, into) in row_blocks(
        live, row_views(logits, out), 1
    ):  # live rows are read before they are written
        z, t = scaled(rows_of(x, pick), outer, inner)
        buffer = buffer_in(into, pick, z.dtype)
        shift, norm, logp_label = saved[:, rows, None].unbind(0)
        logp = torch.sub(z, shift, out=buffer if g_entropy is None else None).sub_(norm)
        label = labels[rows, None] if z.shape[0] < labels.numel() else labels[:, None]
        incoming = _at(rows, outer, entropy, g_logps, g_entropy, g_lse)
        dz = dz_of_logp(logp, logp_label, label - first_col if first_col else label, incoming, buffer)
        if t is not None:
            dz.mul_((1 - t * t) * inner)
        if buffer is None:
            put_rows(into, pick, dz)


def any_nonzero(*grads: Tensor | None) -> Tensor:
    """[N], of which an element is true where any of the incoming gradients that are there is not 0."""
    first, *others = (g for g in grads if g is not None)
    if not others:
        return first
    some = first != 0
    for g in others:
        some.logical_or_(g)
    return some


def _at(rows: slice | Tensor, outer: float, entropy: Tensor, *grads: Tensor | None) -> list[Tensor | None]:
    """The entropy, and outer times the incoming gradients, of some rows, [rows, 1]."""
    picked = [None if g is None else g[rows, None] for g in grads]
    scaled_grads = [None if g is None else g * outer for g in picked] if outer != 1 else picked
    return [None if grads[1] is None else entropy[rows, None], *scaled_grads]


def dz_of_logp(
    logp: Tensor, logp_label: Tensor, label: Tensor, incoming: list[Optional[Tensor]], buffer: Tensor | None = None
) -> Tensor:
    """The gradient [rows, V] in the logits from all log-probs, overwritten, and those of the labels.

    label, logp_label and incoming: [rows, 1], labels counted from the first column. buffer: where it is formed.
    """
    entropy, a, h, c = incoming
    minus_a = None if a is None else -a
    weight = c if a is None else minus_a if c is None else c - a
    of_label = None if c is None else c * logp_label.exp()
    if a is not None:
        of_a = torch.expm1(logp_label).mul_(minus_a)
        of_label = of_a if of_label is None else of_label.add_(of_a)
    if h is None:
        dz = logp.exp_().mul_(weight)
    else:
        dz = torch.exp(logp, out=buffer)
        each = logp.clamp_(min=FLOOR).add_(entropy).mul_(-h)
        dz.mul_(each if weight is None else each.add_(weight))
        of_h = (logp_label.clamp(min=FLOOR) + entropy).mul_(logp_label.exp()).mul_(-h)
        of_label = of_h if of_label is None else of_label.add_(of_h)
    set_labels(dz, label, of_label)
    return dz


def from_basis(
    basis: Tensor,
    labels: Tensor,
    saved: Tensor,
    logps: Tensor,
    entropy: Tensor,
    g_logps: Tensor | None,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
    outer: float,
    out: Tensor,
    first_col: int = 0,
) -> None:
    """`gradient`, but from the basis [N, V] of logits without a softcap and the labels' logps [N].

    Apart from the label's, an entry of the basis is -outer * p: the probabilities come back from it. A rounded p close
    to 1 says little of log p: above 1/2 it is the largest, whose log p is -log-norm.
    """
    live = any_nonzero(g_logps, g_entropy, g_lse) != 0
    for rows, pick, (d, into) in row_blocks(live, [(basis, out)], 1):
        d = rows_of(d, pick)
        p = (d.to(logps.dtype) / -outer).clamp_(min=0)
        logp = torch.where(p > 0.5, -saved[SavedRow.NORM, rows, None], p.log())
        incoming = _at(rows, outer, entropy, g_logps, g_entropy, g_lse)
        put_rows(into, pick, dz_of_logp(logp, logps[rows, None], labels[rows, None] - first_col, incoming))
