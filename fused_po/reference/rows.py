"""Statistics of rows of logits, the basis, and gradients.

`saved` [SAVED_FIELDS, N] holds a row's shift (its largest scaled logit), its log-norm (log of the sum of exponentials
above it; +inf marks an ignored row) and the label's log-prob.

The sum of exponentials leaves the label out. Where the label is the largest, its log-prob is -log1p(the others' sum),
exact however close to 0.

On small problems a pass costs as many microseconds as it calls PyTorch: rows are joined into one block where strides
allow, a block that is all rows gives the results as they are, and a result is formed in the memory it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Optional, Union

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


def sheets(*tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Tensors [O, I, V] as one tuple of [O * I, V] if the rows of each lie at equal distances, else O of [I, V]."""
    outer_rows, inner_rows, n_cols = tensors[0].shape
    if outer_rows == 1:
        return [tuple(None if t is None else t[0] for t in tensors)]
    if any(t is not None and t.stride(0) != inner_rows * t.stride(1) for t in tensors):
        return [tuple(None if t is None else t[o] for t in tensors) for o in range(outer_rows)]
    return [tuple(None if t is None else t.view(outer_rows * inner_rows, n_cols) for t in tensors)]


Block = tuple[Union[slice, Tensor], Optional[Tensor], tuple]


