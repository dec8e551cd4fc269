"""Generalized advantage estimation, vectorized."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.backend.interface import stats_dtype

ONE_THREAD = 1 << 15  # elements up to which PyTorch wakes no other thread on CPU, which can cost more than all of gae
SCAN_WIDTH = 32


def discounted_sums_(x: Tensor, factor: float, step: int) -> None:
    """y_t = x_t + factor * y_(t + 1) along the rows of x[B, T], in place; T a multiple of SCAN_WIDTH, or less.

    SCAN_WIDTH steps, each for the i-th tokens of all blocks of that many; then the same over the blocks' first tokens.
    """
    n_rows, length = x.shape
    width = max(1, min(length, SCAN_WIDTH))
    n_blocks = length // width
    x = x.view(n_rows, n_blocks, width)
    tokens = x.unbind(2)
    for here, after in zip(tokens[-2::-1], tokens[:0:-1]):
        here.add_(after, alpha=factor)
    if n_blocks > 1:
        whole = n_blocks if n_blocks <= SCAN_WIDTH else -(-n_blocks // SCAN_WIDTH) * SCAN_WIDTH
        first = torch.nn.functional.pad(tokens[0], (0, whole - n_blocks))
        discounted_sums_(first, factor**width, step)
        powers = torch.tensor([factor ** (width - i) for i in range(width)], dtype=x.dtype, device=x.device)
        for some, later in zip(x.split(step), first[:, 1:n_blocks, None].split(step)):
            some[:, :-1].addcmul_(later, powers)


def packed(values: Tensor, column: Tensor | None, width: int) -> Tensor:
    """[B, width] of values[B, T] in these columns, or at the right end."""
    if column is None:
        return torch.nn.functional.pad(values, (width - values.shape[1], 0))
    return torch.zeros(len(values), width, dtype=values.dtype, device=values.device).scatter_(1, column, values)


def gae_rows(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    last: Tensor | None,
    gamma: float,
    decay: float,
    step: int,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    """Write the results into advantages and returns [B, T]; only the scan is over more than `step` rows at once.

    With a mask, what counts moves to the right end of a wider row, in order, and the rest to its column 0, which
    nothing that counts reads.
    """
    n_rows, length = rewards.shape
    width = (length // SCAN_WIDTH + 1) * SCAN_WIDTH
    deltas = torch.empty(n_rows, width, dtype=returns.dtype, device=returns.device)
    parts = [slice(begin, begin + step) for begin in range(0, n_rows, step)]
    columns: list[Tensor | None] = []
    for rows in parts:
        column = None
        if mask is not None:
            column = mask[rows].cumsum(1)
            column = column.add_(width - 1 - column[:, -1:]).mul_(mask[rows])
        columns.append(column)
        r, v, delta = packed(rewards[rows], column, width), packed(values[rows], column, width), deltas[rows]
        torch.sub(r, v, out=delta)
        delta[:, :-1].add_(v[:, 1:], alpha=gamma)
        if last is not None:
            delta[:, -1].add_(last[rows], alpha=gamma)
    discounted_sums_(deltas, decay, step)
    deltas[:, 0] = 0
    for rows, column in zip(parts, columns):
        if column is None:
            advantages[rows] = deltas[rows, width - length :]
            torch.add(advantages[rows], values[rows], out=returns[rows])
        else:
            torch.gather(deltas[rows], 1, column, out=advantages[rows])
            returns[rows] = torch.where(mask[rows], advantages[rows] + values[rows], 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, last_values: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T] of rewards, values [B, T], a bool mask [B, T] or None, last values [B] or None."""
    dtype = stats_dtype(*(x.dtype for x in (rewards, values, last_values) if x is not None))
    rewards, values, last_values = (None if x is None else x.to(dtype) for x in (rewards, values, last_values))
    n_rows, length = rewards.shape
    advantages, returns = (torch.empty(n_rows, length, dtype=dtype, device=rewards.device) for _ in range(2))
    step = max(1, ONE_THREAD // (length + SCAN_WIDTH)) if rewards.device.type == "cpu" else max(1, n_rows)
    for begin in range(0, n_rows if length else 0, SCAN_WIDTH * step):
        rows = slice(begin, begin + SCAN_WIDTH * step)
        some = (x if x is None else x[rows] for x in (rewards, values, mask, last_values))
        gae_rows(*some, gamma, gamma * lam, step, advantages[rows], returns[rows])
    return advantages, returns
