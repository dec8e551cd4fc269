"""Rows of logits, a block that fits a cache at a time.

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
FLOOR = -1e4  # replaces log(0) where it is multiplied by a probability of 0, so that the product is 0 and not NaN


def row_views(*tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
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

    tensors: from `row_views`, logits first. A block is consecutive rows; where not all of them are wanted, which are.
    Rows of the tensor number `out` that are not wanted become 0.
    """
    everything = bool(wanted.all())
    number = 0
    for view in tensors:
        if view[0].requires_grad and torch.is_grad_enabled():  # not inside an op
            view = (view[0].detach(), *view[1:])
        n_rows, n_cols = view[0].shape
        step = max(1, BLOCK_BYTES // max(1, 4 * n_cols))
        for begin in range(0, n_rows, step):
            end = min(begin + step, n_rows)
            rows = slice(number + begin, number + end)
            block = view if end - begin == n_rows else tuple(None if t is None else t[begin:end] for t in view)
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


def buffer_in(block: Tensor | None, pick: Tensor | None, dtype: torch.dtype) -> Tensor | None:
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
