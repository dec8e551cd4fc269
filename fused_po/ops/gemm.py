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


def head_block(n_rows: int, n_cols: int, width: int, tile_bytes: int) -> int:
    """Rows of the head taken at once where it is cast, or its gradient summed: fp32, they stay within tile_bytes."""
    return max(1, min(n_cols, tile_bytes // (4 * max(1, width, min(n_rows, 2048)))))


def operand(weight: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Rows of the head as a GEMM takes them: rounded to compute_dtype (autocast's), held in dtype."""
    return weight.to(compute_dtype).to(dtype)


def head_slices(weight: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype, block: int) -> list[slice]:
    """The head's rows in one piece, or, if `operand` would copy it, `block` at a time."""
    n_cols = weight.shape[0]
    step = n_cols if weight.dtype == compute_dtype == dtype else block
    return [slice(begin, min(begin + step, n_cols)) for begin in range(0, n_cols, step)]


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype, out: Tensor, block: int):
    """out [N, V] = hidden [N, H] @ weight [V, H]^T + bias [V]; a head to be cast is cast `block` rows at a time."""
    for columns in head_slices(weight, compute_dtype, hidden.dtype, block):
        mm(hidden, operand(weight[columns], compute_dtype, hidden.dtype).t(), out[:, columns])
    if bias is not None:
        out += bias
