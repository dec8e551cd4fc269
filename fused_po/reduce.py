"""From tokens to sequences."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fused_po import checks


def sequence_logps(
    logps: Tensor, mask: Optional[Tensor] = None, cu_seqlens: Optional[Tensor] = None, *, average: bool = False
) -> Tensor:
    """Log-probs of whole sequences.

    Args:
        logps: [B, T] padded, or [N] packed (then `cu_seqlens` is required), per token, in nats.
        mask: like logps, True where a token counts. None: all do (ignored tokens are 0 in `linear_logps` already;
            with `average` they must be masked all the same, so that they are not counted).
        cu_seqlens: [S + 1] integers, the packed sequences' bounds, as flash-attention has them.
        average: mean over the tokens that count, not their sum. A sequence without any gives 0.

    Returns:
        [B] or [S].

    Raises:
        TypeError, ValueError: shapes that do not fit, by name.
    """
    checks.floating("logps", logps)
    if mask is not None and checks.tensor("mask", mask).shape != logps.shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(logps.shape)}, that of logps")
    if logps.ndim != (2 if cu_seqlens is None else 1):
        expected = "[B, T] without cu_seqlens, [N] with them"
        raise ValueError(f"logps: got shape {tuple(logps.shape)}, expected {expected}")
    counts = torch.ones_like(logps) if mask is None else mask.to(logps.dtype)
    kept = logps if mask is None else torch.where(mask.bool(), logps, 0)
    if cu_seqlens is None:
        sums, counts = kept.sum(-1), counts.sum(-1)
    else:
        if checks.tensor("cu_seqlens", cu_seqlens).ndim != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected [S + 1]")
        bounds = cu_seqlens.to(logps.device, torch.int64)
        sums, counts = (torch.segment_reduce(v, "sum", offsets=bounds, axis=0) for v in (kept, counts))
    return sums / counts.clamp(min=1) if average else sums
