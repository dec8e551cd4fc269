"""Functions that the losses share so that no value and no gradient overflows."""

from __future__ import annotations

import torch
from torch import Tensor


def saturating_expm1(x: Tensor, limit: float = 20.0) -> Tensor:
    """e^x - 1 up to `limit`, its tangent beyond: convex, increasing and finite, and its gradient never vanishes.

    e^20 = 4.9e8 is where verl clamps log-ratios. A clamp would stop the gradient just where the policies part most.
    """
    grown = _expm1(x.clamp(max=limit))
    return grown + (grown.detach() + 1) * torch.relu(x - limit)


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1. The backward of torch.expm1 makes e^x of its result plus 1: rounded as 1 is, where e^x is small."""
    return torch.where(x < -0.7, torch.exp(x) - 1, torch.expm1(x))


def k3_estimate(r: Tensor, limit: float = 20.0) -> Tensor:
    """e^-r - 1 + r down to r = -limit, its tangent beyond: +inf at both infinities of r."""
    inside = (-r).clamp(max=limit)
    grown = _expm1(inside)
    return grown - inside + grown.detach() * torch.relu(-r - limit)


def weighed(weight: Tensor | float, value: Tensor) -> Tensor:
    """weight * value, where a weight of 0 gives 0 and no gradient, whatever the value: also for infinities."""
    if isinstance(weight, Tensor):
        return weight * torch.where(weight == 0, 0, value)
    return weight * value if weight else torch.zeros_like(value)


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 - e^logp) of log-probs <= 0, with p no nearer to 1 than half a unit in the last place of 1.

    By expm1 near 0 and log1p far from it (Maechler 2012, "Accurately computing log(1 - exp(-|a|))", eq. 7).
    """
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps / 2)
    near = logp > -0.6931471805599453
    close = torch.where(near, logp, -0.6931471805599453)  # what is not taken must not overflow in the backward either
    far = torch.where(near, -0.6931471805599453, logp)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
