"""One row's statistics out of those of its parts, each some rank's share of the vocabulary.

A part's softmax is over its own columns. With w_r the probability that a row's softmax gives to part r,

    logp = logp_o + log w_o                          o: the part that has the label
    H    = sum_r w_r (H_r - log w_r)
    KL(p || q) = sum_r w_r (KL_r + log w_r - log v_r)         w of p, v of q
    log sum p^2 = log sum_r exp(L_r + 2 log w_r)

Parts lie on the lanes, in rank order; a program takes BLOCK rows. Shifts and norms are base 2.
"""

import triton
import triton.language as tl

from .kl import CENTER, ENTROPY, KL, LOGP, NORM, REF_LOGP, REF_NORM, REF_SHIFT, SHIFT, TOKEN_FIELDS
from .rowmath import LN2, LOG2E, log1p, log2
from .statistics import ENTROPY as WITH_ENTROPY
from .statistics import IS_TOP1, LOG_SUM_SQ_PROBS, LOGPS, LSE, MEAN_LOGITS, SAVED_FIELDS

NONE = tl.constexpr(float("-inf"))


@triton.jit
def shares(shift, norm, mine):
    """(shift, norm, log2 w, log2 w of the label's part) of parts' shifts and norms [R, n]; `mine`: the label's part."""
    top = tl.max(shift, 0)
    above = tl.where(norm == NONE, NONE, shift - top[None, :] + norm)
    total = log2(tl.sum(tl.exp2(above), 0))
    own = tl.sum(tl.where(mine, above, 0.0), 0)
    most = tl.max(tl.where(mine, NONE, above), 0)
    # The label's part may be the largest: then by what the others add to it, and no digits are lost. Or it may be any
    # number of nats below another: then nothing is taken to its size, which would overflow.
    largest = own >= most
    others = tl.sum(tl.where(mine | (above == NONE), 0.0, tl.exp2(above - tl.where(largest, own, most)[None, :])), 0)
    few = tl.where(largest & (others < 1.0), others, 0.0)
    beside = tl.where(others < 1.0, log1p(few) * LOG2E, log2(1.0 + others))
    return top, total, above - total[None, :], tl.where(largest, -beside, own - total)


@triton.jit
def of_owner(values, mine, log_share):
    """The label's log-prob [n] from those in its part."""
    picked = tl.sum(tl.where(mine, values, 0.0), 0)
    return tl.where(log_share == NONE, NONE, picked + log_share * LN2)


@triton.jit
def weighed(log_share, values):
    """Sum over parts of share times value; a part whose share is 0 counts nothing, whatever its value."""
    share = tl.exp2(log_share)
    return tl.sum(tl.where(share == 0.0, 0.0, share * values), 0)


