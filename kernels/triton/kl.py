"""Exact KL between two rows of logits over the whole vocabulary, in one read of both, and its gradient.

With p the policy's softmax and q the reference's:

    reverse   KL(p || q) = sum p (log p - log q)        d/dz = p (log p - log q - KL)
    forward   KL(q || p) = sum q (log q - log p)        d/dz = p - q
    js        w KL(q || m) + (1 - w) KL(p || m),  m = w q + (1 - w) p
              d/dz = (1 - w) p (log p - log m - KL(p || m))

Reverse and forward keep an online softmax of each side (see statistics.py) and the running sum of e^x (x - y), whose
terms are shifted by both maxima: a constant added to either row costs no digits. js needs both normalisers before its
first term, so its program reads the rows a second time, out of the cache.

A token of probability 0 under p counts nothing, whatever q gives it. One that p may say and q may not makes the reverse
KL +inf; its row's gradient is then NaN.
"""

import torch

import triton
import triton.language as tl

from .gradient import gradient_shape
from .rowmath import FLOOR, LN2, LOG2E, LOWEST, before_row, expm1, load_scaled, log2, row_start
from .statistics import label_logp, launch_shape

# Rows of tokens[TOKEN_FIELDS, N]. Results, then what the backward needs; shifts and norms are base 2.
KL, LOGP, REF_LOGP, ENTROPY = (tl.constexpr(i) for i in range(4))
SHIFT, NORM, REF_SHIFT, REF_NORM, CENTER = (tl.constexpr(i) for i in range(4, 9))
TOKEN_FIELDS = 9


@triton.jit
def start_pair(R: tl.constexpr):
    """Before any column: (shift, d) of the policy, of the reference, sum of e^x (x - y) or e^y (y - x), of e^x x."""
    zeros = tl.zeros([R], tl.float32)
    lowest = tl.full([R], LOWEST, tl.float32)
    return lowest, zeros, lowest, zeros, zeros, zeros


@triton.jit
def steps(old, shift, ref_old, ref_shift, DIRECTION: tl.constexpr):
    """How far both maxima moved. An infinite sum stays one: its side's step never makes a factor of 0."""
    step, ref_step = old - shift, ref_old - ref_shift
    if DIRECTION == "reverse":
        step = tl.maximum(step, -126.0)
    elif DIRECTION == "forward":
        ref_step = tl.maximum(ref_step, -126.0)
    return step, ref_step


@triton.jit
def fold_pair(x, y, state, scale, ref_scale, DIRECTION: tl.constexpr, WITH_ENTROPY: tl.constexpr):
    """Take x and y [R, GROUP], of policy and reference, into the state [R]."""
    old, d, ref_old, ref_d, total, t = state
    shift = tl.maximum(old, tl.max(x, 1) * scale)
    ref_shift = tl.maximum(ref_old, tl.max(y, 1) * ref_scale)
    step, ref_step = steps(old, shift, ref_old, ref_shift, DIRECTION)
    rescale, ref_rescale = tl.exp2(step), tl.exp2(ref_step)
    u = tl.fma(x, scale, -shift[:, None])
    v = tl.fma(y, ref_scale, -ref_shift[:, None])
    e, f = tl.exp2(u), tl.exp2(v)
    if DIRECTION == "reverse":
        total = (total + (step - ref_step) * d) * rescale + tl.sum(e * tl.where(e > 0.0, u - v, 0.0), 1)
    elif DIRECTION == "forward":
        total = (total + (ref_step - step) * ref_d) * ref_rescale + tl.sum(f * tl.where(f > 0.0, v - u, 0.0), 1)
    if WITH_ENTROPY:
        t = (t + step * d) * rescale + tl.sum(e * tl.maximum(u, FLOOR), 1)
    return shift, d * rescale + tl.sum(e, 1), ref_shift, ref_d * ref_rescale + tl.sum(f, 1), total, t


@triton.jit
def merge_pair(state, DIRECTION: tl.constexpr):
    """One state out of the lanes' states [R]."""
    old, d, ref_old, ref_d, total, t = state
    shift, ref_shift = tl.max(old, 0), tl.max(ref_old, 0)
    step, ref_step = steps(old, shift, ref_old, ref_shift, DIRECTION)
    rescale, ref_rescale = tl.exp2(step), tl.exp2(ref_step)
    if DIRECTION == "reverse":
        total = (total + (step - ref_step) * d) * rescale
    elif DIRECTION == "forward":
        total = (total + (ref_step - step) * ref_d) * ref_rescale
    t = (t + step * d) * rescale
    return (
        shift, tl.sum(d * rescale, 0), ref_shift, tl.sum(ref_d * ref_rescale, 0), tl.sum(total, 0), tl.sum(t, 0)
    )  # fmt: skip


