"""`gae`: generalized advantage estimation as one scan instead of a loop over tokens."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend import choose as backends
from fused_po.backend.interface import stats_dtype
from fused_po.ops.autograd import public
from fused_po.ops.register import custom_op


def _dtype(rewards: Tensor, values: Tensor, last_values: Optional[Tensor]) -> torch.dtype:
    return stats_dtype(*(t.dtype for t in (rewards, values, last_values) if t is not None))


def _finite(x: Tensor) -> bool:
    """Whether the sum of x is finite, computed over blocks of rows that PyTorch sums on one thread."""
    return all(bool(rows.sum().isfinite()) for rows in x.split(max(1, (1 << 15) // max(1, x.shape[1]))))


class GAEResults(NamedTuple):
    """What the op returns."""

    advantages: Tensor
    returns: Tensor


@custom_op("fused_po::gae")
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Optional[Tensor],
    last_values: Optional[Tensor],
    gamma: float,
    lam: float,
    backend: str,
) -> GAEResults:
    advantages, returns = backends.get(backend).gae(rewards, values, mask, last_values, gamma, lam)
    if checks.values_checked(advantages) and not _finite(advantages):  # finite results imply finite inputs
        checks.finite("rewards", rewards, mask)
        checks.finite("values", values, mask)
        if last_values is not None:
            checks.finite("last_values", last_values, None if mask is None else mask.any(1))
    return GAEResults(advantages, returns)


@_gae.register_fake
def _(rewards, values, mask, last_values, gamma, lam, backend):
    dtype = _dtype(rewards, values, last_values)
    return GAEResults(*(rewards.new_empty(rewards.shape, dtype=dtype) for _ in range(2)))


@public
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Optional[Tensor] = None,
    last_values: Optional[Tensor] = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: Optional[str] = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: advantages, and returns as targets of the value function.

        delta_t = r_t + gamma V_(t+1) - V_t,   A_t = delta_t + gamma lam A_(t+1),   returns = A + V

    where t + 1 is the next position that counts: Schulman et al. 2016, arXiv:1506.02438, eq. 16. Inputs get no
    gradient. Advantages are not whitened (verl does that in the same function); use `losses.whiten`.

    Masked positions (padding, or tokens of a tool between those of the policy) are skipped, as in verl. OpenRLHF treats
    them as positions with values and rewards of 0.

    Args:
        rewards, values: [B, T], float32, bfloat16, float16 or float64, any strides. NaN or infinity at a counted
            position is an error on CPU, and elsewhere with FUSED_PO_DEBUG=1; without it the row becomes NaN.
        mask: [B, T], True or non-zero where a token counts; masked values are ignored. None: all tokens count.
        last_values: [B], the value after the last counted token of each row, for truncated answers. None: 0, for
            answers that ended.
        gamma, lam: in [0, 1].
        backend: "triton", "cuda" or "reference"; None selects one by device. See `backends`.

    Returns:
        (advantages, returns), [B, T], fp32 (float64 if any input is), 0 where the mask is False. Bitwise deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, by name.
    """
    checks.same_shape(rewards=rewards, values=values)
    if rewards.ndim != 2:
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected [B, T]")
    if mask is not None:
        mask = checks.mask_like("mask", mask, rewards, "rewards")
    if last_values is not None:
        if checks.floating("last_values", last_values).shape != rewards.shape[:1]:
            shape = tuple(rewards.shape[:1])
            raise ValueError(f"last_values: got shape {tuple(last_values.shape)}, expected {shape}, one per row")
        checks.same_device("last_values", last_values, rewards.device)
        last_values = last_values.detach()
    gamma, lam = (
        checks.number(name, x, "numbers from 0 to 1", lambda x: 0 <= x <= 1)
        for name, x in (("gamma", gamma), ("lam", lam))
    )
    name = backends.resolve(backend, rewards.device, _dtype(rewards, values, last_values))
    return tuple(_gae(rewards.detach(), values.detach(), mask, last_values, gamma, lam, name))
