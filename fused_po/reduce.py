"""From tokens to sequences, and from tokens to the loss of a batch."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from fused_po import checks

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
Count = Union[None, int, float, Tensor]


def _bounds(cu_seqlens: Tensor, n_tokens: int, device: torch.device) -> Tensor:
    """cu_seqlens as int64 on this device, if it can be the bounds of packed sequences."""
    if checks.tensor("cu_seqlens", cu_seqlens).ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected [S + 1]")
    if cu_seqlens.is_floating_point():
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, expected an integer dtype such as torch.int32")
    if checks.values_checked(cu_seqlens):
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != n_tokens or bool((steps < 0).any()):
            raise ValueError(f"cu_seqlens: got {cu_seqlens.tolist()}, expected rising bounds from 0 to N = {n_tokens}")
    return cu_seqlens.to(device, torch.int64)


def _checked(name: str, values: Tensor, mask: Optional[Tensor], cu_seqlens: Optional[Tensor]) -> tuple:
    """(values where they count and 0 elsewhere, mask, bounds): at least fp32; mask all True if there is none."""
    checks.floating(name, values)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else checks.mask_like("mask", mask, values, name)
    if values.ndim != (2 if cu_seqlens is None else 1):
        expected = "[B, T] without cu_seqlens, [N] with them"
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected {expected}")
    values = values if values.dtype == torch.float64 else values.float()
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, values.numel(), values.device)
    return torch.where(mask, values, 0), mask, bounds


def mean(values: Tensor) -> Tensor:
    """The mean of all values, with gradients; 0 where there are none."""
    return values.mean() if values.numel() else values.sum()


def _sequence_sums(values: Tensor, bounds: Optional[Tensor]) -> Tensor:
    """[B] or [S] sums of [B, T] or [N]."""
    return values.sum(-1) if bounds is None else torch.segment_reduce(values, "sum", offsets=bounds, axis=0)


def _long_tail(mask: Tensor, counts: Tensor, bounds: Optional[Tensor]) -> Tensor:
    """Which tokens lie beyond the shorter answer of their pair, in the shape of mask; counts: [2B] tokens in each."""
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
    """Log-probs of whole sequences.

    With ld_alpha, those of LD-DPO (Liu et al. 2024, arXiv:2409.06411): in a pair of answers of l_w and l_l tokens, what
    lies beyond the first min(l_w, l_l) of the longer weighs ld_alpha.

        sum_(t <= min(l_w, l_l)) log p_t + ld_alpha * sum_(t > min(l_w, l_l)) log p_t

    Lengths and positions are those of the tokens that count, as in TRL. Policy and reference need the same ld_alpha.

    Args:
        logps: [B, T] padded, or [N] packed (then `cu_seqlens` is required), per token, in nats.
        mask: like logps, True where a token counts. None: all do (ignored tokens are 0 in `linear_logps` already;
            with `average` or `ld_alpha` they must be masked all the same, so that they are not counted).
        cu_seqlens: [S + 1] integers, the packed sequences' bounds, as flash-attention has them.
        average: mean over the tokens that count, not their sum. A sequence without any gives 0. With ld_alpha, the
            weighted sum over the number of all those tokens, as TRL's "ipo" and "sigmoid_norm" have it.
        ld_alpha: in [0, 1]; sequences are then stacked, [2B, T] or 2B packed ones: chosen first, then rejected. 1 is
            the plain sum, 0 drops what lies beyond the shared length. None: no pairs.

    Returns:
        [B] or [S], at least fp32.

    Raises:
        TypeError, ValueError: shapes that do not fit, by name.
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
        if ld_alpha:  # the tail's sum weighed, not its tokens, whose roundings would stay where they cancel
            sums = sums + ld_alpha * _sequence_sums(kept.masked_fill(~tail, 0), bounds)
    return sums / counts.clamp(min=1) if average else sums


def _divisor(name: str, given: Count, other: Count, here: Tensor, world_size: int) -> Union[float, Tensor]:
    """The count to divide by: the one given, or the one of this batch; never 0, since nothing over 0 is to be 0."""
    if given is None:
        if other is not None or world_size > 1:
            raise ValueError(f"{name}: got None, expected the count of the whole step, which this mode divides by")
        return here.clamp(min=1)
    if not isinstance(given, Tensor):
        return checks.number(name, given, "numbers >= 0", lambda x: x >= 0) or 1.0
    if given.numel() != 1:
        raise ValueError(f"{name}: got shape {tuple(given.shape)}, expected a number or a 0-dim tensor")
    given = given.detach().reshape(()).to(here.device, here.dtype)
    return torch.where(given > 0, given, 1)


def _check_mode(mode: str, max_length: Optional[float], world_size: int) -> None:
    checks.choice("mode", mode, MODES)
    if (mode == "seq-mean-token-sum-norm") != (max_length is not None):
        raise ValueError(
            f"max_length: got {max_length}, expected a length with 'seq-mean-token-sum-norm' and only then"
        )
    checks.whole_number("world_size", world_size, 1)


