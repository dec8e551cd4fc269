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

from .launch import launch_shape, row_programs
from .rowmath import FLOOR, LN2, LOG2E, edge_columns, expm1, load_scaled, row_start, whole_groups
from .statistics import statistics


@triton.jit
def label_gradient(logp, entropy, g_logp, g_entropy, g_lse):
    """The gradient in the label's scaled logit from its log-prob: exact where that is close to 0."""
    floored = tl.where(logp < FLOOR * LN2, FLOOR * LN2, logp)
    return tl.exp2(logp * LOG2E) * (g_lse - g_entropy * (floored + entropy)) - g_logp * expm1(logp)


@triton.jit
def gradient_columns(
    x_pointers, out_pointers, read, write, at_label, dz_label, row, grads, outer, inner, WITH_ENTROPY: tl.constexpr
):  # fmt: skip
    """Some columns of one row under their masks, dz_label where at_label is. What is not read gets 0."""
    shift, norm, entropy = row
    weight, g_entropy = grads
    y = load_scaled(x_pointers, read, inner)
    log2p = tl.fma(y, outer * LOG2E, -shift) - norm
    if WITH_ENTROPY:
        logp = tl.where(log2p < FLOOR, FLOOR, log2p) * LN2
        weight = weight - g_entropy * (logp + entropy)
    dz = tl.where(at_label, dz_label, tl.exp2(log2p) * weight)
    if inner is not None:
        dz = tl.where(read, dz * (1.0 - y * y) * inner, 0.0)
    tl.store(out_pointers, (dz * outer).to(out_pointers.dtype.element_ty), mask=write)


