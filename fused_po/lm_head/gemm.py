"""Matrix products of the head. The result may have a wider dtype than the operands; a head is cast in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.lm_head.plan import padded, spans


def mm(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b with `add`. a and b have one dtype; sums are rounded only to the dtype of out."""
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


def padded_tile(like: Tensor, n_rows: int, n_cols: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized [n_rows, n_cols] tensor with padded rows, on the device of `like`."""
    return like.new_empty(n_rows, padded(n_cols, dtype), dtype=dtype)[:, :n_cols]


def operand(weight: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Rows of the head as a GEMM operand: rounded to compute_dtype (autocast's), stored in dtype."""
    return weight if weight.dtype == compute_dtype == dtype else weight.to(compute_dtype).to(dtype)


def take(value: Tensor, rows: slice) -> Tensor:
    """value[rows]; the tensor itself if that is all of it."""
    return value if rows.start == 0 and rows.stop == value.shape[0] else value[rows]


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
    out: Tensor,
    block: int,
    low: Tensor | None = None,
) -> None:
    """out [N, V] = hidden [N, H] @ weight [V, H]^T + bias [V]; a head to be cast is cast `block` rows at a time.

    With low [V, r], already an operand, hidden is [N, H + r]: a product with [weight | low], not concatenated.
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
    d: Tensor,
    weight: Tensor,
    compute_dtype: torch.dtype,
    out: Tensor,
    block: int,
    low: Tensor | None = None,
    *,
    add: bool = False,
) -> None:
    """out [N, H] = d [N, V] @ weight [V, H], or += with `add`; a head to be cast is cast `block` rows at a time.

    With low [V, r], out is [N, H + r]: see `project`.
    """
    width = weight.shape[1]
    factor = d.dtype if d.device.type == "cuda" else out.dtype  # see `mm`, which would cast the whole head on a CPU
    total = out if low is None else out[:, :width]
    if weight.dtype == compute_dtype == factor:
        mm(d, weight, total, add=add)
    else:
        if not weight.shape[0] and not add:
            out.zero_()
        for columns in spans(0, weight.shape[0], block):
            add_this = add or columns.start > 0  # a name for the cast block would keep it alive longer
            mm(d[:, columns], operand(weight[columns], compute_dtype, factor), total, add=add_this)
    if low is not None:
        mm(d, low, out[:, width:], add=add)


THIN_ROWS = {"cpu": 32}  # of a product with few columns that are summed in one go
THIN_ROWS_ELSEWHERE = 128


def add_product(d: Tensor, thin: Tensor, total: Tensor) -> None:
    """total += d^T thin, for thin of few columns: the gradients of a bias and of low.

    A GEMM accumulates the rows of such a product one by one, with a rounding error each; plain PyTorch sums the
    gradient of a bias pairwise. So the product is split into partial sums over rows; on a CPU the total is in float64.
    """
    part = torch.empty_like(total, dtype=torch.float64 if d.dtype == torch.float64 else torch.float32)
    for some in spans(0, len(d), THIN_ROWS.get(d.device.type, THIN_ROWS_ELSEWHERE)):
        mm(d[some].t(), thin[some], part)
        total += part
