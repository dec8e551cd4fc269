"""Exact KL between two rows of logits over the whole vocabulary, in one read of both, and its gradient.

With p the policy's softmax and q the reference's:

    reverse   KL(p || q) = sum p (log p - log q)        d/dz = p (log p - log q - KL)
    forward   KL(q || p) = sum q (log q - log p)        d/dz = p - q
    js        w KL(q || m) + (1 - w) KL(p || m),  m = w q + (1 - w) p
              d/dz = (1 - w) p (log p - log m - KL(p || m))

Reverse and forward take both rows in one scan (see kl_scan.py). js needs both normalisers before its first term, so its
program reads the rows a second time, out of the cache.

A token of probability 0 under p counts nothing, whatever q gives it. One that p may say and q may not makes the reverse
KL +inf; its row's gradient is then NaN.
"""

import torch

import triton
import triton.language as tl

from .gradient import gradient_shape, label_gradient
from .kl_scan import join_pair, scan_pair
from .launch import launch_shape
from .rowmath import (
    FLOOR,
    LN2,
    LOG2E,
    edge_columns,
    expm1,
    group_offsets,
    load_scaled,
    log2,
    row_start,
    whole_groups,
)  # fmt: skip

# Rows of tokens[TOKEN_FIELDS, N]. Results, then what the backward needs; shifts and norms are base 2.
KL, LOGP, REF_LOGP, ENTROPY = (tl.constexpr(i) for i in range(4))
SHIFT, NORM, REF_SHIFT, REF_NORM, CENTER = (tl.constexpr(i) for i in range(4, 9))
TOKEN_FIELDS = 9


@triton.jit
def above_mixture(log2p, log2q, WEIGHT: tl.constexpr):
    """(log2 p - log2 m, log2 q - log2 m), m = weight q + (1 - weight) p; both exactly 0 where p = q.

    Of the two weights the smaller is rounded, the larger what it leaves: their sum is 1. The logarithm need only be
    good to 2^-22 here, where it takes numbers up to 1, and exact at 1.
    """
    small = tl.full((), WEIGHT if WEIGHT < 0.5 else 1.0 - WEIGHT, tl.float32)
    of_q = small if WEIGHT < 0.5 else 1.0 - small
    of_p = 1.0 - small if WEIGHT < 0.5 else small
    apart = log2q - log2p
    of_larger = -tl.log2(
        tl.fma(tl.where(apart > 0.0, of_p, of_q), tl.exp2(-tl.abs(apart)), tl.where(apart > 0.0, of_q, of_p))
    )
    return of_larger - tl.maximum(apart, 0.0), of_larger + tl.minimum(apart, 0.0)


@triton.jit
def mixture_terms(x_pointers, ref_pointers, mask, sides, scale, inner, ref_scale, ref_inner, WEIGHT: tl.constexpr):
    """(terms of KL(p || m), of KL(q || m)) in base 2, summed over groups; 0 where the mask is off."""
    shift, norm, ref_shift, ref_norm = sides
    x, y = load_scaled(x_pointers, mask, inner), load_scaled(ref_pointers, mask, ref_inner)
    log2p = tl.fma(x, scale, -shift) - norm
    log2q = tl.fma(y, ref_scale, -ref_shift) - ref_norm
    p, q = tl.exp2(log2p), tl.exp2(log2q)
    p_above, q_above = above_mixture(log2p, log2q, WEIGHT)
    return tl.sum(tl.where(p > 0.0, p * p_above, p), 1), tl.sum(tl.where(q > 0.0, q * q_above, q), 1)