@triton.jit
def merge_scores_kernel(
    parts_ptr, owner_ptr, logps_ptr, entropy_ptr, lse_ptr, aux_ptr, saved_ptr, n_parts, n_rows, n_cols, part_stride,
    field_stride, OUTPUTS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of parts [R, F, rows] a program; results as `statistics_kernel` has them."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n_rows, field_stride = tl.cast(n_rows, tl.int64), tl.cast(field_stride, tl.int64)
    inside = rows < n_rows
    lanes = tl.arange(0, LANES)[:, None]
    mask = (lanes < n_parts) & inside[None, :]
    owner = tl.load(owner_ptr + rows, mask=inside, other=-1)
    scored = owner >= 0
    mine = lanes == tl.where(scored, owner, 0)[None, :]
    source = parts_ptr + lanes.to(tl.int64) * part_stride + rows[None, :]
    shift = tl.load(source, mask=mask, other=NONE)
    norm = tl.load(source + field_stride, mask=mask, other=NONE)
    top, total, log_share, of_label = shares(shift, norm, mine)
    tl.store(saved_ptr + rows, top, mask=inside)
    tl.store(saved_ptr + n_rows + rows, tl.where(scored, total, float("inf")), mask=inside)
    logp = of_owner(tl.load(source + 2 * field_stride, mask=mask, other=0.0), mine, of_label)
    tl.store(saved_ptr + 2 * n_rows + rows, tl.where(scored, logp, 0.0), mask=inside)
    if LOGPS & OUTPUTS:
        tl.store(logps_ptr + rows, tl.where(scored, logp, 0.0), mask=inside)
    source += 3 * field_stride
    if WITH_ENTROPY & OUTPUTS:
        entropy = weighed(log_share, tl.load(source, mask=mask, other=0.0) - log_share * LN2)
        tl.store(entropy_ptr + rows, tl.where(scored, entropy, 0.0), mask=inside)
        source += field_stride
    if LSE & OUTPUTS:
        tl.store(lse_ptr + rows, tl.where(scored, (top + total) * LN2, 0.0), mask=inside)
    if MEAN_LOGITS & OUTPUTS:
        mean = tl.sum(tl.load(source, mask=mask, other=0.0), 0) / n_cols
        tl.store(aux_ptr + rows, tl.where(scored, mean, 0.0), mask=inside)
        source += field_stride
    if IS_TOP1 & OUTPUTS:
        here = tl.sum(tl.where(mine, tl.load(source, mask=mask, other=0.0), 0.0), 0)
        mark = tl.sum(tl.where(mine, shift, 0.0), 0)[None, :]
        beaten = tl.max(tl.where((shift > mark) | ((shift == mark) & (lanes < owner[None, :])), 1.0, 0.0), 0)
        tl.store(aux_ptr + n_rows + rows, tl.where(scored, here * (1.0 - beaten), 0.0), mask=inside)
        source += field_stride
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        terms = tl.load(source, mask=mask, other=0.0) * LOG2E + 2.0 * log_share
        terms = tl.where(log_share == NONE, NONE, terms)
        most = tl.max(terms, 0)
        value = (most + log2(tl.sum(tl.exp2(terms - most[None, :]), 0))) * LN2
        tl.store(aux_ptr + 2 * n_rows + rows, tl.where(scored, value, 0.0), mask=inside)


def merge_shape(parts) -> tuple[tuple[int], dict]:
    """(grid, launch shape) for parts [R, F, n]."""
    lanes = triton.next_power_of_2(parts.shape[0])
    block = max(16, 1024 // lanes)
    return (triton.cdiv(parts.shape[2], block),), {"LANES": lanes, "BLOCK": block}


def merge_scores(parts, owner, n_cols, outputs):
    """(logps, entropy, lse, aux, saved), as `score` gives them, from parts [R, F, n] of the vocabulary.

    Fields: shift, norm, logp in the part of the owner [n] (-1 where a row is not scored), then what `outputs` names of
    entropy, sum of logits, is-top-1, log of the sum of squared probabilities. n_cols: of the whole vocabulary.
    """
    n_rows = parts.shape[2]

    def buffer(bits, *shape):
        return parts.new_empty(shape if outputs & bits else 0)

    aux = buffer(MEAN_LOGITS.value | IS_TOP1.value | LOG_SUM_SQ_PROBS.value, 3, n_rows)
    some = (buffer(bit.value, n_rows) for bit in (LOGPS, WITH_ENTROPY, LSE))
    results = *some, aux, parts.new_empty(SAVED_FIELDS, n_rows)
    if n_rows:
        grid, shape = merge_shape(parts)
        merge_scores_kernel[grid](
            parts, owner, *results, len(parts), n_rows, n_cols, parts.stride(0), parts.stride(1), OUTPUTS=outputs,
            **shape,
        )  # fmt: skip
    return results


@triton.jit
def merge_kl_kernel(
    parts_ptr, owner_ptr, tokens_ptr, n_parts, n_rows, part_stride, field_stride, DIRECTION: tl.constexpr,
    LABELS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of parts [R, 5 or 8, rows] a program; tokens [9, rows] as `kl_kernel` has them."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n_rows, field_stride = tl.cast(n_rows, tl.int64), tl.cast(field_stride, tl.int64)
    inside = rows < n_rows
    lanes = tl.arange(0, LANES)[:, None]
    mask = (lanes < n_parts) & inside[None, :]
    owner = tl.load(owner_ptr + rows, mask=inside, other=-1)
    scored = owner >= 0
    mine = lanes == tl.where(scored, owner, 0)[None, :]
    source = parts_ptr + lanes.to(tl.int64) * part_stride + rows[None, :]
    of_kl = tl.load(source, mask=mask, other=0.0)
    shift, norm, log_w, own = shares(
        tl.load(source + field_stride, mask=mask, other=NONE),
        tl.load(source + 2 * field_stride, mask=mask, other=NONE), mine,
    )  # fmt: skip
    ref_shift, ref_norm, log_v, ref_own = shares(
        tl.load(source + 3 * field_stride, mask=mask, other=NONE),
        tl.load(source + 4 * field_stride, mask=mask, other=NONE), mine,
    )  # fmt: skip
    zero = tl.zeros([BLOCK], tl.float32)
    kl, center = zero, zero
    if DIRECTION == "reverse":
        kl = weighed(log_w, tl.where(log_v == NONE, float("inf"), of_kl + (log_w - log_v) * LN2))
    elif DIRECTION == "forward":
        kl = weighed(log_v, tl.where(log_w == NONE, float("inf"), of_kl + (log_v - log_w) * LN2))
    kl = tl.where(kl < 0.0, 0.0, kl)  # rounding; NaN stays
    if DIRECTION == "reverse":
        center = kl
    out = tokens_ptr + rows
    tl.store(out + KL * n_rows, tl.where(scored, kl, 0.0), mask=inside)
    tl.store(out + SHIFT * n_rows, tl.where(scored, shift, 0.0), mask=inside)
    tl.store(out + NORM * n_rows, tl.where(scored, norm, float("inf")), mask=inside)
    tl.store(out + REF_SHIFT * n_rows, tl.where(scored, ref_shift, 0.0), mask=inside)
    tl.store(out + REF_NORM * n_rows, tl.where(scored, ref_norm, 0.0), mask=inside)
    tl.store(out + CENTER * n_rows, tl.where(scored, center, 0.0), mask=inside)
    logp, ref_logp, entropy = zero, zero, zero
    if LABELS:
        logp = of_owner(tl.load(source + 5 * field_stride, mask=mask, other=0.0), mine, own)
        ref_logp = of_owner(tl.load(source + 6 * field_stride, mask=mask, other=0.0), mine, ref_own)
        entropy = weighed(log_w, tl.load(source + 7 * field_stride, mask=mask, other=0.0) - log_w * LN2)
    tl.store(out + LOGP * n_rows, tl.where(scored, logp, 0.0), mask=inside)
    tl.store(out + REF_LOGP * n_rows, tl.where(scored, ref_logp, 0.0), mask=inside)
    tl.store(out + ENTROPY * n_rows, tl.where(scored, entropy, 0.0), mask=inside)


def merge_kl(parts, owner, direction):
    """tokens[9, n], as `kl` gives them, from parts [R, 5 or 8, n]; without KL and its center for the mixture.

    Fields: kl, shift, norm, ref_shift, ref_norm, and with labels logp, ref_logp, entropy.
    """
    n_parts, n_fields, n_rows = parts.shape
    tokens = parts.new_empty(TOKEN_FIELDS, n_rows)
    if n_rows:
        grid, shape = merge_shape(parts)
        merge_kl_kernel[grid](
            parts, owner, tokens, n_parts, n_rows, parts.stride(0), parts.stride(1),
            DIRECTION=direction if isinstance(direction, str) else "js", LABELS=n_fields > 5, **shape,
        )  # fmt: skip
    return tokens
