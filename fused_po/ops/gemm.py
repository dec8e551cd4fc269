"""Matrix products of the head: into a buffer of its own, possibly wider, dtype; casts a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def gemm_dtype(device: torch.device, compute_dtype: torch.dtype, logits_dtype: torch.dtype) -> torch.dtype:
    """The operands' dtype: a GPU multiplies low precision into wide sums, a CPU needs operands as wide as the sums."""
    return compute_dtype if device.type == "cuda" else logits_dtype


def mm(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b with `add`; a and b of one dtype, sums rounded to out's dtype alone."""
    mixed = {}
    if a.dtype != out.dtype:
        if a.device.type == "cuda":
            mixed = {"out_dtype": out.dtype}
        else:
            a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, **mixed, out=out)
    else:
        torch.mm(a, b, **mixed, out=out)


ROW_BYTES = (
    64  # rows of logits begin at multiples of it: whole vectors for kernels, aligned leading dimensions for GEMMs
)


def padded(n_cols: int, dtype: torch.dtype) -> int:
    """Columns a row of logits takes with its padding."""
    unit = ROW_BYTES // dtype.itemsize
    return (n_cols + unit - 1) // unit * unit


def room(like: Tensor, n_rows: int, n_cols: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [n_rows, n_cols] with padded rows, on `like`'s device."""
    return like.new_empty(n_rows, padded(n_cols, dtype), dtype=dtype)[:, :n_cols]


def head_block(n_rows: int, n_cols: int, width: int, tile_bytes: int) -> int:
    """Rows of the head taken at once where it is cast, or its gradient summed: fp32, they stay within tile_bytes."""
    block = max(1, min(n_cols, tile_bytes // (4 * max(1, width, min(n_rows, 2048)))))
    return block if block < ROW_BYTES else block // ROW_BYTES * ROW_BYTES


def spans(begin: int, end: int, step: int) -> list[slice]:
    """[begin, end) in pieces of `step`."""
    return [slice(at, min(at + step, end)) for at in range(begin, end, max(1, step))]


def operand(weight: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Rows of the head as a GEMM takes them: rounded to compute_dtype (autocast's), held in dtype."""
    return weight if weight.dtype == compute_dtype == dtype else weight.to(compute_dtype).to(dtype)


def take(value: Tensor, some: slice) -> Tensor:
    """value[some]; the tensor itself if that is all of it."""
    return value if some.start == 0 and some.stop == value.shape[0] else value[some]


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype, out: Tensor, block: int,
    low: Tensor | None = None,
) -> None:  # fmt: skip
    """out [N, V] = hidden [N, H] @ weight [V, H]^T + bias [V]; a head to be cast is cast `block` rows at a time.

    With low [V, r], an operand already, hidden is [N, H + r]: [weight | low] without putting them side by side.
    """
    width = weight.shape[1]
    states = hidden if low is None else hidden[:, :width]
    if weight.dtype == compute_dtype == hidden.dtype:
        mm(states, weight.t(), out)
    else:
        for columns in spans(0, weight.shape[0], block):
            mm(states, operand(weight[columns], compute_dtype, hidden.dtype).t(), out[:, columns])
    if low is not None:
        mm(hidden[:, width:], low.t(), out, add=True)
    if bias is not None:
        out += bias


def back_project(
    d: Tensor, weight: Tensor, compute_dtype: torch.dtype, out: Tensor, block: int, low: Tensor | None = None, *,
    add: bool = False,
) -> None:  # fmt: skip
    """out [N, H] = d [N, V] @ weight [V, H], or += with `add`; a head to be cast is cast `block` rows at a time.

    With low [V, r], out is [N, H + r]: see `project`.
    """
    width = weight.shape[1]
    factor = d.dtype if d.device.type == "cuda" else out.dtype  # see `mm`: a CPU would cast the whole head
    total = out if low is None else out[:, :width]
    if weight.dtype == compute_dtype == factor:
        mm(d, weight, total, add=add)
    else:
        if not weight.shape[0] and not add:
            out.zero_()
        for columns in spans(0, weight.shape[0], block):
            add_this = add or columns.start > 0  # (a name for the cast block would keep it into the next round)
            mm(d[:, columns], operand(weight[columns], compute_dtype, factor), total, add=add_this)
    if low is not None:
        mm(d, low, out[:, width:], add=add)
