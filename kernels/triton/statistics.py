"""Statistics pass: one read of each row of logits gives the label's log-prob, entropy and what the backward needs.

An online softmax in groups: a thread takes GROUP neighbouring columns (16 bytes), finds their maximum, rescales its own
running sums once, and adds. Maxima and sums stay in the thread until the row ends; only then are they merged across the
program, in a fixed order. Full blocks run without a mask; the last partial block, and the few columns outside the row's
16-byte boundaries, are taken apart from them.

The sums leave the label out: the block of columns that holds it is taken under a mask, and the label joins the finished
sums. Where it is the largest, its log-prob is -log1p(the others' sum over it), exact however close to 0.

One program takes one row, in one launch. Where the rows are too few to fill the device, a row is split: each program
writes the state of one part of its columns, and a second launch merges a row's states, always in the same order.
"""

import functools

import torch

import triton
import triton.language as tl

from .launch import launch_shape
from .rowmath import (
    FLOOR,
    LN2,
    LOG2E,
    LOWEST,
    edge_columns,
    group_offsets,
    load_scaled,
    log1p,
    log2,
    row_start,
    whole_groups,
)  # fmt: skip

# Bits of OUTPUTS, in the order of TokenStats.
LOGPS = tl.constexpr(1)
ENTROPY = tl.constexpr(2)
LSE = tl.constexpr(4)
MEAN_LOGITS = tl.constexpr(8)
IS_TOP1 = tl.constexpr(16)
LOG_SUM_SQ_PROBS = tl.constexpr(32)

STATE_FIELDS = 7
SAVED_FIELDS = 3  # what a backward reads of a row: shift, log2 of the sum (inf marks an ignored row), log-prob
MAX_PARTS = 64


@triton.jit
def start_state(R: tl.constexpr):
    """The running statistics of R lanes, before any column: (shift, d, t, q, m, before, total), each [R].

    shift: maximum of y * scale; d = sum 2^u with u = y * scale - shift; t = sum 2^u * u; q = sum 4^u;
    m: maximum of y; before: maximum of y in the columns before the label; total: sum of y. None counts the label.
    """
    zeros = tl.zeros([R], tl.float32)
    lowest = tl.full([R], LOWEST, tl.float32)
    return lowest, zeros, zeros, zeros, lowest, lowest, zeros


@triton.jit
def fold(y, mask, state, scale, OUTPUTS: tl.constexpr):
    """Take y [R, GROUP] into the state, -inf where the mask is off; `before` stays."""
    old, d, t, q, m, before, total = state
    top = tl.max(y, 1)
    # The running maximum is kept scaled and rounded. Scaled anew each time, the product would be fused into the
    # subtraction, unrounded, and an unchanged maximum would rescale the sums by its rounding at every step.
    shift = tl.maximum(old, top * scale)
    step = old - shift
    rescale = tl.exp2(step)
    u = tl.fma(y, scale, -shift[:, None])
    e = tl.exp2(u)
    if ENTROPY & OUTPUTS:
        t = (t + step * d) * rescale + tl.sum(e * tl.maximum(u, FLOOR), 1)
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        q = q * (rescale * rescale) + tl.sum(e * e, 1)
    if (LSE | IS_TOP1) & OUTPUTS:
        m = tl.maximum(m, top)
    if MEAN_LOGITS & OUTPUTS:
        # + 0.0: Triton 3.6 and 3.7 crash on a loop that adds up reductions of just what it loads.
        total += tl.sum(y + 0.0 if mask is None else tl.where(mask, y, 0.0), 1)
    d = d * rescale + tl.sum(e, 1)
    return shift, d, t, q, m, before, total


