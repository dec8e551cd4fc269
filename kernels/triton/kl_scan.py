"""One scan of two rows of logits, policy's and reference's: an online softmax of each (see statistics.py), and the
running sum of e^x (x - y), whose terms are shifted by both maxima: a constant added to either row costs no digits.

With labels, the sums leave the label out, and it joins them at the end: as in statistics.py.
"""

import triton
import triton.language as tl

from .rowmath import FLOOR, LN2, LOWEST, edge_columns, group_offsets, load_scaled, whole_groups
from .statistics import join, label_block, log2_sum


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
def fold_pair_beside(
    x_ptr, ref_ptr, mask, columns, label, state, scale, inner, ref_scale, ref_inner, DIRECTION: tl.constexpr,
    LABELS: tl.constexpr,
):  # fmt: skip
    """Take the columns [R, GROUP] under the mask (None: all) into the state, with LABELS without the label's."""
    x, y = load_scaled(x_ptr + columns, mask, inner), load_scaled(ref_ptr + columns, mask, ref_inner)
    if LABELS:  # after the loads: a mask that knows the label would turn them into loads of single elements
        x, y = tl.where(columns != label, x, float("-inf")), tl.where(columns != label, y, float("-inf"))
    return fold_pair(x, y, state, scale, ref_scale, DIRECTION, LABELS)


@triton.jit
def scan_pair(
    x_row, ref_row, label, n_cols, scale, inner, ref_scale, ref_inner,
    DIRECTION: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The state of one whole row of either side; n_cols = 0 reads nothing.

    Whole groups begin at x's 16-byte boundaries. SAME: and at the reference's.

    LABELS: without the label's column, and with the sum that the entropy takes.
    """
    offsets = group_offsets(BLOCK, GROUP)
    lead, body = whole_groups(x_row, n_cols, GROUP)
    x_body, ref_body = tl.multiple_of(x_row + lead, 16), ref_row + lead
    if SAME:
        ref_body = tl.multiple_of(ref_body, 16)
    full = body // BLOCK * BLOCK
    label = label.to(tl.int32)
    at, hole = label - lead, full
    if LABELS:
        hole = tl.multiple_of(label_block(at, 0, full, BLOCK), BLOCK)
    state = start_pair(BLOCK // GROUP)
    for start in tl.range(0, hole, BLOCK):
        x = load_scaled(x_body + start + offsets, None, inner)
        y = load_scaled(ref_body + start + offsets, None, ref_inner)
        state = fold_pair(x, y, state, scale, ref_scale, DIRECTION, LABELS)
    if LABELS:
        for start in tl.range(hole + BLOCK, full, BLOCK):
            x = load_scaled(x_body + start + offsets, None, inner)
            y = load_scaled(ref_body + start + offsets, None, ref_inner)
            state = fold_pair(x, y, state, scale, ref_scale, DIRECTION, LABELS)
        if hole < full:
            columns = hole + offsets
            state = fold_pair_beside(
                x_body, ref_body, None, columns, at, state, scale, inner, ref_scale, ref_inner, DIRECTION,
                LABELS,
            )  # fmt: skip
    if full < body:
        columns = full + offsets
        state = fold_pair_beside(
            x_body, ref_body, columns < body, columns, at, state, scale, inner, ref_scale, ref_inner, DIRECTION, LABELS
        )  # fmt: skip
    pair = merge_pair(state, DIRECTION)
    if (lead > 0) | (lead + body < n_cols):
        columns, inside = edge_columns(lead, body, n_cols, GROUP)
        edges = fold_pair_beside(
            x_row, ref_row, inside, columns, label, start_pair(2), scale, inner, ref_scale, ref_inner,
            DIRECTION, LABELS,
        )  # fmt: skip
        pair = combine_pair(pair, merge_pair(edges, DIRECTION), DIRECTION)
    return pair


@triton.jit
def weighed_difference(total, d, step, other_step, weight, own, other_own):
    """The sum of e^x (x - y) with the label in it; total, d: the others' own, which move by step. In base 2."""
    rescale = tl.exp2(tl.maximum(step, -126.0))  # an infinite sum stays one
    return (total + (step - other_step) * d) * rescale + tl.where(weight > 0.0, weight * (own - other_own), 0.0)


@triton.jit
def join_pair(pair, x, y, scale, ref_scale, DIRECTION: tl.constexpr):
    """Both sides of a row whose label has x and y, from the others' state: (policy, reference, total, entropy).

    A side is (shift, norm, sum, log2 of the sum, log-prob of the label). Sum and total are over the label's own
    exponent on sides where it is the largest, else over the shift; norm is over the shift always. See statistics.join.
    """
    shift, d, ref_shift, ref_d, total, t = pair
    row_shift, norm, logp, own, step, weight, rest = join(shift, d, x, scale)
    row_ref_shift, ref_norm, ref_logp, ref_own, ref_step, ref_weight, ref_rest = join(ref_shift, ref_d, y, ref_scale)
    if DIRECTION == "reverse":
        total = weighed_difference(total, d, step, ref_step, weight, own, ref_own)
    elif DIRECTION == "forward":
        total = weighed_difference(total, ref_d, ref_step, step, ref_weight, ref_own, own)
    log2_d, ref_log2_d = log2_sum(weight, rest), log2_sum(ref_weight, ref_rest)
    t = (t + step * d) * tl.exp2(step) + weight * tl.maximum(own, FLOOR)
    policy = row_shift, norm, weight + rest, log2_d, logp
    reference = row_ref_shift, ref_norm, ref_weight + ref_rest, ref_log2_d, ref_logp
    return policy, reference, total, (log2_d - t / (weight + rest)) * LN2