@triton.jit
def combine_pair(a, b, DIRECTION: tl.constexpr):
    """One state out of two scalar ones."""
    shift_a, d_a, ref_shift_a, ref_d_a, total_a, t_a = a
    shift_b, d_b, ref_shift_b, ref_d_b, total_b, t_b = b
    shift, ref_shift = tl.maximum(shift_a, shift_b), tl.maximum(ref_shift_a, ref_shift_b)
    step_a, ref_a = steps(shift_a, shift, ref_shift_a, ref_shift, DIRECTION)
    step_b, ref_b = steps(shift_b, shift, ref_shift_b, ref_shift, DIRECTION)
    r_a, r_b, q_a, q_b = tl.exp2(step_a), tl.exp2(step_b), tl.exp2(ref_a), tl.exp2(ref_b)
    if DIRECTION == "reverse":
        total_a = (total_a + (step_a - ref_a) * d_a) * r_a + (total_b + (step_b - ref_b) * d_b) * r_b
    elif DIRECTION == "forward":
        total_a = (total_a + (ref_a - step_a) * ref_d_a) * q_a + (total_b + (ref_b - step_b) * ref_d_b) * q_b
    t = (t_a + step_a * d_a) * r_a + (t_b + step_b * d_b) * r_b
    return shift, d_a * r_a + d_b * r_b, ref_shift, ref_d_a * q_a + ref_d_b * q_b, total_a, t


