"""Numerically safe functions that the losses share: no value and no gradient overflows."""

from __future__ import annotations

import torch
from torch import Tensor


def saturating_expm1(x: Tensor, limit: float = 20.0) -> Tensor:
    """e^x - 1 up to `limit`, the tangent beyond it: convex, increasing, finite, with a gradient everywhere.

    verl clamps log-ratios at 20 (e^20 = 4.9e8). A clamp has no gradient exactly where the policies differ most.
    """
    grown = _expm1(x.clamp(max=limit))
    return grown + (grown.detach() + 1) * torch.relu(x - limit)


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1. The backward of torch.expm1 computes e^x as result + 1, which loses the digits of a small e^x."""
    return torch.where(x < -0.7, torch.exp(x) - 1, torch.expm1(x))


def k3_estimate(r: Tensor, limit: float = 20.0) -> Tensor:
    """e^-r - 1 + r for r >= -limit, the tangent below; +inf at r = -inf and r = inf."""
    inside = (-r).clamp(max=limit)
    grown = _expm1(inside)
    return grown - inside + grown.detach() * torch.relu(-r - limit)


def weighted(weight: Tensor | float, value: Tensor) -> Tensor:
    """weight * value; a weight of 0 gives 0 and no gradient even for infinite values."""
    if isinstance(weight, Tensor):
        return weight * torch.where(weight == 0, 0, value)
    return weight * value if weight else torch.zeros_like(value)


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 - e^logp) of log-probs <= 0. p is clamped to 1 - eps / 2, so the result is finite.

    Uses expm1 near 0 and log1p elsewhere (Maechler 2012, "Accurately computing log(1 - exp(-|a|))", eq. 7).
    """
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps / 2)
    near = logp > -0.6931471805599453
    close = torch.where(near, logp, -0.6931471805599453)  # the unused branch must not overflow in the backward either
    far = torch.where(near, -0.6931471805599453, logp)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
