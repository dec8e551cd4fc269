"""`gae`: generalised advantage estimation as one scan, not a loop over tokens."""

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
    """Whether the sum of x is finite; by as many rows as PyTorch does on one thread."""
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
    if checks.looked_at(advantages) and not _finite(advantages):  # if it is, so is all that was read
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
    """Generalised advantage estimation, and the returns that a value function is fitted to.

        delta_t = r_t + gamma V_(t+1) - V_t,   A_t = delta_t + gamma lam A_(t+1),   returns = A + V

    with t + 1 the next position that counts: Schulman et al. 2016, arXiv:1506.02438, eq. 16. No gradient flows: inputs
    are taken as constants. Advantages are not whitened (verl does that in the same function): `losses.whiten` is.

    Positions that do not count (padding; tokens of a tool between those of the policy) are skipped as if they were not
    there, as in verl. OpenRLHF takes them, with values and rewards of 0, for positions of their own.

    Args:
        rewards, values: [B, T], float32, bfloat16, float16 or float64, any strides. On CPU, NaN or an infinity
            where it counts is an error; elsewhere under FUSED_PO_DEBUG=1 only, and else comes out as NaN in its row.
        mask: [B, T], True or non-zero where a token counts; what lies elsewhere is not looked at. None: all count.
        last_values: [B], the values after each row's last token that counts, for answers that were cut off.
            None: 0, for answers that ended.
        gamma, lam: in [0, 1].
        backend: "triton" or "reference"; None chooses by device. See `backends`.

    Returns:
        (advantages, returns), [B, T], fp32 (float64 if any input is), 0 where the mask is False. The same bit for bit
        in every run.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, by name.
    """
    checks.alike(rewards=rewards, values=values)
    if rewards.ndim != 2:
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected [B, T]")
    if mask is not None:
        mask = checks.mask_like("mask", mask, rewards, "rewards")
    if last_values is not None:
        if checks.floating("last_values", last_values).shape != rewards.shape[:1]:
            shape = tuple(rewards.shape[:1])
            raise ValueError(f"last_values: got shape {tuple(last_values.shape)}, expected {shape}, one for each row")
        checks.same_device("last_values", last_values, rewards.device)
        last_values = last_values.detach()
    gamma, lam = (
        checks.number(name, x, "numbers from 0 to 1", lambda x: 0 <= x <= 1)
        for name, x in (("gamma", gamma), ("lam", lam))
    )
    name = backends.resolve(backend, rewards.device, _dtype(rewards, values, last_values))
    return tuple(_gae(rewards.detach(), values.detach(), mask, last_values, gamma, lam, name))