@triton.jit
def fold_beside(pointers, mask, columns, label, state, scale, inner, OUTPUTS: tl.constexpr):
    """Take the columns [R, GROUP] that the mask lets through (None: all) into the state, the label left out.

    The label is left out after the load: a mask that knows it would turn 16-byte loads into single elements.
    """
    y = load_scaled(pointers, mask, inner)
    beside = columns != label
    mask = beside if mask is None else mask & beside
    y = tl.where(beside, y, float("-inf"))
    shift, d, t, q, m, before, total = fold(y, mask, state, scale, OUTPUTS)
    if IS_TOP1 & OUTPUTS:
        before = tl.maximum(before, tl.max(tl.where(columns < label, y, float("-inf")), 1))
    return shift, d, t, q, m, before, total


@triton.jit
def merge(state):
    """One state out of the lanes' states [R]."""
    old, d, t, q, m, before, total = state
    shift = tl.max(old, 0)
    step = old - shift
    rescale = tl.exp2(step)
    return (
        shift, tl.sum(d * rescale, 0), tl.sum((t + step * d) * rescale, 0), tl.sum(q * (rescale * rescale), 0),
        tl.max(m, 0), tl.max(before, 0), tl.sum(total, 0),
    )  # fmt: skip


@triton.jit
def combine(a, b):
    """One state out of two scalar ones."""
    shift_a, d_a, t_a, q_a, m_a, before_a, total_a = a
    shift_b, d_b, t_b, q_b, m_b, before_b, total_b = b
    shift = tl.maximum(shift_a, shift_b)
    step_a, step_b = shift_a - shift, shift_b - shift
    r_a, r_b = tl.exp2(step_a), tl.exp2(step_b)
    return (
        shift, d_a * r_a + d_b * r_b, (t_a + step_a * d_a) * r_a + (t_b + step_b * d_b) * r_b,
        q_a * r_a * r_a + q_b * r_b * r_b, tl.maximum(m_a, m_b), tl.maximum(before_a, before_b), total_a + total_b,
    )  # fmt: skip