def row_blocks(wanted: Tensor, tensors: list[tuple[Tensor | None, ...]], out: int | None = None) -> Iterator[Block]:
    """(their numbers, None or which of the block's, the block of each tensor) of `wanted` rows, few enough for a cache.

    tensors: from `sheets`, logits first. A block is consecutive rows; where not all of them are wanted, which are. Rows
    of the tensor number `out` that are not wanted become 0.
    """
    everything = bool(wanted.all())
    number = 0
    for sheet in tensors:
        if sheet[0].requires_grad and torch.is_grad_enabled():  # not inside an op
            sheet = (sheet[0].detach(), *sheet[1:])
        n_rows, n_cols = sheet[0].shape
        step = max(1, BLOCK_BYTES // max(1, 4 * n_cols))
        for begin in range(0, n_rows, step):
            end = min(begin + step, n_rows)
            rows = slice(number + begin, number + end)
            block = sheet if end - begin == n_rows else tuple(None if t is None else t[begin:end] for t in sheet)
            pick = None if everything else wanted[rows].nonzero().squeeze(1)
            if pick is None or pick.numel() == end - begin:
                yield rows, None, block
                continue
            if out is not None:
                block[out][~wanted[rows]] = 0
            if pick.numel():
                yield pick + rows.start, pick, block
        number += n_rows


def rows_of(block: Tensor, pick: Tensor | None) -> Tensor:
    """The rows of a block that are wanted."""
    return block if pick is None else block[pick]


def room_in(block: Tensor | None, pick: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The block as memory to form a result in, if all of its rows are wanted and it has this dtype."""
    return block if block is not None and block.dtype == dtype and pick is None else None


def put_rows(block: Tensor, pick: Tensor | None, value: Tensor) -> None:
    """Write the rows of a block that are wanted."""
    if pick is None:
        block.copy_(value)
    else:
        block[pick] = value.to(block.dtype)


def collected(blocks: list, n_rows: int, n_fields: int, norms: tuple[int, ...], new: dict) -> list[Tensor]:
    """Fields [n_rows] from [(rows, fields of these rows)]; other rows have 0, and in `norms` +inf. No two share memory.

    new: dtype and device.
    """
    if len(blocks) == 1 and blocks[0][1][0].numel() == n_rows:
        return blocks[0][1]
    fields = torch.zeros(n_fields, n_rows, **new)
    for i in norms:
        fields[i].fill_(math.inf)
    for rows, values in blocks:
        fields[:, rows] = torch.stack(values)
    return [field.clone() for field in fields.unbind(0)]


def scaled(x: Tensor, outer: float, inner: float | None) -> tuple[Tensor, Tensor | None]:
    """(the logits that go into the softmax, tanh(x * inner) if there is a softcap), in the statistics' dtype."""
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if inner is None:
        return x if outer == 1.0 else x * outer, None
    t = torch.tanh(x * inner)
    return t * outer, t


def norm_of(others: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(log of a row's sum, the sum less 1), by the others' sum and the label's exponent above the largest, target <= 0.

    Where the label is the largest, the others' sum is the sum less 1, exact however small. Where not, it is >= 1.
    """
    rest = torch.expm1(target).add_(others)
    return rest.log1p(), rest


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
    n_rows, blocks = labels.numel(), []
    new = {"dtype": stats_dtype(logits.dtype), "device": logits.device}
    for rows, pick, (x, out) in row_blocks(labels != ignore_index, sheets(logits, basis), None if basis is None else 1):
        room, x = room_in(out, pick, new["dtype"]), rows_of(x, pick)
        label = labels[rows, None] if x.shape[0] < n_rows else labels[:, None]
        fields, d = _block_scores(x, label, outer, inner, outputs, basis is not None, room)
        blocks.append((rows, fields))
        if d is not None and room is None:
            put_rows(out, pick, d)
    n_more = (outputs & 62).bit_count()
    shift, norm, logp, *more = collected(blocks, n_rows, SAVED_FIELDS + n_more, (1,), new)
    saved, asked = torch.stack((shift, norm, logp)), iter(more)
    entropy, lse = (next(asked) if outputs & bit else torch.empty(0, **new) for bit in (2, 4))
    aux = torch.zeros(3, n_rows, **new) if outputs & 56 else torch.empty(0, **new)
    for i in range(3):
        if outputs >> 3 + i & 1:
            aux[i] = next(asked)
    return logp if outputs & 1 else torch.empty(0, **new), entropy, lse, aux, saved


def _block_scores(
    x: Tensor, label: Tensor, outer: float, inner: float | None, outputs: int, with_basis: bool, room: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """(shift, norm, log-prob and what outputs ask for, [rows] each; the basis) of x [rows, V], label [rows, 1].

    room: where the basis is formed, x itself or another tensor; None: in memory of its own.
    """
    z, t = scaled(x, outer, inner)
    shift = z.amax(1)
    top, target = shift[:, None], z.gather(1, label).squeeze(1).sub_(shift)
    more = []
    if outputs & 8:
        more.append(z.mean(1))
    if outputs & 16:
        more.append((z.argmax(1, keepdim=True) == label).squeeze(1).to(z.dtype))
    u = torch.sub(z, top, out=None if outputs & 2 else room)
    e = torch.exp(u, out=room) if outputs & 2 else u.exp_()
    norm, rest = norm_of(e.scatter_(1, label, 0).sum(1), target)
    logp, first = target - norm, []
    if outputs & 2:
        weighed = u.clamp_(min=FLOOR).mul_(e).sum(1).addcmul_(target.exp(), target.clamp(min=FLOOR))
        first.append(norm - weighed.div_(rest + 1))
    if outputs & 4:
        first.append(shift + norm)
    if outputs & 32:
        squares, _ = norm_of(e.square().sum(1), 2 * target)
        more.append(squares.sub_(norm, alpha=2))
    if with_basis:
        e.mul_((rest + 1).reciprocal_().mul_(-outer)[:, None])
        e.scatter_(1, label, torch.expm1(logp).mul_(-outer)[:, None])
        if t is not None:
            e.mul_((1 - t * t) * inner)
    return [shift, norm, logp, *first, *more], e if with_basis else None


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
        live.logical_and_(any_nonzero(g_logps, g_entropy, g_lse))
    for rows, pick, (x, into) in row_blocks(live, sheets(logits, out), 1):  # live rows are read before they are written
        z, t = scaled(rows_of(x, pick), outer, inner)
        room = room_in(into, pick, z.dtype)
        shift, norm, logp_label = saved[:, rows, None].unbind(0)
        logp = torch.sub(z, shift, out=room if g_entropy is None else None).sub_(norm)
        label = labels[rows, None] if z.shape[0] < labels.numel() else labels[:, None]
        incoming = _at(rows, outer, entropy, g_logps, g_entropy, g_lse)
        dz = dz_of_logp(logp, logp_label, label - first_col if first_col else label, incoming, room)
        if t is not None:
            dz.mul_((1 - t * t) * inner)
        if room is None:
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


def set_labels(dz: Tensor, label: Tensor, value: Tensor) -> None:
    """dz[i, label[i]] = value[i] for dz [rows, V], label and value [rows, 1]; labels outside [0, V) are not here."""
    n_cols = dz.shape[1]
    if not dz.numel():
        return
    least, most = torch.aminmax(label)
    if int(least) < 0 or int(most) >= n_cols:
        inside = (label >= 0) & (label < n_cols)
        label = label.clamp(0, n_cols - 1)
        value = torch.where(inside, value, dz.gather(1, label))
    dz.scatter_(1, label, value)


def dz_of_logp(
    logp: Tensor, logp_label: Tensor, label: Tensor, incoming: list[Optional[Tensor]], room: Tensor | None = None
) -> Tensor:
    """The gradient [rows, V] in the logits from all log-probs, overwritten, and those of the labels.

    label, logp_label and incoming: [rows, 1], labels counted from the first column. room: where it is formed.
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
        dz = torch.exp(logp, out=room)
        each = logp.clamp_(min=FLOOR).add_(entropy).mul_(-h)
        dz.mul_(each if weight is None else each.add_(weight))
        of_h = (logp_label.clamp(min=FLOOR) + entropy).mul_(logp_label.exp()).mul_(-h)
        of_label = of_h if of_label is None else of_label.add_(of_h)
    set_labels(dz, label, of_label)
    return dz


def from_basis(
    basis: Tensor, labels: Tensor, saved: Tensor, logps: Tensor, entropy: Tensor, g_logps: Tensor | None,
    g_entropy: Tensor | None, g_lse: Tensor | None, outer: float, out: Tensor, first_col: int = 0,
) -> None:  # fmt: skip
    """`gradient`, but from the basis [N, V] of logits without a softcap and the labels' logps [N].

    Apart from the label's, an entry of the basis is -outer * p: the probabilities come back from it. A rounded p close
    to 1 says little of log p: above 1/2 it is the largest, whose log p is -log-norm.
    """
    live = any_nonzero(g_logps, g_entropy, g_lse) != 0
    for rows, pick, (d, into) in row_blocks(live, [(basis, out)], 1):
        d = rows_of(d, pick)
        p = (d.to(logps.dtype) / -outer).clamp_(min=0)
        logp = torch.where(p > 0.5, -saved[1, rows, None], p.log())
        incoming = _at(rows, outer, entropy, g_logps, g_entropy, g_lse)
        put_rows(into, pick, dz_of_logp(logp, logps[rows, None], labels[rows, None] - first_col, incoming))
