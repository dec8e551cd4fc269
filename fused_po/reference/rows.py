"""Statistics of rows of logits, the basis, and gradients.

`saved` [SAVED_FIELDS, N] holds a row's shift (its largest scaled logit), its log-norm (log of the sum of exponentials
above it; +inf marks an ignored row) and the label's log-prob.

The sum of exponentials leaves the label out. Where the label is the largest, its log-prob is -log1p(the others' sum),
exact however close to 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2 << 20
SAVED_FIELDS = 3
FLOOR = -1e4  # stands for log(0) beside a probability of 0: their product must be 0, not NaN


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype cannot be served, or None if they can."""
    return None if dtype.is_floating_point and dtype.itemsize > 1 else f"dtype {dtype}"


def stats_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of statistics of tensors of these dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def row_blocks(logits: Tensor, wanted: Tensor) -> Iterator[tuple[slice | Tensor, tuple, Tensor]]:
    """(rows, where they are in [O, I], their logits [rows, V]) of logits[O, I, V], a cache's worth of `wanted` rows."""
    outer_rows, inner_rows, n_cols = logits.shape
    step = max(1, BLOCK_BYTES // max(1, 4 * n_cols))
    for o in range(outer_rows):
        for begin in range(0, inner_rows, step):
            some = slice(begin, min(begin + step, inner_rows))
            rows = slice(o * inner_rows + some.start, o * inner_rows + some.stop)
            pick = wanted[rows].nonzero().squeeze(1)
            if pick.numel() == some.stop - some.start:
                yield rows, (o, some), logits[o, some]
            elif pick.numel():
                yield pick + rows.start, (o, pick + begin), logits[o, pick + begin]


def clear_rows(out: Tensor, rows: Tensor) -> None:
    """Zero the marked rows [O * I] of out[O, I, V]."""
    if bool(rows.any()):
        out[rows.view(out.shape[:2])] = 0


def scaled(x: Tensor, outer: float, inner: float | None) -> tuple[Tensor, Tensor | None]:
    """(the logits that go into the softmax, tanh(x * inner) if there is a softcap), in the statistics' dtype."""
    x = x.to(stats_dtype(x.dtype))
    if inner is None:
        return x if outer == 1.0 else x * outer, None
    t = torch.tanh(x * inner)
    return t * outer, t


def without_label(e: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """(the others' sum, the label's entry), [rows, 1] each, of exponentials e [rows, V], whose label becomes 0."""
    own = e.gather(1, label)
    return e.scatter_(1, label, 0).sum(1, keepdim=True), own


def log_norm(others: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """log(own + others); exact where the label is the largest, at a target of 0, however small the others' sum is."""
    return torch.where(target == 0, others.log1p(), (others + own).log())


def statistics(
    logits: Tensor, labels: Tensor, outer: float, inner: float | None, ignore_index: int, outputs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row statistics of logits[O, I, V] for labels[O * I]: (logps, entropy, lse, aux, saved).

    Bits of outputs: 1 logps, 2 entropy, 4 lse, 8 mean logit, 16 is-top-1, 32 log of the sum of squared probabilities;
    the last three are the rows of aux. What is not asked for has no elements.
    """
    return score(logits, labels, outer, inner, ignore_index, outputs, None)


def score(
    logits: Tensor, labels: Tensor, outer: float, inner: float | None, ignore_index: int, outputs: int,
    basis: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`statistics`, and into basis[O, I, V] (the logits themselves, another tensor, or None) d log p_y / d x."""
    n_rows = labels.numel()
    new = {"dtype": stats_dtype(logits.dtype), "device": logits.device}
    logps, entropy, lse = (torch.zeros(n_rows if outputs & bit else 0, **new) for bit in (1, 2, 4))
    aux = torch.zeros((3, n_rows) if outputs & 56 else 0, **new)
    saved = torch.zeros(SAVED_FIELDS, n_rows, **new)
    saved[1] = math.inf
    scored = labels != ignore_index
    if basis is not None:
        clear_rows(basis, ~scored)
    for rows, where, x in row_blocks(logits, scored):
        z, t = scaled(x, outer, inner)
        label = labels[rows][:, None]
        shift = z.amax(1, keepdim=True)
        target = z.gather(1, label) - shift
        if outputs & 8:
            aux[0, rows] = z.mean(1)
        if outputs & 16:
            aux[1, rows] = (z.argmax(1, keepdim=True) == label).squeeze(1).to(z.dtype)
        u = z - shift
        e = u.exp() if outputs & 2 else u.exp_()
        others, own = without_label(e, label)
        total, norm = others + own, log_norm(others, own, target)
        logp = target - norm
        for i, value in enumerate((shift, norm, logp)):
            saved[i, rows] = value.squeeze(1)
        if outputs & 1:
            logps[rows] = logp.squeeze(1)
        if outputs & 4:
            lse[rows] = (shift + norm).squeeze(1)
        if outputs & 2:
            weighed = u.clamp_(min=FLOOR).mul_(e).sum(1, keepdim=True) + own * target.clamp(min=FLOOR)
            entropy[rows] = (norm - weighed / total).squeeze(1)
        if outputs & 32:
            squares = log_norm(e.square().sum(1, keepdim=True), own.square(), target)
            aux[2, rows] = (squares - 2 * norm).squeeze(1)
        if basis is not None:
            e.mul_(-outer / total).scatter_(1, label, -outer * torch.expm1(logp))
            basis[where] = (e if t is None else e.mul_((1 - t * t) * inner)).to(basis.dtype)
    return logps, entropy, lse, aux, saved


def gradient(
    logits: Tensor, labels: Tensor, saved: Tensor, entropy: Tensor, g_logps: Tensor | None, g_entropy: Tensor | None,
    g_lse: Tensor | None, outer: float, inner: float | None, out: Tensor, first_col: int = 0,
) -> None:  # fmt: skip
    """Write into out[O, I, V] the gradient with respect to logits[O, I, V]; either may be strided, or both the same.

    dz_v = g_logps (1[v = y] - p_v) - g_entropy p_v (log p_v + H) + g_lse p_v, then the chain through the scaling.
    Without incoming gradients (all None): the basis, d log p_y / d x. first_col: the vocabulary index of column 0.
    """
    live = saved[1] != math.inf
    if g_logps is None and g_entropy is None and g_lse is None:
        g_logps = torch.ones_like(saved[0])
    else:
        live &= torch.stack([g != 0 for g in (g_logps, g_entropy, g_lse) if g is not None]).any(0)
    clear_rows(out, ~live)  # the live rows are read before they are written, in place too
    for rows, where, x in row_blocks(logits, live):
        z, t = scaled(x, outer, inner)
        logp = (z - saved[0, rows][:, None]).sub_(saved[1, rows][:, None])
        label = labels[rows] - first_col
        here = ((label >= 0) & (label < logits.shape[2])).nonzero().squeeze(1)
        logp_label = saved[2, rows][here]
        dz = dz_of_logp(logp, logp_label, here, label, _at(rows, entropy, g_logps, g_entropy, g_lse)).mul_(outer)
        out[where] = (dz if t is None else dz.mul_((1 - t * t) * inner)).to(out.dtype)


def _at(rows: slice | Tensor, entropy: Tensor, *grads: Tensor | None) -> list[Tensor | None]:
    """Entropy and incoming gradients of some rows."""
    return [None if g is None else g[rows] for g in (None if grads[1] is None else entropy, *grads)]


def dz_of_logp(logp: Tensor, logp_label: Tensor, here: Tensor, label: Tensor, incoming: list) -> Tensor:
    """The gradient [rows, V] in the scaled logits from all log-probs, overwritten, and those of the labels at hand."""
    entropy, a, h, c = (None if value is None else value[:, None] for value in incoming)
    dz, weight = logp.exp(), 0.0
    weight = weight if a is None else weight - a
    weight = weight if c is None else weight + c
    if h is not None:
        weight = weight - h * logp.clamp_(min=FLOOR).add_(entropy)
    dz *= weight
    label_weight = torch.zeros_like(logp_label)
    if c is not None:
        label_weight += c[here, 0]
    if h is not None:
        label_weight -= h[here, 0] * (logp_label.clamp(min=FLOOR) + entropy[here, 0])
    dz_label = logp_label.exp() * label_weight
    if a is not None:
        dz_label -= a[here, 0] * torch.expm1(logp_label)
    dz[here, label[here]] = dz_label
    return dz


def from_basis(
    basis: Tensor, labels: Tensor, saved: Tensor, logps: Tensor, entropy: Tensor, g_logps: Tensor | None,
    g_entropy: Tensor | None, g_lse: Tensor | None, outer: float, out: Tensor, first_col: int = 0,
) -> None:  # fmt: skip
    """`gradient`, but from the basis [N, V] of logits without a softcap and the labels' logps [N].

    Apart from the label's, an entry of the basis is -outer * p: the probabilities come back from it. A rounded p close
    to 1 says little of log p: above 1/2 it is the largest, whose log p is -log-norm.
    """
    live = torch.stack([g != 0 for g in (g_logps, g_entropy, g_lse) if g is not None]).any(0)
    clear_rows(out[None], ~live)
    for rows, (_, where), d in row_blocks(basis[None], live):
        label = labels[rows] - first_col
        here = ((label >= 0) & (label < basis.shape[1])).nonzero().squeeze(1)
        p = (d.to(logps.dtype) / -outer).clamp_(min=0)
        logp = torch.where(p > 0.5, -saved[1, rows][:, None], p.log())
        logp_label = logps[rows][here]
        incoming = _at(rows, entropy, g_logps, g_entropy, g_lse)
        out[where] = dz_of_logp(logp, logp_label, here, label, incoming).mul_(outer).to(out.dtype)