@triton.jit
def scan_pair(
    x_row, ref_row, n_cols, scale, inner, ref_scale, ref_inner,
    DIRECTION: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The state of one whole row of either side; n_cols = 0 reads nothing. Whole groups begin at GROUP's boundary."""
    R: tl.constexpr = BLOCK // GROUP
    offsets = (tl.arange(0, R) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    lead = tl.minimum((GROUP - before_row(x_row, GROUP)) % GROUP, n_cols)
    x_body, ref_body = x_row + lead, ref_row + lead
    if GROUP > 1:
        x_body, ref_body = tl.multiple_of(x_body, 16), tl.multiple_of(ref_body, 16)
    body = (n_cols - lead) // GROUP * GROUP
    full = body // BLOCK * BLOCK
    state = start_pair(R)
    for start in tl.range(0, full, BLOCK):
        x = load_scaled(x_body + start + offsets, None, inner)
        y = load_scaled(ref_body + start + offsets, None, ref_inner)
        state = fold_pair(x, y, state, scale, ref_scale, DIRECTION, WITH_ENTROPY)
    if full < body:
        mask = full + offsets < body
        x = load_scaled(x_body + full + offsets, mask, inner)
        y = load_scaled(ref_body + full + offsets, mask, ref_inner)
        state = fold_pair(x, y, state, scale, ref_scale, DIRECTION, WITH_ENTROPY)
    pair = merge_pair(state, DIRECTION)
    if (lead > 0) | (lead + body < n_cols):
        # Columns [0, lead) and [lead + body, n_cols): at most one group each.
        left = tl.arange(0, 2) * (lead + body)
        right = tl.where(tl.arange(0, 2) == 0, lead, n_cols)
        columns = left[:, None] + tl.arange(0, GROUP)[None, :]
        mask = columns < right[:, None]
        x = load_scaled(x_row + columns, mask, inner)
        y = load_scaled(ref_row + columns, mask, ref_inner)
        edges = fold_pair(x, y, start_pair(2), scale, ref_scale, DIRECTION, WITH_ENTROPY)
        pair = combine_pair(pair, merge_pair(edges, DIRECTION), DIRECTION)
    return pair


@triton.jit
def above_mixture(log2p, log2q, WEIGHT: tl.constexpr):
    """(log2 p - log2 m, log2 q - log2 m), m = weight q + (1 - weight) p; both exactly 0 where p = q.

    Of the two weights the smaller is rounded, the larger what it leaves: their sum is 1. The hardware's logarithm is
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
def mixture_sums(
    x_row, ref_row, n_cols, row, scale, inner, ref_scale, ref_inner, WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(KL(p || m), KL(q || m)) in base 2 of m = weight q + (1 - weight) p; row: shift, norm, ref_shift, ref_norm."""
    shift, norm, ref_shift, ref_norm = row
    offsets = tl.arange(0, BLOCK)
    of_p, of_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, n_cols, BLOCK):
        mask = start + offsets < n_cols
        x = load_scaled(x_row + start + offsets, mask, inner)
        y = load_scaled(ref_row + start + offsets, mask, ref_inner)
        log2p = tl.fma(x, scale, -shift) - norm
        log2q = tl.fma(y, ref_scale, -ref_shift) - ref_norm
        p, q = tl.exp2(log2p), tl.exp2(log2q)
        p_above, q_above = above_mixture(log2p, log2q, WEIGHT)
        of_p += tl.where(p > 0.0, p * p_above, p)
        of_q += tl.where(q > 0.0, q * q_above, q)
    return tl.sum(of_p, 0), tl.sum(of_q, 0)


@triton.jit(
    do_not_specialize=["inner_rows", "x_stride_outer", "x_stride_inner", "ref_stride_outer", "ref_stride_inner"],
    do_not_specialize_on_alignment=["x_ptr", "ref_ptr", "label_ptr"],
)
def kl_kernel(
    x_ptr, ref_ptr, label_ptr, tokens_ptr,
    inner_rows, n_cols, x_stride_outer: tl.int64, x_stride_inner: tl.int64, ref_stride_outer: tl.int64,
    ref_stride_inner: tl.int64, outer, inner, ref_outer, ref_inner,
    DIRECTION: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a row of x and ref; label < 0: nothing is read, zeros are written. LABELS: with log-probs, entropy.

    DIRECTION: "reverse", "forward", or js's weight of the reference.
    """
    row, n_rows = tl.program_id(0), tl.num_programs(0)
    label = tl.load(label_ptr + row)
    valid = label >= 0
    x_row = row_start(x_ptr, row, inner_rows, x_stride_outer, x_stride_inner)
    ref_row = row_start(ref_ptr, row, inner_rows, ref_stride_outer, ref_stride_inner)
    columns = tl.where(valid, n_cols, 0)
    scale, ref_scale = outer * LOG2E, ref_outer * LOG2E
    shift, d, ref_shift, ref_d, total, t = scan_pair(
        x_row, ref_row, columns, scale, inner, ref_scale, ref_inner, DIRECTION, LABELS, BLOCK, GROUP
    )
    norm, ref_norm = log2(d), log2(ref_d)
    if DIRECTION == "reverse":
        kl = (total / d - norm + ref_norm) * LN2
        center = kl
    elif DIRECTION == "forward":
        kl = (total / ref_d - ref_norm + norm) * LN2
        center = kl * 0.0
    else:
        sides = shift, norm, ref_shift, ref_norm
        of_p, of_q = mixture_sums(
            x_row, ref_row, columns, sides, scale, inner, ref_scale, ref_inner, DIRECTION, BLOCK // 2
        )
        kl = (DIRECTION * of_q + (1.0 - DIRECTION) * of_p) * LN2
        center = of_p * LN2
    kl = tl.where(kl < 0.0, 0.0, kl)  # rounding; NaN stays
    out = tokens_ptr + row
    tl.store(out + KL * n_rows, tl.where(valid, kl, 0.0))
    tl.store(out + SHIFT * n_rows, shift)
    tl.store(out + NORM * n_rows, tl.where(valid, norm, float("inf")))  # inf marks a row that does not count
    tl.store(out + REF_SHIFT * n_rows, ref_shift)
    tl.store(out + REF_NORM * n_rows, ref_norm)
    tl.store(out + CENTER * n_rows, tl.where(valid, center, 0.0))
    if LABELS:
        logp, _ = label_logp(x_row, tl.where(valid, label, 0), valid, (shift, d), scale, inner)
        ref_logp, _ = label_logp(ref_row, tl.where(valid, label, 0), valid, (ref_shift, ref_d), ref_scale, ref_inner)
        tl.store(out + LOGP * n_rows, tl.where(valid, logp, 0.0))
        tl.store(out + REF_LOGP * n_rows, tl.where(valid, ref_logp, 0.0))
        tl.store(out + ENTROPY * n_rows, tl.where(valid, (norm - t / d) * LN2, 0.0))


@triton.jit(
    do_not_specialize=["inner_rows", "x_stride_outer", "x_stride_inner", "ref_stride_outer", "ref_stride_inner"]
)
def mixture_kernel(
    x_ptr, ref_ptr, tokens_ptr, sums_ptr,
    inner_rows, n_cols, x_stride_outer: tl.int64, x_stride_inner: tl.int64, ref_stride_outer: tl.int64,
    ref_stride_inner: tl.int64, outer, inner, ref_outer, ref_inner,
    WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: sums [2, rows] over these columns, with the shifts and norms of whole rows in tokens."""
    row, n_rows = tl.program_id(0), tl.num_programs(0)
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
        x_row, ref_row, columns, sides, outer * LOG2E, inner, ref_outer * LOG2E, ref_inner, WEIGHT, BLOCK
    )
    tl.store(sums_ptr + row, of_p * LN2)
    tl.store(sums_ptr + n_rows + row, of_q * LN2)


def mixture(logits, ref_logits, tokens, scaling, ref_scaling, weight):
    """[2, N]: what the columns of logits, ref_logits[O, I, V] add to KL(p || m) and KL(q || m).

    tokens: of whole rows, of which V may be a part.
    """
    sums = torch.empty_like(tokens[:2])
    if sums.numel():
        shape = launch_shape(logits.shape[2], logits.element_size())
        mixture_kernel[(tokens.shape[1],)](
            logits, ref_logits, tokens, sums, logits.shape[1], logits.shape[2], logits.stride(0), logits.stride(1),
            ref_logits.stride(0), ref_logits.stride(1), *scaling, *ref_scaling,
            WEIGHT=weight, BLOCK=shape["BLOCK"] // 2, num_warps=shape["num_warps"],
        )  # fmt: skip
    return sums


def phase(logits):
    """Where rows begin, counted in bytes from 16-byte boundaries: of the first row, and from one row to the next."""
    size = logits.element_size()
    return [n % 16 for n in (logits.data_ptr(), logits.stride(0) * size, logits.stride(1) * size)]


def kl(logits, ref_logits, labels, scaling, ref_scaling, direction, with_labels):
    """tokens[9, N] for logits and ref_logits[O, I, V] (columns side by side), labels[N] >= 0 where a row counts.

    scaling, ref_scaling: (outer, inner). direction: "reverse", "forward", or js's weight of the reference.
    """
    n_rows, n_cols = labels.numel(), logits.shape[2]
    tokens = torch.empty(TOKEN_FIELDS, n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        shape = launch_shape(n_cols, logits.element_size())
        same = logits.dtype == ref_logits.dtype and phase(logits) == phase(ref_logits)
        kl_kernel[(n_rows,)](
            logits, ref_logits, labels, tokens, logits.shape[1], n_cols, logits.stride(0), logits.stride(1),
            ref_logits.stride(0), ref_logits.stride(1), *scaling, *ref_scaling,
            DIRECTION=direction, LABELS=with_labels, **shape | ({} if same else {"GROUP": 1, "BLOCK": 1024}),
        )  # fmt: skip
    return tokens


@triton.jit
def kl_columns(
    x_block, ref_block, out_block, read, write, target, row, grads, dz_target, outer, inner, ref_scale, ref_inner,
    DIRECTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row under their masks; dz_target: the log-prob's part at column `target`."""
    shift, norm, ref_shift, ref_norm, center, entropy = row
    g_kl, g_logp, g_entropy = grads
    offsets = tl.arange(0, BLOCK)
    x = load_scaled(x_block + offsets, read, inner)
    y = load_scaled(ref_block + offsets, read, ref_inner)
    log2p = tl.fma(x, outer * LOG2E, -shift) - norm
    log2q = tl.fma(y, ref_scale, -ref_shift) - ref_norm
    p = tl.exp2(log2p)
    logp = tl.where(log2p < FLOOR, FLOOR, log2p) * LN2
    dz = tl.where(offsets == target, dz_target, -g_logp * p) - g_entropy * p * (logp + entropy)
    if DIRECTION == "reverse":
        dz += tl.where(p > 0.0, g_kl * p * ((log2p - log2q) * LN2 - center), p)
    elif DIRECTION == "forward":
        dz += g_kl * (p - tl.exp2(log2q))
    else:
        p_above, _ = above_mixture(log2p, log2q, DIRECTION)
        dz += tl.where(p > 0.0, g_kl * (1.0 - DIRECTION) * p * (p_above * LN2 - center), p)
    if inner is not None:
        dz = dz * (1.0 - x * x) * inner
    value = tl.where(read, dz * outer, 0.0)
    tl.store(out_block + offsets, value.to(out_block.dtype.element_ty), mask=write)


@triton.jit(do_not_specialize=["inner_rows"])
def kl_gradient_kernel(
    x_ptr, ref_ptr, out_ptr, label_ptr, tokens_ptr, grads_ptr,
    inner_rows, n_cols, x_stride_outer, x_stride_inner, ref_stride_outer, ref_stride_inner, out_stride_outer,
    out_stride_inner, outer, inner, ref_outer, ref_inner,
    DIRECTION: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows on grid axis 0, blocks of columns on axis 1. grads [3, N]: of the KL, the log-prob, the entropy."""
    row, n_rows = tl.program_id(0), tl.num_programs(0)
    tokens = tokens_ptr + row
    zero = tl.full((), 0.0, tl.float32)
    g_logp, g_entropy, entropy, dz_target = zero, zero, zero, zero
    g_kl = tl.load(grads_ptr + row)
    if LABELS:
        g_logp = tl.load(grads_ptr + n_rows + row)
        g_entropy = tl.load(grads_ptr + 2 * n_rows + row)
        entropy = tl.load(tokens + ENTROPY * n_rows)
        dz_target = -g_logp * expm1(tl.load(tokens + LOGP * n_rows))  # exact where p is close to 1
    norm = tl.load(tokens + NORM * n_rows)
    sides = (
        tl.load(tokens + SHIFT * n_rows), norm, tl.load(tokens + REF_SHIFT * n_rows),
        tl.load(tokens + REF_NORM * n_rows), tl.load(tokens + CENTER * n_rows), entropy,
    )  # fmt: skip
    grads = g_kl, g_logp, g_entropy
    live = (norm != float("inf")) & ((g_kl != 0.0) | (g_logp != 0.0) | (g_entropy != 0.0))
    x_row = row_start(x_ptr, row, inner_rows, x_stride_outer, x_stride_inner)
    ref_row = row_start(ref_ptr, row, inner_rows, ref_stride_outer, ref_stride_inner)
    out_row = row_start(out_ptr, row, inner_rows, out_stride_outer, out_stride_inner)
    start = tl.program_id(1) * BLOCK - before_row(out_row, GROUP)
    x_block, ref_block, out_block = x_row + start, ref_row + start, out_row + start
    target = tl.load(label_ptr + row) - start
    end = tl.minimum(n_cols - start, BLOCK)
    offsets = tl.arange(0, BLOCK)
    ref_scale = ref_outer * LOG2E
    if (start >= 0) & (end % GROUP == 0):  # whole groups: 16 bytes a load and a store
        if GROUP > 1:
            x_block, ref_block = tl.multiple_of(x_block, 16), tl.multiple_of(ref_block, 16)
            out_block = tl.multiple_of(out_block, 16)
        write = offsets < tl.multiple_of(end, GROUP)
        read = offsets < tl.multiple_of(tl.where(live, end, 0), GROUP)
        kl_columns(
            x_block, ref_block, out_block, read, write, target, sides, grads, dz_target, outer, inner, ref_scale,
            ref_inner, DIRECTION, BLOCK,
        )  # fmt: skip
    else:
        write = (offsets >= -start) & (offsets < end)
        read = (offsets >= -start) & (offsets < tl.where(live, end, 0))
        kl_columns(
            x_block, ref_block, out_block, read, write, target, sides, grads, dz_target, outer, inner, ref_scale,
            ref_inner, DIRECTION, BLOCK,
        )  # fmt: skip


def kl_gradient(logits, ref_logits, labels, tokens, grads, scaling, ref_scaling, direction, with_labels, out):
    """Write into out[O, I, V] the gradient in logits[O, I, V]; both may be the same. tokens: from `kl`.

    grads[3, N] fp32: of the KL, and, read only with labels, of the log-prob and the entropy.
    """
    grid, shape = gradient_shape(logits, out)
    if phase(logits) != phase(ref_logits) or logits.dtype != ref_logits.dtype:
        shape["GROUP"] = 1
        grid = grid[0], triton.cdiv(logits.shape[2], shape["BLOCK"])
    if logits.numel():
        kl_gradient_kernel[grid](
            logits, ref_logits, out, labels, tokens, grads, logits.shape[1], logits.shape[2],
            logits.stride(0), logits.stride(1), ref_logits.stride(0), ref_logits.stride(1), out.stride(0),
            out.stride(1), *scaling, *ref_scaling, DIRECTION=direction, LABELS=with_labels, **shape,
        )  # fmt: skip
