"""DPO with a per-token KL penalty, from logits: two launches in the forward, one in the backward.

1. `pair_statistics`: log-prob of every label under policy and reference (a program a row of either) and what the
   backward needs. 2. `dpo`: sequence sums, loss, rewards, margin, accuracy, KL (a program a pair). 3. `dpo_gradient`:
the gradient of any combination of those outputs, written over or beside the logits.

Batches are stacked: sequences [0, B) are the chosen answers, [B, 2B) the rejected ones of the same prompts.
"""

import torch

import triton
import triton.language as tl

from .gradient import gradient_row, gradient_shape
from .launch import launch_shape
from .rowmath import LOG2E, expm1, load_scaled, log1p, row_start, times
from .statistics import row_results, scan_row

# Rows of the per-token buffer tokens[4, 2B * T].
SHIFT, NORM, LOGP, REF_LOGP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# Rows of the per-pair buffer pairs[PAIR_FIELDS, B]; slope is d losses / d (chosen log-prob of the sequence).
SLOPE, CHOSEN_REWARD, REJECTED_REWARD, MARGIN, ACCURACY, KL_SUM, TOKENS = (tl.constexpr(i) for i in range(7))
PAIR_FIELDS = 7
SATURATION = tl.constexpr(20.0)  # k3 goes on along its tangent where the reference is more nats above the policy