@triton.jit
def gradient_row(
    x_row, out_row, label, n_cols, first, step, shift, norm, logp, entropy, g_logp, g_entropy, g_lse, outer, inner,
    WITH_ENTROPY: tl.constexpr, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Blocks first, first + step, ... of the columns of one row, logp its label's; BACKWARDS: counted from the end.

    Blocks begin at 16-byte boundaries; the columns outside of them belong to the program whose `first` is 0. A row
    that does not count is not read.
    """
    live = (norm != float("inf")) & ((g_logp != 0.0) | (g_entropy != 0.0) | (g_lse != 0.0))
    dz_label = label_gradient(logp, entropy, g_logp, g_entropy, g_lse)
    label = tl.where((label >= 0) & (label < n_cols) & live, label, -1).to(tl.int32)
    # With these numbers a column that is not read, -inf, has the gradient 0, whatever the row's own are.
    row = tl.where(live, shift, 0.0), tl.where(live, norm, 0.0), tl.where(live, entropy, 0.0)
    grads = tl.where(live, g_lse - g_logp, 0.0), tl.where(live, g_entropy, 0.0)

    lead, body = whole_groups(out_row, n_cols, GROUP)
    x_body, out_body = x_row + lead, out_row + lead
    if GROUP > 1:
        x_body, out_body = tl.multiple_of(x_body, 16), tl.multiple_of(out_body, 16)
    offsets = tl.arange(0, BLOCK)
    last = tl.maximum(body - 1, 0) // BLOCK * BLOCK
    for turn in tl.range(first * BLOCK, body, step * BLOCK):
        start = tl.multiple_of(last - turn if BACKWARDS else turn, BLOCK)
        end = tl.multiple_of(body - start, GROUP)
        read = offsets < tl.multiple_of(tl.where(live, end, 0), GROUP)
        gradient_columns(
            x_body + start + offsets, out_body + start + offsets, read, offsets < end,
            offsets == label - lead - start, dz_label, row, grads, outer, inner, WITH_ENTROPY,
        )  # fmt: skip
    if (first == 0) & ((lead > 0) | (lead + body < n_cols)):
        columns, inside = edge_columns(lead, body, n_cols, GROUP)
        read = inside & (columns < tl.where(live, n_cols, 0))
        gradient_columns(
            x_row + columns, out_row + columns, read, inside, columns == label, dz_label, row, grads, outer,
            inner, WITH_ENTROPY,
        )  # fmt: skip


@triton.jit
def gradient_kernel(
    x_ptr, out_ptr, label_ptr, saved_ptr, entropy_ptr, g_logps_ptr, g_entropy_ptr, g_lse_ptr,
    first_col, inner_rows, n_cols, x_stride_outer, x_stride_inner, out_stride_outer, out_stride_inner, outer, inner,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows on grid axis 0, a row's programs on axis 1; labels count from the vocabulary's column `first_col` on."""
    row, n_rows = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    label = tl.load(label_ptr + row) - first_col
    shift = tl.load(saved_ptr + row)
    norm = tl.load(saved_ptr + n_rows + row)
    logp = tl.load(saved_ptr + 2 * n_rows + row)
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
    gradient_row(
        x_row, out_row, label, n_cols, tl.program_id(1), tl.num_programs(1), shift, norm, logp, entropy, g_logp,
        g_entropy, g_lse, outer, inner, g_entropy_ptr is not None, False, BLOCK, GROUP,
    )  # fmt: skip


def gradient_shape(kernel: str, logits: torch.Tensor, out: torch.Tensor) -> tuple[tuple[int, int], dict]:
    """(grid, launch shape). GROUP is 1, no alignment known, unless rows of both begin equally far from a boundary."""
    n_cols, group = logits.shape[2], 16 // out.element_size()
    offsets = [
        (t.data_ptr() // t.element_size() % group, t.stride(0) % group, t.stride(1) % group) for t in (logits, out)
    ]
    shape = launch_shape(kernel, n_cols, out.element_size(), logits.device)
    if offsets[0] != offsets[1] or out.element_size() > logits.element_size():
        shape["GROUP"] = 1
    return (logits.shape[0] * logits.shape[1], row_programs(n_cols, shape["BLOCK"], shape.pop("TURNS"))), shape


def gradient(logits, labels, saved, entropy, g_logps, g_entropy, g_lse, outer, inner, out, first_col=0):
    """Write into out[O, I, V] the gradient with respect to logits[O, I, V]; either may be strided, or both the same.

    saved and entropy: from `statistics`. g_*: [O * I] fp32 or None. first_col: the vocabulary index of column 0.
    """
    grid, shape = gradient_shape("gradient", logits, out)
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
def basis_columns(
    in_pointers, out_pointers, read, write, at_label, dz_label, outer, norm, entropy, grads, HAS_ENTROPY: tl.constexpr
):
    """Some columns of one row under their masks, dz_label where at_label is. What is not read gets 0."""
    weight, g_entropy = grads
    IS_16_BIT: tl.constexpr = in_pointers.dtype.element_ty.primitive_bitwidth == 16
    d = tl.load(in_pointers, mask=read, other=0.0).to(tl.float32)
    dz = basis_to_dz(d, outer, norm, entropy, weight, g_entropy, HAS_ENTROPY, IS_16_BIT)
    value = tl.where(read, tl.where(at_label, dz_label, dz), 0.0)
    tl.store(out_pointers, value.to(out_pointers.dtype.element_ty), mask=write)


@triton.jit
def from_basis_kernel(
    basis_ptr, out_ptr, label_ptr, saved_ptr, logps_ptr, entropy_ptr, g_logps_ptr, g_entropy_ptr, g_lse_ptr,
    first_col, n_cols, basis_stride, out_stride, outer, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows on grid axis 0, a row's programs on axis 1. GROUP: 1 unless rows begin at 16-byte boundaries."""
    row = tl.program_id(0)
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

    in_row = basis_ptr + row.to(tl.int64) * basis_stride
    out_row = out_ptr + row.to(tl.int64) * out_stride
    if GROUP > 1:
        in_row, out_row = tl.multiple_of(in_row, 16), tl.multiple_of(out_row, 16)
    label = tl.load(label_ptr + row) - first_col
    label = tl.where((label >= 0) & (label < n_cols) & live, label, -1).to(tl.int32)
    grads = weight, g_entropy
    offsets = tl.arange(0, BLOCK)
    body = tl.multiple_of(tl.cast(n_cols, tl.int32) // GROUP * GROUP, GROUP)  # Triton makes 1 a constant
    for start in tl.range(tl.program_id(1) * BLOCK, body, tl.num_programs(1) * BLOCK):
        end = tl.multiple_of(body - start, GROUP)
        basis_columns(
            in_row + start + offsets, out_row + start + offsets,
            offsets < tl.multiple_of(tl.where(live, end, 0), GROUP),
            offsets < end, offsets == label - start, dz_label, outer, norm, entropy, grads, g_entropy_ptr is not None,
        )  # fmt: skip
    if (tl.program_id(1) == 0) & (body < n_cols):
        columns = body + tl.arange(0, GROUP)
        inside, read = columns < n_cols, columns < tl.where(live, n_cols, 0)
        basis_columns(
            in_row + columns, out_row + columns, read, inside, columns == label, dz_label, outer, norm,
            entropy, grads, g_entropy_ptr is not None,
        )  # fmt: skip


def from_basis(basis, labels, saved, logps, entropy, g_logps, g_entropy, g_lse, outer, out, first_col=0):
    """`gradient`, but from the basis [N, V] of logits without a softcap and the labels' logps [N]."""
    n_rows, n_cols = basis.shape
    shape = launch_shape("from_basis", n_cols, min(basis.element_size(), out.element_size()), basis.device)
    grid = n_rows, row_programs(n_cols, shape["BLOCK"], shape.pop("TURNS"))
    if any(t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16 for t in (basis, out)):
        shape["GROUP"] = 1
    if basis.numel():
        from_basis_kernel[grid](
            basis, out, labels, saved, logps, entropy, g_logps, g_entropy, g_lse, first_col, n_cols, basis.stride(0),
            out.stride(0), outer, **shape,
        )  # fmt: skip