@triton.jit
def scan_part(
    row_ptr, label, n_cols, begin, part_cols, scale, inner, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The state of part_cols columns of a row, from `begin` on, without the label's; n_cols = 0 reads nothing.

    `begin` and the end (but for the last part's) are multiples of BLOCK and count from the row's first 16-byte
    boundary. The columns outside the boundaries belong to the part at 0.
    """
    offsets = group_offsets(BLOCK, GROUP)
    lead, body = whole_groups(row_ptr, n_cols, GROUP)
    body_ptr = tl.multiple_of(row_ptr + lead, 16)
    end = tl.multiple_of(tl.minimum(body, begin + part_cols), GROUP)
    full = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    label = label.to(tl.int32)
    at = label - lead
    hole = tl.multiple_of(label_block(at, begin, full, BLOCK), BLOCK)

    state = start_state(BLOCK // GROUP)
    for start in tl.range(begin, hole, BLOCK):
        state = fold(load_scaled(body_ptr + start + offsets, None, inner), None, state, scale, OUTPUTS)
    if IS_TOP1 & OUTPUTS:
        shift, d, t, q, m, before, total = state
        state = shift, d, t, q, m, tl.where(at >= begin, m, before), total
    for start in tl.range(hole + BLOCK, full, BLOCK):
        state = fold(load_scaled(body_ptr + start + offsets, None, inner), None, state, scale, OUTPUTS)
    if hole < full:
        columns = hole + offsets
        state = fold_beside(body_ptr + columns, None, columns, at, state, scale, inner, OUTPUTS)
    if full < end:
        columns = full + offsets
        state = fold_beside(body_ptr + columns, columns < end, columns, at, state, scale, inner, OUTPUTS)
    part = merge(state)

    if (begin == 0) & ((lead > 0) | (lead + body < n_cols)):
        columns, inside = edge_columns(lead, body, n_cols, GROUP)
        edges = fold_beside(row_ptr + columns, inside, columns, label, start_state(2), scale, inner, OUTPUTS)
        part = combine(part, merge(edges))
    return part


@triton.jit
def label_block(at, begin, full, BLOCK: tl.constexpr):
    """Where the full block of columns that holds `at` begins, `full` if none of them does."""
    inside = (at >= begin) & (at < full)
    return tl.where(inside, begin + (at - begin) // BLOCK * BLOCK, full)


@triton.jit
def scan_row(row_ptr, label, n_cols, scale, inner, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The state of one whole row but for its label; n_cols = 0 reads nothing."""
    return scan_part(row_ptr, label, n_cols, 0, n_cols, scale, inner, OUTPUTS, BLOCK, GROUP)


@triton.jit
def log2_sum(weight, rest):
    """log2(weight + rest); where the weight is 1 exact however small the rest is."""
    small = tl.where(rest <= 1.0, rest, 0.0)
    return tl.where((weight == 1.0) & (rest <= 1.0), log1p(small) * LOG2E, log2(weight + rest))


@triton.jit
def join(shift, d, y, scale):
    """Where the label's y joins the others' sum d of exponentials over `shift`; of the row:

    (shift, norm, logp, own, step, weight, rest): norm is log2 of the sum over the shift. weight + rest is that sum over
    the label's own exponent where the label is the largest, else over the shift: there the others' exponents move by
    step, and the label's own is `own`.
    """
    scaled = y * scale
    largest = scaled >= shift
    row_shift = tl.where(largest, scaled, shift)
    t = tl.fma(y, scale, -row_shift)  # of the largest: what its rounding to a shift has left
    step = tl.where(largest, -tl.fma(y, scale, -shift), 0.0)
    weight = tl.where(largest, 1.0, tl.exp2(t))
    rest = d * tl.exp2(step)
    log2_total = log2_sum(weight, rest)
    # y * scale - shift in two parts, t + low: rounded in base 2, where it is 1.44 times as large, it would lose a bit.
    back = t + row_shift
    part = back - t
    low = tl.fma(y, scale, -back) - ((t - (back - part)) + (row_shift - part))
    low = tl.where(tl.abs(t) < 1e30, low, 0.0)  # an infinite t has none
    below = tl.fma(t, LN2, (low - log2_total) * LN2)
    sure = largest & (rest <= 1.0)
    above = 0.0 - tl.where(sure, log1p(tl.where(sure, rest, 0.0)), log2_total * LN2)  # 0.0 -: never -0
    logp = tl.where(largest, above, tl.where(below > 0.0, 0.0, below))
    return row_shift, tl.where(largest, t, 0.0) + log2_total, logp, tl.where(largest, 0.0, t), step, weight, rest


@triton.jit
def row_results(state, y, scale):
    """(shift, norm, logp, entropy, log sum p^2) of a row from the others' state and the label's y."""
    others, d, t, q, _, _, _ = state
    shift, norm, logp, own, step, weight, rest = join(others, d, y, scale)
    rescale = tl.exp2(step)
    t = (t + step * d) * rescale + weight * tl.maximum(own, FLOOR)
    log2_total = log2_sum(weight, rest)
    entropy = (log2_total - t / (weight + rest)) * LN2
    return shift, norm, logp, entropy, (log2_sum(weight * weight, q * rescale * rescale) - 2.0 * log2_total) * LN2


@triton.jit
def write_row(
    row, n_rows, row_ptr, label, valid, n_cols, state, outer, inner,
    logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """The results of one row from its state; aux and saved as in `statistics_kernel`."""
    scale = outer * LOG2E
    _, _, _, _, m, before, total = state
    y = load_scaled(row_ptr + tl.where(valid, label, 0), valid, inner)
    shift, norm, logp, entropy, log_sum_sq = row_results(state, y, scale)
    tl.store(saved_ptr + row, shift)
    tl.store(saved_ptr + n_rows + row, tl.where(valid, norm, float("inf")))  # inf marks an ignored row
    tl.store(saved_ptr + 2 * n_rows + row, tl.where(valid, logp, 0.0))
    if LOGPS & OUTPUTS:
        tl.store(logps_ptr + row, tl.where(valid, logp, 0.0))
    if ENTROPY & OUTPUTS:
        tl.store(entropy_ptr + row, tl.where(valid, entropy, 0.0))
    if LSE & OUTPUTS:  # top * scale - shift is what shift was rounded by; the sum carries the same
        top = tl.maximum(m, y)
        lse = top * outer + (norm - tl.fma(top, scale, -shift)) * LN2
        tl.store(lse_ptr + row, tl.where(valid, lse, 0.0))
    if MEAN_LOGITS & OUTPUTS:
        tl.store(aux_ptr + row, tl.where(valid, (total + y) * outer / n_cols, 0.0))
    if IS_TOP1 & OUTPUTS:  # the first of equals, as argmax has it
        tl.store(aux_ptr + n_rows + row, tl.where(valid & (y > before) & (y >= m), 1.0, 0.0))
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        tl.store(aux_ptr + 2 * n_rows + row, tl.where(valid, log_sum_sq, 0.0))


# Arguments that change from call to call: compiled code must not depend on them, nor on where labels and logits begin.
@triton.jit(
    do_not_specialize=["inner_rows", "stride_outer", "stride_inner"],
    do_not_specialize_on_alignment=["x_ptr", "label_ptr"],
)
def statistics_kernel(
    x_ptr, label_ptr, logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr,
    inner_rows, n_cols, stride_outer: tl.int64, stride_inner: tl.int64, outer, inner, ignore_index,
    OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a row. aux [3, rows]: mean logit, is_top1, log sum p^2. saved [SAVED_FIELDS, rows]."""
    row = tl.program_id(0)
    label = tl.load(label_ptr + row)
    valid = label != ignore_index
    row_ptr = row_start(x_ptr, row, inner_rows, stride_outer, stride_inner)
    state = scan_row(row_ptr, label, tl.where(valid, n_cols, 0), outer * LOG2E, inner, OUTPUTS, BLOCK, GROUP)
    write_row(
        row, tl.num_programs(0).to(tl.int64), row_ptr, label, valid, n_cols, state, outer, inner,
        logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr, OUTPUTS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["inner_rows", "stride_outer", "stride_inner", "part_cols"],
    do_not_specialize_on_alignment=["x_ptr", "label_ptr"],
)
def scan_parts_kernel(
    x_ptr, label_ptr, parts_ptr,
    inner_rows, n_cols, stride_outer: tl.int64, stride_inner: tl.int64, outer, inner, ignore_index, part_cols,
    OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows on grid axis 0, their parts on axis 1; parts [STATE_FIELDS, rows, parts] gets the states."""
    row, part = tl.program_id(0), tl.program_id(1)
    label = tl.load(label_ptr + row)
    valid = label != ignore_index
    row_ptr = row_start(x_ptr, row, inner_rows, stride_outer, stride_inner)
    begin = tl.multiple_of(part * part_cols, BLOCK)
    shift, d, t, q, m, before, total = scan_part(
        row_ptr, label, tl.where(valid, n_cols, 0), begin, part_cols, outer * LOG2E, inner, OUTPUTS, BLOCK, GROUP
    )
    field = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    out = parts_ptr + row.to(tl.int64) * tl.num_programs(1) + part
    tl.store(out, shift)
    tl.store(out + field, d)
    tl.store(out + 2 * field, t)
    tl.store(out + 3 * field, q)
    tl.store(out + 4 * field, m)
    tl.store(out + 5 * field, before)
    tl.store(out + 6 * field, total)


@triton.jit(
    do_not_specialize=["inner_rows", "stride_outer", "stride_inner", "n_parts"],
    do_not_specialize_on_alignment=["x_ptr", "label_ptr"],
)
def merge_parts_kernel(
    x_ptr, label_ptr, parts_ptr, logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr,
    inner_rows, n_cols, stride_outer: tl.int64, stride_inner: tl.int64, outer, inner, ignore_index, n_parts,
    OUTPUTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program a row: the states of its n_parts <= LANES parts into its results, as `statistics_kernel` has them."""
    row = tl.program_id(0)
    n_rows = tl.num_programs(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    valid = label != ignore_index
    lanes = tl.arange(0, LANES)
    mask = lanes < n_parts
    field = n_rows * n_parts
    source = parts_ptr + row.to(tl.int64) * n_parts + lanes
    state = merge((
        tl.load(source, mask=mask, other=LOWEST), tl.load(source + field, mask=mask, other=0.0),
        tl.load(source + 2 * field, mask=mask, other=0.0), tl.load(source + 3 * field, mask=mask, other=0.0),
        tl.load(source + 4 * field, mask=mask, other=LOWEST), tl.load(source + 5 * field, mask=mask, other=LOWEST),
        tl.load(source + 6 * field, mask=mask, other=0.0),
    ))  # fmt: skip
    row_ptr = row_start(x_ptr, row, inner_rows, stride_outer, stride_inner)
    write_row(
        row, n_rows, row_ptr, label, valid, n_cols, state, outer, inner,
        logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr, OUTPUTS,
    )  # fmt: skip


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 0 for interpreted kernels, whose rows are never split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def row_parts(n_rows: int, n_cols: int, block: int, processors: int) -> tuple[int, int]:
    """(parts of a row, columns a part): as many parts as give every multiprocessor two programs, none of them empty.

    Below four blocks of columns a second launch should cost more than the split saves (not measured).
    """
    blocks = triton.cdiv(n_cols, block)
    wanted = min(triton.cdiv(2 * processors, n_rows), MAX_PARTS)
    if wanted <= 1 or blocks < 4:
        return 1, blocks * block
    part_blocks = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, part_blocks), part_blocks * block


def statistics(logits, labels, outer, inner, ignore_index, outputs):
    """Row statistics of logits[O, I, V] (columns side by side) for labels[O * I].

    Returns (logps, entropy, lse, aux, saved), fp32; what `outputs` (bits as above) does not name has no elements.
    """
    n_rows, n_cols = logits.shape[0] * logits.shape[1], logits.shape[2]

    def buffer(bits, *shape):
        return torch.empty(shape if outputs & bits else 0, dtype=torch.float32, device=logits.device)

    logps, entropy, lse = buffer(LOGPS.value, n_rows), buffer(ENTROPY.value, n_rows), buffer(LSE.value, n_rows)
    aux = buffer(MEAN_LOGITS.value | IS_TOP1.value | LOG_SUM_SQ_PROBS.value, 3, n_rows)
    saved = torch.empty(SAVED_FIELDS, n_rows, dtype=torch.float32, device=logits.device)
    results = logps, entropy, lse, aux, saved
    if not n_rows:
        return results
    kernel = "statistics" if outputs < MEAN_LOGITS.value else "statistics_all"
    shape = launch_shape(kernel, n_cols, logits.element_size(), logits.device)
    n_parts, part_cols = row_parts(n_rows, n_cols, shape["BLOCK"], multiprocessors(logits.device))
    rows = logits.shape[1], n_cols, logits.stride(0), logits.stride(1), outer, inner, ignore_index
    if n_parts == 1:
        statistics_kernel[(n_rows,)](logits, labels, *results, *rows, OUTPUTS=outputs, **shape)
        return results
    parts = torch.empty(STATE_FIELDS, n_rows, n_parts, dtype=torch.float32, device=logits.device)
    scan_parts_kernel[(n_rows, n_parts)](logits, labels, parts, *rows, part_cols, OUTPUTS=outputs, **shape)
    merge_parts_kernel[(n_rows,)](
        logits, labels, parts, *results, *rows, n_parts,
        OUTPUTS=outputs, LANES=triton.next_power_of_2(n_parts), num_warps=1,
    )  # fmt: skip
    return results