@triton.jit
def row_logp(row_ptr, label, valid, n_cols, scale, inner, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """(shift, log2 of the sum, log-prob of the label) of one row; reads nothing where it is not valid."""
    state = scan_row(row_ptr, label, tl.where(valid, n_cols, 0), scale, inner, 1, BLOCK, GROUP)
    y = load_scaled(row_ptr + tl.where(valid, label, 0), valid, inner)
    shift, norm, logp, _, _ = row_results(state, y, scale)
    return shift, tl.where(valid, norm, float("inf")), tl.where(valid, logp, 0.0)


@triton.jit
def write_pair(tokens_ptr, row, n_rows, of_policy, shift, norm, logp):
    """What one program has of its row: of the policy's all three, of the reference's its log-prob."""
    tokens, n_rows = tokens_ptr + row, tl.cast(n_rows, tl.int64)
    if of_policy:
        tl.store(tokens + SHIFT * n_rows, shift)
        tl.store(tokens + NORM * n_rows, norm)
        tl.store(tokens + LOGP * n_rows, logp)
    else:
        tl.store(tokens + REF_LOGP * n_rows, logp)


@triton.jit
def pair_statistics_kernel(
    x_ptr, ref_ptr, label_ptr, tokens_ptr,
    n_rows, inner_rows, n_cols, x_stride_outer, x_stride_inner, ref_inner_rows, ref_stride_outer, ref_stride_inner,
    outer, inner, ignore_index, BLOCK: tl.constexpr, GROUP: tl.constexpr, REF_GROUP: tl.constexpr,
):  # fmt: skip
    """Programs [0, n_rows) score the policy's rows, the others the reference's."""
    program = tl.program_id(0)
    row = program % n_rows
    label = tl.load(label_ptr + row)
    valid = label != ignore_index
    scale = outer * LOG2E
    x_row = row_start(x_ptr, row, inner_rows, x_stride_outer, x_stride_inner)
    ref_row = row_start(ref_ptr, row, ref_inner_rows, ref_stride_outer, ref_stride_inner)
    if x_ptr.dtype == ref_ptr.dtype:  # one scan in the code for both: fewer registers
        of_policy = program < n_rows
        one = tl.where(of_policy, x_row, ref_row)
        shift, norm, logp = row_logp(one, label, valid, n_cols, scale, inner, BLOCK, GROUP)
        write_pair(tokens_ptr, row, n_rows, of_policy, shift, norm, logp)
    elif program < n_rows:
        shift, norm, logp = row_logp(x_row, label, valid, n_cols, scale, inner, BLOCK, GROUP)
        write_pair(tokens_ptr, row, n_rows, True, shift, norm, logp)
    else:
        shift, norm, logp = row_logp(ref_row, label, valid, n_cols, scale, inner, BLOCK, REF_GROUP)
        write_pair(tokens_ptr, row, n_rows, False, shift, norm, logp)


def pair_statistics(logits, ref_logits, labels, outer, inner, ignore_index):
    """tokens[4, N] for logits[O, I, V] and ref_logits[O', I', V] (or None) with O * I = O' * I' = N; labels[N]."""
    n_rows = labels.numel()
    tokens = torch.empty(4, n_rows, dtype=torch.float32, device=logits.device)
    ref = logits if ref_logits is None else ref_logits
    if n_rows:
        pair_statistics_kernel[(n_rows * (1 if ref_logits is None else 2),)](
            logits, ref, labels, tokens, n_rows, logits.shape[1], logits.shape[2], logits.stride(0), logits.stride(1),
            ref.shape[1], ref.stride(0), ref.stride(1), outer, inner, ignore_index,
            REF_GROUP=16 // ref.element_size(),
            **launch_shape("pair_statistics", logits.shape[2], logits.element_size(), logits.device),
        )  # fmt: skip
    return tokens


@triton.jit
def kl_estimate(k1, KL: tl.constexpr):
    """(estimate, its derivative in the policy's log-prob) for k1 = log-ratio of policy to reference."""
    if KL == "k1":
        return k1, k1 * 0.0 + 1.0
    elif KL == "k2":
        return 0.5 * k1 * k1, k1
    inside = tl.where(-k1 > SATURATION, SATURATION, -k1)  # minimum and maximum lose NaN
    beyond = tl.where(-k1 > SATURATION, -k1 - SATURATION, 0.0)
    slope = -expm1(inside)
    k3 = -inside - slope * (1.0 + beyond)  # no difference of infinities
    return tl.where(tl.abs(k1) < 0.05, k1 * k1 * (0.5 - k1 * (0.1666666667 - k1 * 0.04166666667)), k3), slope


@triton.jit
def sequence_sums(
    sequence, label_ptr, tokens_ptr, ref_ptr, kl_ptr, n_rows, length, ignore_index,
    KL: tl.constexpr, REF_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(sum of policy log-probs, of reference log-probs, of the KL, number of tokens) of one sequence; writes its KL."""
    logps_ptr = tokens_ptr + LOGP * tl.cast(n_rows, tl.int64)
    zeros = tl.zeros([BLOCK], tl.float32)
    policy, reference, kl, count = zeros, zeros, zeros, zeros
    for start in tl.range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < length
        rows = sequence.to(tl.int64) * length + offsets
        valid = inside & (tl.load(label_ptr + rows, mask=inside, other=0) != ignore_index)
        logp = tl.load(logps_ptr + rows, mask=valid, other=0.0)
        policy += logp
        if not REF_SUMS:
            ref_logp = tl.load(ref_ptr + rows, mask=valid, other=0.0)
            reference += ref_logp
            if KL is not None:
                estimate, _ = kl_estimate(tl.where(valid, logp - ref_logp, 0.0), KL)
                kl += tl.where(valid, estimate, 0.0)
                tl.store(kl_ptr + rows, tl.where(valid, estimate, 0.0), mask=inside)
        count += valid.to(tl.float32)
    reference_sum = tl.load(ref_ptr + sequence) if REF_SUMS else tl.sum(reference, 0)
    return tl.sum(policy, 0), reference_sum, tl.sum(kl, 0), tl.sum(count, 0)


@triton.jit
def dpo_kernel(
    label_ptr, tokens_ptr, ref_ptr, losses_ptr, sequences_ptr, pairs_ptr, kl_ptr,
    n_rows, length, beta, label_smoothing, ignore_index,
    KL: tl.constexpr, REF_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a pair: L = -(1 - e) log s(h) - e log s(-h), h = beta ((c - c_ref) - (r - r_ref)), s the sigmoid."""
    pair = tl.program_id(0)
    pairs = tl.num_programs(0)
    chosen, ref_chosen, kl_c, count_c = sequence_sums(
        pair, label_ptr, tokens_ptr, ref_ptr, kl_ptr, n_rows, length, ignore_index, KL, REF_SUMS, BLOCK
    )
    rejected, ref_rejected, kl_r, count_r = sequence_sums(
        pair + pairs, label_ptr, tokens_ptr, ref_ptr, kl_ptr, n_rows, length, ignore_index, KL, REF_SUMS, BLOCK
    )
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    h = chosen_reward - rejected_reward
    e = tl.exp2(-tl.abs(h) * LOG2E)
    tail = log1p(e)  # -log s(|h|)
    loss = (1.0 - label_smoothing) * (tail + tl.where(h > 0.0, 0.0, -h))
    loss += times(label_smoothing, tail + tl.where(h > 0.0, h, 0.0))
    below = tl.where(h > 0.0, e, 1.0) / (1.0 + e)  # s(-h)
    above = tl.where(h > 0.0, 1.0, e) / (1.0 + e)  # s(h)
    slope = beta * (label_smoothing * above - (1.0 - label_smoothing) * below)

    fields, n_pairs = pairs_ptr + pair, tl.cast(pairs, tl.int64)
    tl.store(sequences_ptr + pair, chosen)
    tl.store(sequences_ptr + pairs + pair, rejected)
    tl.store(losses_ptr + pair, loss)
    tl.store(fields + SLOPE * n_pairs, slope)
    tl.store(fields + CHOSEN_REWARD * n_pairs, chosen_reward)
    tl.store(fields + REJECTED_REWARD * n_pairs, rejected_reward)
    tl.store(fields + MARGIN * n_pairs, h)
    tl.store(fields + ACCURACY * n_pairs, tl.where(h > 0.0, 1.0, 0.0))
    tl.store(fields + KL_SUM * n_pairs, kl_c + kl_r)
    tl.store(fields + TOKENS * n_pairs, count_c + count_r)


def dpo(tokens, labels, ref_sums, beta, label_smoothing, kl, ignore_index):
    """(losses [B], sequence log-probs [2B], pairs [7, B], KL per token [2B * T]) of tokens[4, 2B * T], labels[2B, T].

    ref_sums: [2B] reference log-probs of whole sequences, in place of those in `tokens`. kl: "k1", "k2", "k3" or None.
    """
    n_sequences, length = labels.shape
    losses = torch.empty(n_sequences // 2, dtype=torch.float32, device=tokens.device)
    sequences = torch.empty(n_sequences, dtype=torch.float32, device=tokens.device)
    pairs = torch.empty(PAIR_FIELDS, n_sequences // 2, dtype=torch.float32, device=tokens.device)
    kl_tokens = torch.empty(labels.numel() if kl else 0, dtype=torch.float32, device=tokens.device)
    if n_sequences:
        dpo_kernel[(n_sequences // 2,)](
            labels, tokens, tokens[REF_LOGP.value] if ref_sums is None else ref_sums, losses, sequences, pairs,
            kl_tokens, labels.numel(), length, beta, label_smoothing, ignore_index, KL=kl,
            REF_SUMS=ref_sums is not None, BLOCK=min(1024, max(32, triton.next_power_of_2(length))), num_warps=4,
        )  # fmt: skip
    return losses, sequences, pairs, kl_tokens


@triton.jit
def dpo_gradient_kernel(
    x_ptr, out_ptr, label_ptr, tokens_ptr, pairs_ptr, weights_ptr, g_loss_ptr, g_losses_ptr, g_sequences_ptr,
    length, n_cols, x_stride_outer, x_stride_inner, out_stride_outer, out_stride_inner, outer, inner,
    KL: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows on grid axis 0, a row's programs on axis 1. weights: (d loss / d one pair's loss, d loss / d one KL)."""
    row = tl.program_id(0)
    sequence = row // length
    n_pairs = tl.num_programs(0) // length // 2
    n_rows = tl.num_programs(0).to(tl.int64)
    pair = sequence % n_pairs
    zero = tl.full((), 0.0, tl.float32)
    g_loss = zero
    if g_loss_ptr is not None:
        g_loss = tl.load(g_loss_ptr)
    g_pair = tl.load(weights_ptr) * g_loss
    if g_losses_ptr is not None:
        g_pair += tl.load(g_losses_ptr + pair)
    slope = tl.load(pairs_ptr + SLOPE * tl.cast(n_pairs, tl.int64) + pair)
    g_logp = times(g_pair, tl.where(sequence < n_pairs, slope, -slope))
    if g_sequences_ptr is not None:
        g_logp += tl.load(g_sequences_ptr + sequence)
    logp = tl.load(tokens_ptr + LOGP * n_rows + row)
    if KL is not None:
        k1 = logp - tl.load(tokens_ptr + REF_LOGP * n_rows + row)
        _, kl_slope = kl_estimate(k1, KL)
        g_logp += times(tl.load(weights_ptr + 1) * g_loss, kl_slope)
    x_row = row_start(x_ptr, row, length, x_stride_outer, x_stride_inner)
    out_row = row_start(out_ptr, row, length, out_stride_outer, out_stride_inner)
    shift = tl.load(tokens_ptr + SHIFT * n_rows + row)
    norm = tl.load(tokens_ptr + NORM * n_rows + row)
    label = tl.load(label_ptr + row)
    gradient_row(
        x_row, out_row, label, n_cols, tl.program_id(1), tl.num_programs(1), shift, norm, logp, zero, g_logp, zero,
        zero, outer, inner, False, False, BLOCK, GROUP,
    )  # fmt: skip


def dpo_gradient(logits, labels, tokens, pairs, weights, g_loss, g_losses, g_sequences, kl, outer, inner, out):
    """Write into out[2B, T, V] the gradient with respect to the policy's logits[2B, T, V]; both may be the same.

    labels: [2B, T]. weights: [2], see `dpo_gradient_kernel`. g_loss [], g_losses [B], g_sequences [2B]: fp32 or None.
    """
    grid, shape = gradient_shape("dpo_gradient", logits, out)
    if logits.numel():
        dpo_gradient_kernel[grid](
            logits, out, labels, tokens, pairs, weights, g_loss, g_losses, g_sequences, labels.shape[1],
            logits.shape[2], logits.stride(0), logits.stride(1), out.stride(0), out.stride(1), outer, inner,
            KL=kl, **shape,
        )  # fmt: skip
