"""Policy-gradient losses of tokens from logits: scores, loss, KL, and on request the gradient in the logits' place.

One program takes a row. It reads it, forms the loss and its slope in the log-prob, and, if asked to, reads the row
again and writes its gradient over it. The second walk goes backwards: it begins with what was read last, the part most
likely to be in the L2 cache still. (How often it is there has not been measured.)
"""

import torch

import triton
import triton.language as tl

from .dpo import kl_estimate
from .gradient import gradient_row
from .launch import launch_shape
from .rowmath import LOG2E, exp, load_scaled, row_start, times
from .statistics import row_results, scan_row

# Rows of tokens[TOKEN_FIELDS, N]. The slope is weight * d loss / d log-prob; clipped is -1 (below), 0 or 1 (above).
SHIFT, NORM, LOGP, ENTROPY, LOSS, KL, RATIO, CLIPPED, SLOPE = (tl.constexpr(i) for i in range(9))
TOKEN_FIELDS = 9
LOG_RATIO_CLAMP = tl.constexpr(20.0)


@triton.jit
def policy_term(logp, ratio, ratio_slope, a, low, high, bound, KIND: tl.constexpr):
    """(loss, its derivative in the log-prob, clipped) without KL and entropy."""
    above = (ratio > high) & (a > 0.0)
    below = (ratio < low) & (a < 0.0)
    clipped = tl.where(above, 1.0, tl.where(below, -1.0, 0.0))
    if KIND == "clip":
        bounded = (ratio > bound) & (a < 0.0)
        held = tl.where(above, high, tl.where(below, low, tl.where(bounded, bound, ratio)))
        return -a * held, tl.where(above | below | bounded, 0.0, -a * ratio_slope), clipped
    elif KIND == "weight":
        weight = tl.minimum(tl.maximum(ratio, low), high)
        return -times(weight * a, logp), -weight * a, clipped
    else:
        tau = tl.where(a > 0.0, low, high)
        e = tl.exp2(-tl.abs(tau * (ratio - 1.0)) * LOG2E)
        gate = tl.where(ratio > 1.0, 1.0, e) / (1.0 + e)
        closed = tl.where(ratio > 1.0, e, 1.0) / (1.0 + e)
        return -gate * 4.0 / tau * a, -4.0 * gate * closed * a * ratio_slope, clipped * 0.0