@triton.jit
def mixture_sums(
    x_row, ref_row, n_cols, sides, scale, inner, ref_scale, ref_inner, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """(KL(p || m), KL(q || m)) in base 2 of m = weight q + (1 - weight) p; sides: shift, norm, ref_shift, ref_norm.

    Whole groups begin at 16-byte boundaries, as in `scan_pair`.
    """
    lead, body = whole_groups(x_row, n_cols, GROUP)
    x_body, ref_body = tl.multiple_of(x_row + lead, 16), ref_row + lead
    if SAME:
        ref_body = tl.multiple_of(ref_body, 16)
    offsets = group_offsets(BLOCK, GROUP)
    of_p, of_q = tl.zeros([BLOCK // GROUP], tl.float32), tl.zeros([BLOCK // GROUP], tl.float32)
    for start in tl.range(0, body, BLOCK):
        at = start + offsets
        more_p, more_q = mixture_terms(
            x_body + at, ref_body + at, at < body, sides, scale, inner, ref_scale, ref_inner, WEIGHT
        )
        of_p += more_p
        of_q += more_q
    sum_p, sum_q = tl.sum(of_p, 0), tl.sum(of_q, 0)
    if (lead > 0) | (lead + body < n_cols):
        columns, inside = edge_columns(lead, body, n_cols, GROUP)
        more_p, more_q = mixture_terms(
            x_row + columns, ref_row + columns, inside, sides, scale, inner, ref_scale, ref_inner, WEIGHT
        )
        sum_p += tl.sum(more_p, 0)
        sum_q += tl.sum(more_q, 0)
    return sum_p, sum_q


@triton.jit(
    do_not_specialize=["inner_rows", "x_stride_outer", "x_stride_inner", "ref_stride_outer", "ref_stride_inner"],
    do_not_specialize_on_alignment=["x_ptr", "ref_ptr", "label_ptr"],
)
def kl_kernel(
    x_ptr, ref_ptr, label_ptr, tokens_ptr,
    inner_rows, n_cols, x_stride_outer: tl.int64, x_stride_inner: tl.int64, ref_stride_outer: tl.int64,
    ref_stride_inner: tl.int64, outer, inner, ref_outer, ref_inner,
    DIRECTION: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """One program a row of x and ref; label < 0: nothing is read, zeros are written. LABELS: with log-probs, entropy.

    DIRECTION: "reverse", "forward", or js's weight of the reference.
    """
    row, n_rows = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    valid = label >= 0
    x_row = row_start(x_ptr, row, inner_rows, x_stride_outer, x_stride_inner)
    ref_row = row_start(ref_ptr, row, inner_rows, ref_stride_outer, ref_stride_inner)
    columns = tl.where(valid, n_cols, 0)
    scale, ref_scale = outer * LOG2E, ref_outer * LOG2E
    out = tokens_ptr + row
    pair = scan_pair(
        x_row, ref_row, label, columns, scale, inner, ref_scale, ref_inner, DIRECTION, LABELS, BLOCK, GROUP, SAME
    )
    if LABELS:
        target = tl.where(valid, label, 0)
        x, y = load_scaled(x_row + target, valid, inner), load_scaled(ref_row + target, valid, ref_inner)
        policy, reference, total, entropy = join_pair(pair, x, y, scale, ref_scale, DIRECTION)
        shift, norm, d, log2_d, logp = policy
        ref_shift, ref_norm, ref_d, ref_log2_d, ref_logp = reference
        tl.store(out + LOGP * n_rows, tl.where(valid, logp, 0.0))
        tl.store(out + REF_LOGP * n_rows, tl.where(valid, ref_logp, 0.0))
        tl.store(out + ENTROPY * n_rows, tl.where(valid, entropy, 0.0))
    else:
        shift, d, ref_shift, ref_d, total, _ = pair
        norm, ref_norm = log2(d), log2(ref_d)
        log2_d, ref_log2_d = norm, ref_norm
    if DIRECTION == "reverse":
        kl = (total / d - log2_d + ref_log2_d) * LN2
        center = kl
    elif DIRECTION == "forward":
        kl = (total / ref_d - ref_log2_d + log2_d) * LN2
        center = kl * 0.0
    else:
        sides = shift, norm, ref_shift, ref_norm
        of_p, of_q = mixture_sums(
            x_row,
            ref_row,
            columns,
            sides,
            scale,
            inner,
            ref_scale,
            ref_inner,
            DIRECTION,
            BLOCK // 2,
            GROUP,
            SAME,
        )
        kl = (DIRECTION * of_q + (1.0 - DIRECTION) * of_p) * LN2
        center = of_p * LN2
    kl = tl.where(kl < 0.0, 0.0, kl)  # rounding; NaN stays
    tl.store(out + KL * n_rows, tl.where(valid, kl, 0.0))
    tl.store(out + SHIFT * n_rows, shift)
    tl.store(out + NORM * n_rows, tl.where(valid, norm, float("inf")))  # inf marks a row that does not count
    tl.store(out + REF_SHIFT * n_rows, ref_shift)
    tl.store(out + REF_NORM * n_rows, ref_norm)
    tl.store(out + CENTER * n_rows, tl.where(valid, center, 0.0))


@triton.jit(
    do_not_specialize=["inner_rows", "x_stride_outer", "x_stride_inner", "ref_stride_outer", "ref_stride_inner"]
)
def mixture_kernel(
    x_ptr, ref_ptr, tokens_ptr, sums_ptr,
    inner_rows, n_cols, x_stride_outer: tl.int64, x_stride_inner: tl.int64, ref_stride_outer: tl.int64,
    ref_stride_inner: tl.int64, outer, inner, ref_outer, ref_inner,
    WEIGHT: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """One program a row: sums [2, rows] over these columns, with the shifts and norms of whole rows in tokens."""
    row, n_rows = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    tokens = tokens_ptr + row
    norm = tl.load(tokens + NORM * n_rows)
    sides = (
        tl.load(tokens + SHIFT * n_rows), norm, tl.load(tokens + REF_SHIFT * n_rows),
        tl.load(tokens + REF_NORM * n_rows),
    )  # fmt: skip
    x_row = row_start(x_ptr, row, inner_rows, x_stride_outer, x_stride_inner)
    ref_row = row_start(ref_ptr, row, inner_rows, ref_stride_outer, ref_stride_inner)
    columns = tl.where(norm != float("inf"), n_cols, 0)
    of_p, of_q = mixture_sums(
        x_row, ref_row, columns, sides, outer * LOG2E, inner, ref_outer * LOG2E, ref_inner, WEIGHT, BLOCK, GROUP, SAME
    )
    tl.store(sums_ptr + row, of_p * LN2)
    tl.store(sums_ptr + n_rows + row, of_q * LN2)


def phase(logits):
    """Where rows begin, counted in bytes from 16-byte boundaries: of the first row, and from one row to the next."""
    size = logits.element_size()
    return [n % 16 for n in (logits.data_ptr(), logits.stride(0) * size, logits.stride(1) * size)]


def same_phase(logits, ref_logits) -> bool:
    """Whether the rows of both begin equally far from 16-byte boundaries, in elements of the same size."""
    return logits.dtype == ref_logits.dtype and phase(logits) == phase(ref_logits)


def pair_shape(kernel: str, logits, ref_logits) -> dict:
    """The launch shape of a scan of both. SAME: the rows of both reach 16-byte boundaries in the same columns."""
    shape = launch_shape(kernel, logits.shape[2], logits.element_size(), logits.device)
    return shape | {"SAME": same_phase(logits, ref_logits)}


def mixture(logits, ref_logits, tokens, scaling, ref_scaling, weight):
    """[2, N]: what the columns of logits, ref_logits[O, I, V] add to KL(p || m) and KL(q || m).

    tokens: of whole rows, of which V may be a part.
    """
    sums = torch.empty_like(tokens[:2])
    if sums.numel():
        shape = pair_shape("mixture", logits, ref_logits)
        mixture_kernel[(tokens.shape[1],)](
            logits, ref_logits, tokens, sums, logits.shape[1], logits.shape[2], logits.stride(0), logits.stride(1),
            ref_logits.stride(0), ref_logits.stride(1), *scaling, *ref_scaling,
            WEIGHT=weight, **shape,
        )  # fmt: skip
    return sums


def kl(logits, ref_logits, labels, scaling, ref_scaling, direction, with_labels):
    """tokens[9, N] for logits and ref_logits[O, I, V] (columns side by side), labels[N] >= 0 where a row counts.

    scaling, ref_scaling: (outer, inner). direction: "reverse", "forward", or js's weight of the reference.
    """
    n_rows, n_cols = labels.numel(), logits.shape[2]
    tokens = torch.empty(TOKEN_FIELDS, n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        kl_kernel[(n_rows,)](
            logits, ref_logits, labels, tokens, logits.shape[1], n_cols, logits.stride(0), logits.stride(1),
            ref_logits.stride(0), ref_logits.stride(1), *scaling, *ref_scaling,
            DIRECTION=direction, LABELS=with_labels, **pair_shape("kl", logits, ref_logits),
        )  # fmt: skip
    return tokens


@triton.jit
def weighed_gradient(log2p, log2q, p, center, g_kl, DIRECTION: tl.constexpr):
    """The gradient of the reverse KL, or of js, in scaled logits of probability p."""
    if DIRECTION == "reverse":
        return tl.where(p > 0.0, g_kl * p * ((log2p - log2q) * LN2 - center), p)
    else:
        p_above, _ = above_mixture(log2p, log2q, DIRECTION)
        return tl.where(p > 0.0, g_kl * (1.0 - DIRECTION) * p * (p_above * LN2 - center), p)


@triton.jit
def kl_at_label(logp, ref_logp, center, entropy, grads, DIRECTION: tl.constexpr):
    """The gradient in the label's scaled logit from its log-probs: exact where they are close to 0."""
    g_kl, g_logp, g_entropy = grads
    dz = label_gradient(logp, entropy, g_logp, g_entropy, 0.0)
    if DIRECTION == "forward":
        return dz + g_kl * (expm1(logp) - expm1(ref_logp))
    else:
        log2p = logp * LOG2E
        return dz + weighed_gradient(log2p, ref_logp * LOG2E, tl.exp2(log2p), center, g_kl, DIRECTION)


@triton.jit
def kl_columns(
    x_pointers, ref_pointers, out_pointers, read, write, at_label, dz_label, row, grads, outer, inner, ref_scale,
    ref_inner, DIRECTION: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Some columns of one row under their masks, with LABELS dz_label where at_label is. What is not read gets 0."""
    shift, norm, ref_shift, ref_norm, center, entropy = row
    g_kl, g_logp, g_entropy = grads
    x, y = load_scaled(x_pointers, read, inner), load_scaled(ref_pointers, read, ref_inner)
    log2p = tl.fma(x, outer * LOG2E, -shift) - norm
    log2q = tl.fma(y, ref_scale, -ref_shift) - ref_norm
    p = tl.exp2(log2p)
    if DIRECTION == "forward":
        dz = g_kl * (p - tl.exp2(log2q))
    else:
        dz = weighed_gradient(log2p, log2q, p, center, g_kl, DIRECTION)
    if LABELS:
        logp = tl.where(log2p < FLOOR, FLOOR, log2p) * LN2
        dz = tl.where(at_label, dz_label, dz - p * (g_logp + g_entropy * (logp + entropy)))
    if inner is not None:
        dz = dz * (1.0 - x * x) * inner
    tl.store(out_pointers, tl.where(read, dz * outer, 0.0).to(out_pointers.dtype.element_ty), mask=write)


@triton.jit(do_not_specialize=["inner_rows"])
def kl_gradient_kernel(
    x_ptr, ref_ptr, out_ptr, label_ptr, tokens_ptr, grads_ptr,
    inner_rows, n_cols, x_stride_outer, x_stride_inner, ref_stride_outer, ref_stride_inner, out_stride_outer,
    out_stride_inner, outer, inner, ref_outer, ref_inner,
    DIRECTION: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Rows on grid axis 0, a row's programs on axis 1. grads [3, N]: of the KL, the log-prob, the entropy."""
    row, n_rows = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    tokens = tokens_ptr + row
    zero = tl.full((), 0.0, tl.float32)
    g_logp, g_entropy, entropy, dz_target = zero, zero, zero, zero
    g_kl = tl.load(grads_ptr + row)
    if LABELS:
        g_logp = tl.load(grads_ptr + n_rows + row)
        g_entropy = tl.load(grads_ptr + 2 * n_rows + row)
        entropy = tl.load(tokens + ENTROPY * n_rows)
    norm = tl.load(tokens + NORM * n_rows)
    sides = (
        tl.load(tokens + SHIFT * n_rows), norm, tl.load(tokens + REF_SHIFT * n_rows),
        tl.load(tokens + REF_NORM * n_rows), tl.load(tokens + CENTER * n_rows), entropy,
    )  # fmt: skip
    grads = g_kl, g_logp, g_entropy
    if LABELS:
        logp, ref_logp = tl.load(tokens + LOGP * n_rows), tl.load(tokens + REF_LOGP * n_rows)
        dz_target = kl_at_label(logp, ref_logp, tl.load(tokens + CENTER * n_rows), entropy, grads, DIRECTION)
    live = (norm != float("inf")) & ((g_kl != 0.0) | (g_logp != 0.0) | (g_entropy != 0.0))
    x_row = row_start(x_ptr, row, inner_rows, x_stride_outer, x_stride_inner)
    ref_row = row_start(ref_ptr, row, inner_rows, ref_stride_outer, ref_stride_inner)
    out_row = row_start(out_ptr, row, inner_rows, out_stride_outer, out_stride_inner)
    label = tl.load(label_ptr + row).to(tl.int32)
    lead, body = whole_groups(out_row, n_cols, GROUP)
    x_body, ref_body, out_body = x_row + lead, ref_row + lead, out_row + lead
    if GROUP > 1:  # 16 bytes a load and a store
        x_body, out_body = tl.multiple_of(x_body, 16), tl.multiple_of(out_body, 16)
    if SAME:
        ref_body = tl.multiple_of(ref_body, 16)
    ref_scale = ref_outer * LOG2E
    offsets = tl.arange(0, BLOCK)
    for start in tl.range(tl.program_id(1) * BLOCK, body, tl.num_programs(1) * BLOCK):
        end = tl.multiple_of(body - start, GROUP)
        at = start + offsets
        kl_columns(
            x_body + at, ref_body + at, out_body + at, offsets < tl.multiple_of(tl.where(live, end, 0), GROUP),
            offsets < end, offsets == label - lead - start, dz_target, sides, grads, outer, inner, ref_scale, ref_inner,
            DIRECTION, LABELS,
        )  # fmt: skip
    if (tl.program_id(1) == 0) & ((lead > 0) | (lead + body < n_cols)):
        columns, inside = edge_columns(lead, body, n_cols, GROUP)
        read = inside & (columns < tl.where(live, n_cols, 0))
        kl_columns(
            x_row + columns, ref_row + columns, out_row + columns, read, inside, columns == label, dz_target,
            sides, grads, outer, inner, ref_scale, ref_inner, DIRECTION, LABELS,
        )  # fmt: skip


def kl_gradient(logits, ref_logits, labels, tokens, grads, scaling, ref_scaling, direction, with_labels, out):
    """Write into out[O, I, V] the gradient in logits[O, I, V]; both may be the same. tokens: from `kl`.

    grads[3, N] fp32: of the KL, and, read only with labels, of the log-prob and the entropy.
    """
    grid, shape = gradient_shape("kl_gradient", logits, out)
    shape["SAME"] = shape["GROUP"] > 1 and same_phase(logits, ref_logits)
    if logits.numel():
        kl_gradient_kernel[grid](
            logits, ref_logits, out, labels, tokens, grads, logits.shape[1], logits.shape[2],
            logits.stride(0), logits.stride(1), ref_logits.stride(0), ref_logits.stride(1), out.stride(0),
            out.stride(1), *scaling, *ref_scaling, DIRECTION=direction, LABELS=with_labels, **shape,
        )  # fmt: skip
