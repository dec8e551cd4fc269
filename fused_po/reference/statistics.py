"""Statistics of rows of logits, and the basis.

The sum of exponentials leaves the label out. Where the label is the largest, its log-prob is -log1p(the others' sum),
exact however close to 0. Here SavedRow.SHIFT and NORM are base e.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.backend.interface import AuxRow, Outputs, RowStats, SavedRow, stats_dtype
from fused_po.reference.rows import FLOOR, buffer_in, collected, put_rows, row_blocks, row_views, rows_of, scaled


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype are not supported, or None if they are."""
    return None if dtype.is_floating_point and dtype.itemsize > 1 else f"dtype {dtype}"


def norm_of(others: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(log of a row's sum, the sum less 1), by the others' sum and the label's exponent above the largest, target <= 0.

    Where the label is the largest, the others' sum is the sum less 1, exact however small. Where not, it is >= 1.
    """
    rest = torch.expm1(target).add_(others)
    return rest.log1p(), rest


def statistics(
    logits: Tensor, labels: Tensor, outer: float, inner: float | None, ignore_index: int, outputs: int
) -> RowStats:
    """Row statistics of logits [O, I, V] for labels [O * I]; outputs: `Outputs.bits`."""
    return score(logits, labels, outer, inner, ignore_index, outputs, None)


def score(
    logits: Tensor,
    labels: Tensor,
    outer: float,
    inner: float | None,
    ignore_index: int,
    outputs: int,
    basis: Tensor | None,
) -> RowStats:
    """`statistics`, and into basis [O, I, V] (the logits themselves, another tensor, or None) d log p_y / d x."""
    n_rows, blocks, asked = labels.numel(), [], Outputs.of(outputs)
    new = {"dtype": stats_dtype(logits.dtype), "device": logits.device}
    for rows, pick, (x, out) in row_blocks(
        labels != ignore_index, row_views(logits, basis), None if basis is None else 1
    ):
        buffer, x = buffer_in(out, pick, new["dtype"]), rows_of(x, pick)
        label = labels[rows, None] if x.shape[0] < n_rows else labels[:, None]
        fields, d = _block_scores(x, label, (outer, inner), asked, basis is not None, buffer)
        blocks.append((rows, fields))
        if d is not None and buffer is None:
            put_rows(out, pick, d)
    n_fields = SavedRow.COUNT + sum(asked) - asked.logps
    shift, norm, logp, *more = collected(blocks, n_rows, n_fields, (SavedRow.NORM,), new)
    saved, fields = torch.stack((shift, norm, logp)), iter(more)
    entropy = next(fields) if asked.entropy else torch.empty(0, **new)
    lse = next(fields) if asked.lse else torch.empty(0, **new)
    aux = torch.zeros(AuxRow.COUNT, n_rows, **new) if any(asked.auxiliary) else torch.empty(0, **new)
    for i, wanted in enumerate(asked.auxiliary):
        if wanted:
            aux[i] = next(fields)
    return RowStats(logp if asked.logps else torch.empty(0, **new), entropy, lse, aux, saved)


def _block_scores(
    x: Tensor,
    label: Tensor,
    scaling: tuple[float, float | None],
    asked: Outputs,
    with_basis: bool,
    buffer: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """(shift, norm, log-prob and what is asked for, [rows] each; the basis) of x [rows, V], label [rows, 1].

    buffer: where the basis is formed, x itself or another tensor; None: in memory of its own.
    """
    (outer, inner), (z, t) = scaling, scaled(x, *scaling)
    shift = z.amax(1)
    top, target = shift[:, None], z.gather(1, label).squeeze(1).sub_(shift)
    more = []
    if asked.mean_logits:
        more.append(z.mean(1))
    if asked.is_top1:
        more.append((z.argmax(1, keepdim=True) == label).squeeze(1).to(z.dtype))
    u = torch.sub(z, top, out=None if asked.entropy else buffer)
    e = torch.exp(u, out=buffer) if asked.entropy else u.exp_()
    norm, rest = norm_of(e.scatter_(1, label, 0).sum(1), target)
    logp, first = target - norm, []
    if asked.entropy:
        weighted = u.clamp_(min=FLOOR).mul_(e).sum(1).addcmul_(target.exp(), target.clamp(min=FLOOR))
        first.append(norm - weighted.div_(rest + 1))
    if asked.lse:
        first.append(shift + norm)
    if asked.log_sum_sq_probs:
        squares, _ = norm_of(e.square().sum(1), 2 * target)
        more.append(squares.sub_(norm, alpha=2))
    if with_basis:
        e.mul_((rest + 1).reciprocal_().mul_(-outer)[:, None])
        e.scatter_(1, label, torch.expm1(logp).mul_(-outer)[:, None])
        if t is not None:
            e.mul_((1 - t * t) * inner)
    return [shift, norm, logp, *first, *more], e if with_basis else None