def _normaliser(
    counted: Tensor,
    bounds: Optional[Tensor],
    mode: str,
    num_tokens: Count,
    num_sequences: Count,
    max_length: Optional[float],
    world_size: int,
) -> tuple[Optional[Tensor], Union[float, Tensor]]:
    """(each sequence's number of tokens, what the mode divides the whole sum by); None first for "token-mean"."""
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
    """A batch's loss from its tokens' losses l, by verl's names; n_i is the number of tokens that count in sequence i.

        token-mean                sum_i sum_t l_it / num_tokens                       TRL's dapo, cispo; its bnpo
        seq-mean-token-sum        sum_i sum_t l_it / num_sequences                    TRL's luspo
        seq-mean-token-mean       sum_i (sum_t l_it / n_i) / num_sequences            GRPO; TRL's grpo, sapo
        seq-mean-token-sum-norm   sum_i sum_t l_it / (num_sequences max_length)       Dr. GRPO; TRL's dr_grpo

    DAPO: Yu et al. 2025, arXiv:2503.14476. GRPO: Shao et al. 2024, arXiv:2402.03300, eq. 3. Dr. GRPO: Liu et al. 2025,
    arXiv:2503.20783.

    An optimizer step is seldom one batch. With the counts of the whole step, over all its micro-batches and ranks, the
    results summed over micro-batches and averaged over ranks (as DDP and FSDP average gradients) are those of the one
    big batch. Means of micro-batches are not: they weigh a token by who sits beside it (TRL's bnpo; grpo only where
    sequences are spread unevenly). A trainer that itself divides by the number of micro-batches undoes this.

    Args:
        token_loss: [B, T], or packed [N] with cu_seqlens. Where the mask is False it may hold anything.
        mask: like token_loss, True where a token counts. None: all do.
        mode: one of the above.
        cu_seqlens: [S + 1] integers, the packed sequences' bounds.
        num_tokens, num_sequences: of the whole step, numbers or 0-dim tensors (no host sync). None: of this batch;
            an error where the step is known to be more: world_size > 1, or the other of the two is given. A loop may
            pass both whatever the mode, which takes the one it divides by. By default a sequence without a token is
            no sequence, as in verl; TRL and OpenRLHF count it: num_sequences=len(token_loss). It adds 0 either way.
        max_length: > 0, the fixed length of "seq-mean-token-sum-norm", which needs it; no other mode takes it. verl
            takes the padded length T if none is given, which changes from batch to batch.
        world_size: of the data-parallel ranks whose gradients are averaged.

    Returns:
        A scalar, at least fp32; of a batch where nothing counts a differentiable 0.

    Raises:
        TypeError, ValueError: a wrong shape, an unknown mode, a missing count, by name.
    """
    _check_mode(mode, max_length, world_size)
    kept, mask, bounds = _checked("token_loss", token_loss, mask, cu_seqlens)
    lengths, divisor = _normaliser(mask.to(kept.dtype), bounds, mode, num_tokens, num_sequences, max_length, world_size)
    if lengths is None:
        total = kept.sum()
    else:
        sums = _sequence_sums(kept, bounds)
        total = (sums / lengths.clamp(min=1) if mode == "seq-mean-token-mean" else sums).sum()
    return total * world_size / divisor


def token_weights(mask: Tensor, mode: str = "token-mean", **counts: Count) -> Tensor:
    """The weights w with which `aggregate(token_loss, mask, mode, **counts)` is sum w * token_loss.

    For losses that take them beforehand: `policy_loss_from_logits` writes a gradient before anybody has reduced.

    Args:
        mask: [B, T], or packed [N] with cu_seqlens, non-zero where a token counts.
        mode, counts: as `aggregate`: num_tokens, num_sequences, max_length, world_size, cu_seqlens.

    Returns:
        Like mask, fp32; 0 where nothing counts.
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
    """`token_weights` in closed form: no autograd, which would not work under hooks on saved tensors."""
    if checks.tensor("mask", mask).ndim != (2 if cu_seqlens is None else 1):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected [B, T] without cu_seqlens, [N] with them")
    _check_mode(mode, max_length, world_size)
    counted = checks.mask_like("mask", mask, mask, "itself").float()
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, mask.numel(), mask.device)
    lengths, divisor = _normaliser(counted, bounds, mode, num_tokens, num_sequences, max_length, world_size)
    share = counted.new_ones(()) / divisor * world_size
    if lengths is None or mode != "seq-mean-token-mean":
        return counted * share
    shares = share / lengths.clamp(min=1)
    if bounds is None:
        return counted * shares[:, None]
    return counted * shares.repeat_interleave(bounds.diff(), output_size=mask.numel())