@triton.jit(
    do_not_specialize=["inner_rows", "stride_outer", "stride_inner"],
    do_not_specialize_on_alignment=["x_ptr", "label_ptr"],
)
def policy_kernel(
    x_ptr, label_ptr, advantage_ptr, weight_ptr, old_ptr, ref_ptr, tokens_ptr,
    inner_rows, n_cols, stride_outer: tl.int64, stride_inner: tl.int64, outer, ignore_index, low, high, bound, kl_coef,
    entropy_coef, KIND: tl.constexpr, KL_KIND: tl.constexpr, KL_TIMES_RATIO: tl.constexpr, OVERWRITE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a row; OVERWRITE: the gradient of sum weights * loss goes where the logits are.

    WITH_ENTROPY: entropy_coef is not 0.
    """
    row, n_rows = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    valid = label != ignore_index
    row_ptr = row_start(x_ptr, row, inner_rows, stride_outer, stride_inner)
    state = scan_row(row_ptr, label, tl.where(valid, n_cols, 0), outer * LOG2E, None, 3, BLOCK, GROUP)
    y = load_scaled(row_ptr + tl.where(valid, label, 0), valid, None)
    shift, norm, logp, entropy, _ = row_results(state, y, outer * LOG2E)
    norm, logp = tl.where(valid, norm, float("inf")), tl.where(valid, logp, 0.0)
    entropy = tl.where(valid, entropy, 0.0)

    a = tl.load(advantage_ptr + row)
    weight = tl.load(weight_ptr + row)
    log_ratio = logp * 0.0
    if old_ptr is not None:
        log_ratio = tl.where(valid, logp - tl.load(old_ptr + row), 0.0)
    inside = tl.minimum(tl.maximum(log_ratio, -LOG_RATIO_CLAMP), LOG_RATIO_CLAMP)
    ratio = tl.where(log_ratio == log_ratio, exp(inside), log_ratio)  # minimum and maximum lose NaN
    ratio_slope = tl.where(inside == log_ratio, ratio, 0.0)
    loss, slope, clipped = policy_term(logp, ratio, ratio_slope, a, low, high, bound, KIND)
    kl = logp * 0.0
    if KL_KIND is not None:
        kl, kl_slope = kl_estimate(tl.where(valid, logp - tl.load(ref_ptr + row), 0.0), KL_KIND)
        if KL_TIMES_RATIO:
            kl_slope = kl_slope * ratio + times(ratio_slope, kl)
            kl = kl * ratio
        loss += times(kl_coef, kl)
        slope += times(kl_coef, kl_slope)
    slope = times(weight, slope)
    out = tokens_ptr + row
    tl.store(out + SHIFT * n_rows, shift)
    tl.store(out + NORM * n_rows, norm)
    tl.store(out + LOGP * n_rows, logp)
    tl.store(out + ENTROPY * n_rows, entropy)
    tl.store(out + LOSS * n_rows, tl.where(valid, loss - entropy_coef * entropy, 0.0))
    tl.store(out + KL * n_rows, tl.where(valid, kl, 0.0))
    tl.store(out + RATIO * n_rows, tl.where(valid, ratio, 0.0))
    tl.store(out + CLIPPED * n_rows, tl.where(valid, clipped, 0.0))
    tl.store(out + SLOPE * n_rows, tl.where(valid, slope, 0.0))

    if OVERWRITE:
        tl.debug_barrier()  # every thread has read the label's logit before any of them writes there
        zero = tl.full((), 0.0, tl.float32)
        gradient_row(
            row_ptr, row_ptr, label, n_cols, 0, 1, shift, norm, logp, entropy, slope, -entropy_coef * weight, zero,
            outer, None, WITH_ENTROPY, True, BLOCK, GROUP,
        )  # fmt: skip


def policy(logits, labels, given, form, outer, ignore_index, overwrite):
    """tokens[TOKEN_FIELDS, N] of logits[O, I, V] (columns side by side), labels[O * I].

    given: advantages, weights, and old_logps, ref_logps or None, [N] fp32 each, 0 where ignored. form: kind ("clip",
    "weight", "gate"), low, high, bound, kl, kl_coef, kl_times_ratio, entropy_coef. overwrite: the logits become the
    gradient of sum weights * loss.
    """
    n_rows = labels.numel()
    tokens = torch.empty(TOKEN_FIELDS, n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        policy_kernel[(n_rows,)](
            logits, labels, *given, tokens, logits.shape[1], logits.shape[2], logits.stride(0), logits.stride(1), outer,
            ignore_index, form.low, form.high, form.bound, form.kl_coef, form.entropy_coef, KIND=form.kind,
            KL_KIND=form.kl, KL_TIMES_RATIO=form.kl_times_ratio, OVERWRITE=overwrite,
            WITH_ENTROPY=form.entropy_coef != 0.0,
            **launch_shape("policy", logits.shape[2], logits.element_size(), logits.device),
        )  # fmt: skip
    return tokens


@triton.jit
def scale_kernel(values_ptr, factor_ptr, n, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """Multiply n values with the factor; nothing is read if it is 1."""
    factor = tl.load(factor_ptr)
    start = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS)
    if factor != 1.0:
        for i in tl.range(0, TURNS):
            at = start + i * BLOCK + tl.arange(0, BLOCK)
            if start + i * BLOCK + BLOCK <= n:
                value = tl.load(values_ptr + at).to(tl.float32) * factor
                tl.store(values_ptr + at, value.to(values_ptr.dtype.element_ty))
            else:
                value = tl.load(values_ptr + at, mask=at < n).to(tl.float32) * factor
                tl.store(values_ptr + at, value.to(values_ptr.dtype.element_ty), mask=at < n)


def scale(grad, factor):
    """Multiply with a fp32 number on the device, in place; a contiguous tensor is not even read if it is 1."""
    if not grad.is_contiguous():
        grad.mul_(factor)
    elif grad.numel():
        shape = launch_shape("scale", grad.numel(), grad.element_size(), grad.device)
        grid = (triton.cdiv(grad.numel(), shape["BLOCK"] * shape["TURNS"]),)
        scale_kernel[grid](
            grad, factor, grad.numel(), BLOCK=shape["BLOCK"], TURNS=shape["TURNS"], num_warps=shape["num_warps"]
        )
