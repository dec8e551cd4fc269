"""Gradient pass: one read of the logits, one write of the gradient of any loss on their log-probs, entropy and lse.

With p the softmax of a row, y its label, H its entropy and g the incoming gradients,

    dz_v = g_logps (1[v = y] - p_v) - g_entropy p_v (log p_v + H) + g_lse p_v

followed by the chain through temperature, softcap and logit scale. Without incoming gradients (all None) it is the
basis: d log p_y / d x. The label's own entry comes from expm1 of its log-prob, so it stays exact where p_y is close to
1. The output may be the input. A kept basis gives the same gradient without the logits: apart from the label's, its
entries are -outer * p (without a softcap).
"""

import torch

import triton
import triton.language as tl

from .rowmath import FLOOR, LN2, LOG2E, before_row, expm1, load_scaled, row_start
from .statistics import launch_shape, statistics


@triton.jit
def label_gradient(logp, entropy, g_logp, g_entropy, g_lse):
    """The gradient in the label's scaled logit from its log-prob: exact where that is close to 0."""
    floored = tl.where(logp < FLOOR * LN2, FLOOR * LN2, logp)
    return tl.exp2(logp * LOG2E) * (g_lse - g_entropy * (floored + entropy)) - g_logp * expm1(logp)


@triton.jit
def gradient_columns(
    x_block, out_block, read, write, target, dz_target, shift, norm, entropy, g_logp, g_entropy, g_lse, outer, inner,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row under their masks; column `target` of them (if it is one) gets dz_target."""
    offsets = tl.arange(0, BLOCK)
    y = load_scaled(x_block + offsets, read, inner)
    log2p = tl.fma(y, outer * LOG2E, -shift) - norm
    logp = tl.where(log2p < FLOOR, FLOOR, log2p) * LN2
    dz = tl.exp2(log2p) * (g_lse - g_logp - g_entropy * (logp + entropy))
    dz = tl.where(offsets == target, dz_target, dz)
    if inner is not None:
        dz = dz * (1.0 - y * y) * inner
    value = tl.where(read, dz * outer, 0.0)
    tl.store(out_block + offsets, value.to(out_block.dtype.element_ty), mask=write)


@triton.jit
def gradient_block(
    x_row, out_row, block, label, n_cols, shift, norm, logp, entropy, g_logp, g_entropy, g_lse, outer, inner,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row, logp its label's. They begin at 16-byte boundaries: the first may before 0."""
    live = (norm != float("inf")) & ((g_logp != 0.0) | (g_entropy != 0.0) | (g_lse != 0.0))
    start = block * BLOCK - before_row(out_row, GROUP)
    here = (label >= start) & (label < start + BLOCK) & (label >= 0) & (label < n_cols) & live
    dz_label = label_gradient(logp, entropy, g_logp, g_entropy, g_lse)

    x_block, out_block = x_row + start, out_row + start
    target = tl.where(here, label - start, -1)
    end = tl.minimum(n_cols - start, BLOCK)
    offsets = tl.arange(0, BLOCK)
    if (start >= 0) & (end % GROUP == 0):  # whole groups: 16 bytes a load and a store
        if GROUP > 1:
            x_block, out_block = tl.multiple_of(x_block, 16), tl.multiple_of(out_block, 16)
        write = offsets < tl.multiple_of(end, GROUP)
        read = offsets < tl.multiple_of(tl.where(live, end, 0), GROUP)
        gradient_columns(
            x_block, out_block, read, write, target, dz_label, shift, norm, entropy, g_logp, g_entropy, g_lse, outer,
            inner, BLOCK,
        )  # fmt: skip
    else:
        write = (offsets >= -start) & (offsets < end)
        read = (offsets >= -start) & (offsets < tl.where(live, end, 0))
        gradient_columns(
            x_block, out_block, read, write, target, dz_label, shift, norm, entropy, g_logp, g_entropy, g_lse, outer,
            inner, BLOCK,
        )  # fmt: skip


@triton.jit
def gradient_kernel(
    x_ptr, out_ptr, label_ptr, saved_ptr, entropy_ptr, g_logps_ptr, g_entropy_ptr, g_lse_ptr,
    first_col, inner_rows, n_cols, x_stride_outer, x_stride_inner, out_stride_outer, out_stride_inner, outer, inner,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows on grid axis 0, blocks of columns on axis 1; labels count from the vocabulary's column `first_col` on."""
    row = tl.program_id(0)
    label = tl.load(label_ptr + row) - first_col
    shift = tl.load(saved_ptr + row)
    norm = tl.load(saved_ptr + tl.num_programs(0) + row)
    logp = tl.load(saved_ptr + 2 * tl.num_programs(0) + row)
    zero = tl.full((), 0.0, tl.float32)
    entropy, g_logp, g_entropy, g_lse = zero, zero, zero, zero
    if g_logps_ptr is not None:
        g_logp = tl.load(g_logps_ptr + row)
    if g_entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + row)
        g_entropy = tl.load(g_entropy_ptr + row)
    if g_lse_ptr is not None:
        g_lse = tl.load(g_lse_ptr + row)
    if g_logps_ptr is None and g_entropy_ptr is None and g_lse_ptr is None:
        g_logp = zero + 1.0
    x_row = row_start(x_ptr, row, inner_rows, x_stride_outer, x_stride_inner)
    out_row = row_start(out_ptr, row, inner_rows, out_stride_outer, out_stride_inner)
    block = tl.program_id(1)
    gradient_block(
        x_row, out_row, block, label, n_cols, shift, norm, logp, entropy, g_logp, g_entropy, g_lse, outer, inner, BLOCK,
        GROUP,
    )  # fmt: skip


def gradient_shape(logits: torch.Tensor, out: torch.Tensor) -> tuple[tuple[int, int], dict]:
    """(grid, launch shape). GROUP is 1, no alignment known, unless rows of both begin equally far from a boundary."""
    n_cols, group = logits.shape[2], 16 // out.element_size()
    offsets = [
        (t.data_ptr() // t.element_size() % group, t.stride(0) % group, t.stride(1) % group) for t in (logits, out)
    ]
    if offsets[0] != offsets[1] or out.element_size() > logits.element_size():
        group = 1
    shape = launch_shape(n_cols, out.element_size()) | {"GROUP": group}
    return (logits.shape[0] * logits.shape[1], triton.cdiv(n_cols + group - 1, shape["BLOCK"])), shape


def gradient(logits, labels, saved, entropy, g_logps, g_entropy, g_lse, outer, inner, out, first_col=0):
    """Write into out[O, I, V] the gradient with respect to logits[O, I, V]; either may be strided, or both the same.

    saved and entropy: from `statistics`. g_*: [O * I] fp32 or None. first_col: the vocabulary index of column 0.
    """
    grid, shape = gradient_shape(logits, out)
    if logits.numel():
        gradient_kernel[grid](
            logits, out, labels, saved, entropy, g_logps, g_entropy, g_lse, first_col, logits.shape[1],
            logits.shape[2], logits.stride(0), logits.stride(1), out.stride(0), out.stride(1), outer, inner, **shape,
        )  # fmt: skip


def score(logits, labels, outer, inner, ignore_index, outputs, basis):
    """`statistics`, and into basis[O, I, V] (the logits themselves, another tensor, or None) d log p_y / d x."""
    results = statistics(logits, labels, outer, inner, ignore_index, outputs)
    if basis is not None:
        gradient(logits, labels, results[4], results[1], None, None, None, outer, inner, basis)
    return results


@triton.jit
def basis_to_dz(d, outer, norm, entropy, weight, g_entropy, HAS_ENTROPY: tl.constexpr, IS_16_BIT: tl.constexpr):
    """The gradient in the raw logit of entries that are not the label's: d = -outer * p, weight = g_logps - g_lse.

    A p close to 1 in 16 bits says little of log p: above 1/2 it is the largest, whose log2 p is -norm but for the
    rounding of its shift.
    """
    if HAS_ENTROPY:
        log2p = tl.log2(tl.abs(d)) - tl.log2(outer)
        if IS_16_BIT:
            log2p = tl.where(tl.abs(d) > 0.5 * outer, -norm, log2p)
        weight += g_entropy * (tl.maximum(log2p, FLOOR) * LN2 + entropy)
    return d * weight


@triton.jit
def from_basis_kernel(
    basis_ptr, out_ptr, label_ptr, saved_ptr, logps_ptr, entropy_ptr, g_logps_ptr, g_entropy_ptr, g_lse_ptr,
    first_col, n_cols, basis_stride, out_stride, outer, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows on grid axis 0, blocks of columns on axis 1. Rows begin at 16-byte boundaries; a full block has no mask."""
    row = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    IS_16_BIT: tl.constexpr = basis_ptr.dtype.element_ty.primitive_bitwidth == 16
    zero = tl.full((), 0.0, tl.float32)
    norm, entropy, g_logp, g_entropy, g_lse = zero, zero, zero, zero, zero
    if g_logps_ptr is not None:
        g_logp = tl.load(g_logps_ptr + row)
    if g_entropy_ptr is not None:
        norm = tl.load(saved_ptr + tl.num_programs(0) + row)
        entropy = tl.load(entropy_ptr + row)
        g_entropy = tl.load(g_entropy_ptr + row)
    if g_lse_ptr is not None:
        g_lse = tl.load(g_lse_ptr + row)
    live = (g_logp != 0.0) | (g_entropy != 0.0) | (g_lse != 0.0)
    dz_label = outer * label_gradient(tl.load(logps_ptr + row), entropy, g_logp, g_entropy, g_lse)
    weight = g_logp - g_lse

    in_block = basis_ptr + row.to(tl.int64) * basis_stride + start
    out_block = out_ptr + row.to(tl.int64) * out_stride + start
    offsets = tl.arange(0, BLOCK)
    target = tl.load(label_ptr + row) - first_col - start
    end = tl.where(live, n_cols, 0) - start
    if end >= BLOCK:
        d = tl.load(in_block + offsets).to(tl.float32)
        dz = basis_to_dz(d, outer, norm, entropy, weight, g_entropy, g_entropy_ptr is not None, IS_16_BIT)
        value = tl.where(offsets == target, dz_label, dz)
        tl.store(out_block + offsets, value.to(out_ptr.dtype.element_ty))
    else:
        mask = offsets < n_cols - start
        d = tl.load(in_block + offsets, mask=offsets < end, other=0.0).to(tl.float32)
        dz = basis_to_dz(d, outer, norm, entropy, weight, g_entropy, g_entropy_ptr is not None, IS_16_BIT)
        value = tl.where(offsets < end, tl.where(offsets == target, dz_label, dz), 0.0)
        tl.store(out_block + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


def from_basis(basis, labels, saved, logps, entropy, g_logps, g_entropy, g_lse, outer, out, first_col=0):
    """`gradient`, but from the basis [N, V] of logits without a softcap and the labels' logps [N]."""
    n_rows, n_cols = basis.shape
    shape = launch_shape(n_cols, out.element_size())
    grid = n_rows, triton.cdiv(n_cols, shape["BLOCK"])
    if basis.numel():
        from_basis_kernel[grid](
            basis, out, labels, saved, logps, entropy, g_logps, g_entropy, g_lse, first_col, n_cols, basis.stride(0),
            out.stride(0), outer, BLOCK=shape["BLOCK"], num_warps=shape["num_warps"],
        )  # fmt: skip
