"""Statistics pass: one read of each row of logits gives the label's log-prob, entropy and what the backward needs.

An online softmax in groups: a thread takes GROUP neighbouring columns (16 bytes), finds their maximum, rescales its own
running sums once, and adds. Maxima and sums stay in the thread until the row ends; only then are they merged across the
program, in a fixed order. Full blocks run without a mask; the last partial block, and the few columns outside the row's
16-byte boundaries, are taken apart from them.

One program takes one row, in one launch. Where the rows are too few to fill the device, a row is split: each program
writes the state of one part of its columns, and a second launch merges a row's states, always in the same order.
"""

import functools

import torch

import triton
import triton.language as tl

from .rowmath import FLOOR, LN2, LOG2E, LOWEST, before_row, load_scaled, log2, row_start

# Bits of OUTPUTS, in the order of TokenStats.
LOGPS = tl.constexpr(1)
ENTROPY = tl.constexpr(2)
LSE = tl.constexpr(4)
MEAN_LOGITS = tl.constexpr(8)
IS_TOP1 = tl.constexpr(16)
LOG_SUM_SQ = tl.constexpr(32)

NOWHERE = tl.constexpr(2147483647)
STATE_FIELDS = 7
MAX_PARTS = 64


@triton.jit
def start_state(R: tl.constexpr):
    """The running statistics of R lanes, before any column: (shift, d, t, q, m, first, total), each [R].

    shift: maximum of y * scale; d = sum 2^u with u = y * scale - shift; t = sum 2^u * u; q = sum 4^u;
    m: maximum of y; first: the first column of the group in which m was first met; total: sum of y.
    """
    zeros = tl.zeros([R], tl.float32)
    lowest = tl.full([R], LOWEST, tl.float32)
    return lowest, zeros, zeros, zeros, lowest, tl.full([R], NOWHERE, tl.int32), zeros


@triton.jit
def fold(y, mask, col, state, scale, OUTPUTS: tl.constexpr):
    """Take y [R, GROUP], whose groups begin at columns col [R], into the state."""
    old, d, t, q, m, first, total = state
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
    if LOG_SUM_SQ & OUTPUTS:
        q = q * (rescale * rescale) + tl.sum(e * e, 1)
    if (LSE | IS_TOP1) & OUTPUTS:
        if IS_TOP1 & OUTPUTS:
            first = tl.where(top > m, col, first)
        m = tl.maximum(m, top)
    if MEAN_LOGITS & OUTPUTS:
        # + 0.0: Triton 3.6 and 3.7 crash on a loop that adds up reductions of just what it loads.
        total += tl.sum(y + 0.0 if mask is None else tl.where(mask, y, 0.0), 1)
    d = d * rescale + tl.sum(e, 1)
    return shift, d, t, q, m, first, total


@triton.jit
def merge(state):
    """One state out of the lanes' states [R]."""
    old, d, t, q, m, first, total = state
    shift = tl.max(old, 0)
    step = old - shift
    rescale = tl.exp2(step)
    top = tl.max(m, 0)
    return (
        shift, tl.sum(d * rescale, 0), tl.sum((t + step * d) * rescale, 0), tl.sum(q * (rescale * rescale), 0),
        top, tl.min(tl.where(m == top, first, NOWHERE), 0), tl.sum(total, 0),
    )  # fmt: skip


@triton.jit
def combine(a, b):
    """One state out of two scalar ones."""
    shift_a, d_a, t_a, q_a, m_a, first_a, total_a = a
    shift_b, d_b, t_b, q_b, m_b, first_b, total_b = b
    shift = tl.maximum(shift_a, shift_b)
    step_a, step_b = shift_a - shift, shift_b - shift
    r_a, r_b = tl.exp2(step_a), tl.exp2(step_b)
    m = tl.maximum(m_a, m_b)
    first = tl.minimum(tl.where(m_a == m, first_a, NOWHERE), tl.where(m_b == m, first_b, NOWHERE))
    return (
        shift, d_a * r_a + d_b * r_b, (t_a + step_a * d_a) * r_a + (t_b + step_b * d_b) * r_b,
        q_a * r_a * r_a + q_b * r_b * r_b, m, first, total_a + total_b,
    )  # fmt: skip


