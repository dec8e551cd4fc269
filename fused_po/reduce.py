"""Reductions: log-probs of tokens to log-probs of sequences, and token losses to the loss of a batch."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from fused_po import checks

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
Count = Union[None, int, float, Tensor]


def _bounds(cu_seqlens: Tensor, n_tokens: int, device: torch.device) -> Tensor:
    """Check that cu_seqlens can be the bounds of packed sequences, and return it as int64 on this device."""
    if checks.tensor("cu_seqlens", cu_seqlens).ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected [S + 1]")
    if cu_seqlens.is_floating_point():
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, expected an integer dtype such as torch.int32")
    if checks.values_checked(cu_seqlens):
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != n_tokens or bool((steps < 0).any()):
            expected = f"non-decreasing bounds from 0 to N = {n_tokens}"
            raise ValueError(f"cu_seqlens: got {cu_seqlens.tolist()}, expected {expected}")
    return cu_seqlens.to(device, torch.int64)


def _checked(name: str, values: Tensor, mask: Optional[Tensor], cu_seqlens: Optional[Tensor]) -> tuple:
    """(values, at least fp32 and 0 where masked; mask, all True if None is passed; bounds of packed sequences)."""
    checks.floating(name, values)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else checks.mask_like("mask", mask, values, name)
    if values.ndim != (2 if cu_seqlens is None else 1):
        expected = "[B, T] without cu_seqlens, [N] with them"
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected {expected}")
    values = values if values.dtype == torch.float64 else values.float()
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, values.numel(), values.device)
    return torch.where(mask, values, 0), mask, bounds


def mean(values: Tensor) -> Tensor:
    """The mean of all values, with gradients; 0 for an empty tensor."""
    return values.mean() if values.numel() else values.sum()


def _sequence_sums(values: Tensor, bounds: Optional[Tensor]) -> Tensor:
    """Sums over each sequence: [B] of values [B, T], or [S] of packed values [N]."""
    return values.sum(-1) if bounds is None else torch.segment_reduce(values, "sum", offsets=bounds, axis=0)


def _long_tail(mask: Tensor, counts: Tensor, bounds: Optional[Tensor]) -> Tensor:
    """Which tokens lie beyond the length of the shorter answer of their pair, like mask. counts: [2B] lengths."""
    if counts.numel() % 2:
        raise ValueError(f"logps: got {counts.numel()} sequences, expected 2B of them, chosen first, with ld_alpha")
    shared = torch.minimum(*counts.chunk(2)).repeat(2)
    position = mask.cumsum(-1)
    if bounds is None:
        return position > shared[:, None]
    tokens = torch.arange(mask.numel(), device=mask.device)
    sequence = torch.searchsorted(bounds, tokens, right=True) - 1
    before = torch.nn.functional.pad(position, (1, 0))[bounds[:-1]]
    return position - before[sequence] > shared[sequence]


def sequence_logps(
    logps: Tensor,
    mask: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    *,
    average: bool = False,
    ld_alpha: Optional[float] = None,
) -> Tensor:
    """Log-probs of sequences: the sums or means of their tokens' log-probs.

    With ld_alpha these are LD-DPO's log-probs (Liu et al. 2024, arXiv:2409.06411): for a pair of answers with l_w and
    l_l tokens, tokens after the first min(l_w, l_l) have the weight ld_alpha.

        sum_(t <= min(l_w, l_l)) log p_t + ld_alpha * sum_(t > min(l_w, l_l)) log p_t

    Lengths and positions refer to the tokens that count, as in TRL. Use the same ld_alpha for policy and reference.

    Args:
        logps: [B, T] padded, or [N] packed (then `cu_seqlens` is required), per token, in nats.
        mask: like logps, True where a token counts. None: all count. Ignored tokens are already 0 in the output of
            `linear_logps`, but with `average` or `ld_alpha` they must be masked so that they are not counted.
        cu_seqlens: [S + 1] integers, the bounds of the packed sequences, as in flash-attention.
        average: return the mean over the tokens that count instead of the sum. A sequence without such tokens gives 0.
            With ld_alpha, the weighted sum is divided by the number of all tokens that count, as in TRL's "ipo" and
            "sigmoid_norm".
        ld_alpha: in [0, 1]. Sequences must then be stacked, chosen first, then rejected: [2B, T], or 2B packed ones. 1
            gives the plain sum, 0 drops the tokens beyond the shared length. None: no LD-DPO.

    Returns:
        [B] or [S], at least fp32.

    Raises:
        TypeError, ValueError: an argument has a wrong type or shape; the error names it.
    """
    checks.flags(average=average)
    kept, mask, bounds = _checked("logps", logps, mask, cu_seqlens)
    counts = _sequence_sums(mask.to(kept.dtype), bounds)
    if ld_alpha is None:
        sums = _sequence_sums(kept, bounds)
    else:
        ld_alpha = checks.number("ld_alpha", ld_alpha, "numbers from 0 to 1, or None", lambda x: 0 <= x <= 1)
        tail = _long_tail(mask, counts, bounds)
        sums = _sequence_sums(kept.masked_fill(tail, 0), bounds)
        if ld_alpha:  # weights the sum, not each token, whose rounding errors would not cancel
            sums = sums + ld_alpha * _sequence_sums(kept.masked_fill(~tail, 0), bounds)
    return sums / counts.clamp(min=1) if average else sums


def _divisor(name: str, count: Count, other: Count, batch_count: Tensor, world_size: int) -> Union[float, Tensor]:
    """The count to divide by: the one passed, or that of this batch; at least 1, so that an empty batch gives 0."""
    if count is None:
        if other is not None or world_size > 1:
            raise ValueError(f"{name}: got None, expected the count of the whole step, which this mode divides by")
        return batch_count.clamp(min=1)
    if not isinstance(count, Tensor):
        return checks.number(name, count, "numbers >= 0", lambda x: x >= 0) or 1.0
    if count.numel() != 1:
        raise ValueError(f"{name}: got shape {tuple(count.shape)}, expected a number or a 0-dim tensor")
    count = count.detach().reshape(()).to(batch_count.device, batch_count.dtype)
    return torch.where(count > 0, count, 1)


def _check_mode(mode: str, max_length: Optional[float], world_size: int) -> None:
    checks.choice("mode", mode, MODES)
    if (mode == "seq-mean-token-sum-norm") != (max_length is not None):
        expected = "a length" if max_length is None else "None"
        raise ValueError(f"max_length: got {max_length}, expected {expected} with mode={mode!r}")
    checks.whole_number("world_size", world_size, 1)


def _normalizer(
    counted: Tensor,
    bounds: Optional[Tensor],
    mode: str,
    num_tokens: Count,
    num_sequences: Count,
    max_length: Optional[float],
    world_size: int,
) -> tuple[Optional[Tensor], Union[float, Tensor]]:
    """(number of counted tokens per sequence, or None for "token-mean"; the divisor of the total in this mode)."""
    if mode == "token-mean":
        return None, _divisor("num_tokens", num_tokens, num_sequences, counted.sum(), world_size)
    lengths = _sequence_sums(counted, bounds)
    sequences = (lengths > 0).to(counted.dtype).sum()
    divisor = _divisor("num_sequences", num_sequences, num_tokens, sequences, world_size)
    return lengths, divisor if max_length is None else divisor * checks.positive("max_length", max_length)


def aggregate(
    token_loss: Tensor,
    mask: Optional[Tensor] = None,
    mode: str = "token-mean",
    *,
    cu_seqlens: Optional[Tensor] = None,
    num_tokens: Count = None,
    num_sequences: Count = None,
    max_length: Optional[float] = None,
    world_size: int = 1,
) -> Tensor:
    """The loss of a batch from its token losses l. n_i is the number of counted tokens in sequence i. Names from verl.

        token-mean                sum_i sum_t l_it / num_tokens                       TRL's dapo, cispo; its bnpo
        seq-mean-token-sum        sum_i sum_t l_it / num_sequences                    TRL's luspo
        seq-mean-token-mean       sum_i (sum_t l_it / n_i) / num_sequences            GRPO; TRL's grpo, sapo
        seq-mean-token-sum-norm   sum_i sum_t l_it / (num_sequences max_length)       Dr. GRPO; TRL's dr_grpo

    DAPO: Yu et al. 2025, arXiv:2503.14476. GRPO: Shao et al. 2024, arXiv:2402.03300, eq. 3. Dr. GRPO: Liu et al. 2025,
    arXiv:2503.20783.

    An optimizer step often has several micro-batches and ranks. Pass the counts of the whole step; then the results
    summed over micro-batches and averaged over ranks (as DDP and FSDP average gradients) equal the loss of one big
    batch. Means of micro-batches do not: the weight of a token then depends on its micro-batch (TRL's bnpo; grpo only
    if sequences are spread unevenly). Do not use the counts with a trainer that divides by the number of micro-batches
    itself.

    Args:
        token_loss: [B, T], or packed [N] with cu_seqlens. Masked positions may hold any value.
        mask: like token_loss, True where a token counts. None: all count.
        mode: one of the above.
        cu_seqlens: [S + 1] integers, the bounds of the packed sequences.
        num_tokens, num_sequences: counts of the whole step, numbers or 0-dim tensors (no host sync). None: those of
            this batch; an error if the step is known to be larger (world_size > 1, or the other count is passed). You
            may pass both with every mode, which uses the one it divides by. By default a sequence without counted
            tokens is not counted, as in verl. TRL and OpenRLHF count it: for that pass num_sequences=len(token_loss).
        max_length: > 0, the fixed length of "seq-mean-token-sum-norm", required there and not allowed in other modes.
            verl's default is the padded length T, which changes from batch to batch.
        world_size: the number of data-parallel ranks whose gradients are averaged.

    Returns:
        A scalar, at least fp32; for a batch without counted tokens a differentiable 0.

    Raises:
        TypeError, ValueError: a wrong shape, an unknown mode or a missing count; the error names the argument.
    """
    _check_mode(mode, max_length, world_size)
    kept, mask, bounds = _checked("token_loss", token_loss, mask, cu_seqlens)
    lengths, divisor = _normalizer(mask.to(kept.dtype), bounds, mode, num_tokens, num_sequences, max_length, world_size)
    if lengths is None:
        total = kept.sum()
    else:
        sums = _sequence_sums(kept, bounds)
        total = (sums / lengths.clamp(min=1) if mode == "seq-mean-token-mean" else sums).sum()
    return total * world_size / divisor


def token_weights(mask: Tensor, mode: str = "token-mean", **counts: Count) -> Tensor:
    """The weights w for which `aggregate(token_loss, mask, mode, **counts)` equals sum(w * token_loss).

    `policy_loss_from_logits` takes them, because it writes the gradient in the forward, before the loss is reduced.

    Args:
        mask: [B, T], or packed [N] with cu_seqlens, non-zero where a token counts.
        mode, counts: as for `aggregate`: num_tokens, num_sequences, max_length, world_size, cu_seqlens.

    Returns:
        Like mask, fp32; 0 where masked.
    """
    return _token_weights(mask, mode, **counts)


def _token_weights(
    mask: Tensor,
    mode: str,
    *,
    cu_seqlens: Optional[Tensor] = None,
    num_tokens: Count = None,
    num_sequences: Count = None,
    max_length: Optional[float] = None,
    world_size: int = 1,
) -> Tensor:
    """`token_weights` in closed form, without autograd, which would fail under saved-tensor hooks."""
    if checks.tensor("mask", mask).ndim != (2 if cu_seqlens is None else 1):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected [B, T] without cu_seqlens, [N] with them")
    _check_mode(mode, max_length, world_size)
    counted = checks.mask_like("mask", mask, mask, "itself").float()
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, mask.numel(), mask.device)
    lengths, divisor = _normalizer(counted, bounds, mode, num_tokens, num_sequences, max_length, world_size)
    share = counted.new_ones(()) / divisor * world_size
    if lengths is None or mode != "seq-mean-token-mean":
        return counted * share
    shares = share / lengths.clamp(min=1)
    if bounds is None:
        return counted * shares[:, None]
    return counted * shares.repeat_interleave(bounds.diff(), output_size=mask.numel())