@triton.jit
def scan_part(
    row_ptr, n_cols, begin, part_cols, scale, inner, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The state of part_cols columns of a row, from `begin` on; n_cols = 0 reads nothing.

    `begin` and the end (but for the last part's) are multiples of BLOCK and count from the row's first 16-byte
    boundary. The columns outside the boundaries belong to the part at 0.
    """
    R: tl.constexpr = BLOCK // GROUP
    groups = tl.arange(0, R) * GROUP
    offsets = groups[:, None] + tl.arange(0, GROUP)[None, :]
    lead = tl.minimum((GROUP - before_row(row_ptr, GROUP)) % GROUP, n_cols)
    body_ptr = tl.multiple_of(row_ptr + lead, 16)
    body = (n_cols - lead) // GROUP * GROUP
    end = tl.multiple_of(tl.minimum(body, begin + part_cols), GROUP)
    full = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK

    state = start_state(R)
    for start in tl.range(begin, full, BLOCK):
        y = load_scaled(body_ptr + start + offsets, None, inner)
        state = fold(y, None, lead + start + groups, state, scale, OUTPUTS)
    if full < end:
        mask = full + offsets < end
        y = load_scaled(body_ptr + full + offsets, mask, inner)
        state = fold(y, mask, lead + full + groups, state, scale, OUTPUTS)
    part = merge(state)

    if (begin == 0) & ((lead > 0) | (lead + body < n_cols)):
        # Columns [0, lead) and [lead + body, n_cols): at most one group each.
        left = tl.arange(0, 2) * (lead + body)
        right = tl.where(tl.arange(0, 2) == 0, lead, n_cols)
        columns = left[:, None] + tl.arange(0, GROUP)[None, :]
        mask = columns < right[:, None]
        edges = fold(load_scaled(row_ptr + columns, mask, inner), mask, left, start_state(2), scale, OUTPUTS)
        part = combine(part, merge(edges))
    return part


@triton.jit
def scan_row(row_ptr, n_cols, scale, inner, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The state of one whole row; n_cols = 0 reads nothing."""
    return scan_part(row_ptr, n_cols, 0, n_cols, scale, inner, OUTPUTS, BLOCK, GROUP)


@triton.jit
def label_logp(row_ptr, column, valid, state, scale, inner):
    """(log-prob, y) of one column from its row's state; never above 0."""
    y = load_scaled(row_ptr + column, valid, inner)
    # y * scale - shift in two parts, t + rest: rounded in base 2, where it is 1.44 times as large, it would lose a bit.
    shift = state[0]
    t = tl.fma(y, scale, -shift)
    back = t + shift
    part = back - t
    rest = tl.fma(y, scale, -back) - ((t - (back - part)) + (shift - part))
    rest = tl.where(tl.abs(t) < 1e30, rest, 0.0)  # an infinite t has none
    logp = tl.fma(t, LN2, (rest - log2(state[1])) * LN2)
    return tl.where(logp > 0.0, 0.0, logp), y


@triton.jit
def label_is_top1(row_ptr, column, valid, y, state, inner, GROUP: tl.constexpr):
    """Whether the label is the row's first maximum, as argmax would have it."""
    first = state[5]
    near = valid & (y == state[4]) & (column >= first) & (column - first < GROUP)  # of NOWHERE no column is near
    rivals = load_scaled(row_ptr + first + tl.arange(0, GROUP), near & (tl.arange(0, GROUP) < column - first), inner)
    return near & (tl.max(rivals, 0) < y)


@triton.jit
def write_row(
    row, n_rows, row_ptr, label, valid, n_cols, state, outer, inner,
    logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The results of one row from its state; aux and saved as in `statistics_kernel`."""
    column = tl.where(valid, label, 0)
    scale = outer * LOG2E
    shift, d, t, q, m, _, total = state
    norm = log2(d)
    tl.store(saved_ptr + row, shift)
    tl.store(saved_ptr + n_rows + row, tl.where(valid, norm, float("inf")))  # inf marks an ignored row

    logp, y = label_logp(row_ptr, column, valid, state, scale, inner)
    if LOGPS & OUTPUTS:
        tl.store(logps_ptr + row, tl.where(valid, logp, 0.0))
    if ENTROPY & OUTPUTS:
        tl.store(entropy_ptr + row, tl.where(valid, (norm - t / d) * LN2, 0.0))
    if LSE & OUTPUTS:  # m * scale - shift is what shift was rounded by; the sum carries the same
        lse = m * outer + (norm - tl.fma(m, scale, -shift)) * LN2
        tl.store(lse_ptr + row, tl.where(valid, lse, 0.0))
    if MEAN_LOGITS & OUTPUTS:
        tl.store(aux_ptr + row, tl.where(valid, total * outer / n_cols, 0.0))
    if IS_TOP1 & OUTPUTS:
        top1 = label_is_top1(row_ptr, column, valid, y, state, inner, GROUP)
        tl.store(aux_ptr + n_rows + row, tl.where(top1, 1.0, 0.0))
    if LOG_SUM_SQ & OUTPUTS:
        tl.store(aux_ptr + 2 * n_rows + row, tl.where(valid, (log2(q) - 2.0 * norm) * LN2, 0.0))


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
    """One program a row. aux [3, rows]: mean logit, is_top1, log sum p^2. saved [2, rows]: shift, log2 of the sum."""
    row = tl.program_id(0)
    label = tl.load(label_ptr + row)
    valid = label != ignore_index
    row_ptr = row_start(x_ptr, row, inner_rows, stride_outer, stride_inner)
    state = scan_row(row_ptr, tl.where(valid, n_cols, 0), outer * LOG2E, inner, OUTPUTS, BLOCK, GROUP)
    write_row(
        row, tl.num_programs(0), row_ptr, label, valid, n_cols, state, outer, inner,
        logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr, OUTPUTS, GROUP,
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
    valid = tl.load(label_ptr + row) != ignore_index
    row_ptr = row_start(x_ptr, row, inner_rows, stride_outer, stride_inner)
    begin = tl.multiple_of(part * part_cols, BLOCK)
    shift, d, t, q, m, first, total = scan_part(
        row_ptr, tl.where(valid, n_cols, 0), begin, part_cols, outer * LOG2E, inner, OUTPUTS, BLOCK, GROUP
    )
    field = tl.num_programs(0) * tl.num_programs(1)
    out = parts_ptr + row * tl.num_programs(1) + part
    tl.store(out, shift)
    tl.store(out + field, d)
    tl.store(out + 2 * field, t)
    tl.store(out + 3 * field, q)
    tl.store(out + 4 * field, m)
    tl.store(out + 5 * field, first.to(tl.float32, bitcast=True))  # a column's bits: past 2^24 fp32 skips numbers
    tl.store(out + 6 * field, total)


@triton.jit(
    do_not_specialize=["inner_rows", "stride_outer", "stride_inner", "n_parts"],
    do_not_specialize_on_alignment=["x_ptr", "label_ptr"],
)
def merge_parts_kernel(
    x_ptr, label_ptr, parts_ptr, logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr,
    inner_rows, n_cols, stride_outer: tl.int64, stride_inner: tl.int64, outer, inner, ignore_index, n_parts,
    OUTPUTS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program a row: the states of its n_parts <= LANES parts into its results, as `statistics_kernel` has them."""
    row = tl.program_id(0)
    n_rows = tl.num_programs(0)
    label = tl.load(label_ptr + row)
    valid = label != ignore_index
    lanes = tl.arange(0, LANES)
    mask = lanes < n_parts
    field = n_rows * n_parts
    source = parts_ptr + row * n_parts + lanes
    first = tl.load(source + 5 * field, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    state = merge((
        tl.load(source, mask=mask, other=LOWEST), tl.load(source + field, mask=mask, other=0.0),
        tl.load(source + 2 * field, mask=mask, other=0.0), tl.load(source + 3 * field, mask=mask, other=0.0),
        tl.load(source + 4 * field, mask=mask, other=LOWEST), tl.where(mask, first, NOWHERE),
        tl.load(source + 6 * field, mask=mask, other=0.0),
    ))  # fmt: skip
    row_ptr = row_start(x_ptr, row, inner_rows, stride_outer, stride_inner)
    write_row(
        row, n_rows, row_ptr, label, valid, n_cols, state, outer, inner,
        logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr, OUTPUTS, GROUP,
    )  # fmt: skip


def launch_shape(n_cols: int, itemsize: int) -> dict:
    """Columns a program takes at once, columns a thread takes at once (16 bytes), warps: by vocabulary and dtype."""
    block = min(4096, max(256, triton.next_power_of_2(n_cols)))
    return {"BLOCK": block, "GROUP": 16 // itemsize, "num_warps": max(1, block // 512)}


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
    aux = buffer(MEAN_LOGITS.value | IS_TOP1.value | LOG_SUM_SQ.value, 3, n_rows)
    saved = torch.empty(2, n_rows, dtype=torch.float32, device=logits.device)
    results = logps, entropy, lse, aux, saved
    if not n_rows:
        return results
    shape = launch_shape(n_cols, logits.element_size())
    n_parts, part_cols = row_parts(n_rows, n_cols, shape["BLOCK"], multiprocessors(logits.device))
    rows = logits.shape[1], n_cols, logits.stride(0), logits.stride(1), outer, inner, ignore_index
    if n_parts == 1:
        statistics_kernel[(n_rows,)](logits, labels, *results, *rows, OUTPUTS=outputs, **shape)
        return results
    parts = torch.empty(STATE_FIELDS, n_rows, n_parts, dtype=torch.float32, device=logits.device)
    scan_parts_kernel[(n_rows, n_parts)](logits, labels, parts, *rows, part_cols, OUTPUTS=outputs, **shape)
    merge_parts_kernel[(n_rows,)](
        logits, labels, parts, *results, *rows, n_parts,
        OUTPUTS=outputs, GROUP=shape["GROUP"], LANES=triton.next_power_of_2(n_parts), num_warps=1,
    )  # fmt: skip
    return results
