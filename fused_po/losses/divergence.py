"""Estimates of the KL divergence between policy and reference from log-probs of sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po import checks


def kl_loss(logps: Tensor, ref_logps: Tensor, estimator: str = "k3") -> Tensor:
    """The KL estimate of each token, with r = log pi - log pi_ref (Schulman 2020, "Approximating KL divergence"):

        k1 = r        k2 = r^2 / 2        k3 = e^-r - 1 + r

    k1 belongs into a reward: as a loss, its gradient averages to nothing over the policy's own samples. k2 belongs into
    a loss, where its gradient is on-policy that of the reverse KL(pi || pi_ref). k3's gradient is k2's to first order.
    No clamp: k3 overflows in fp32 where the reference is more than 88 nats above the policy.

    Args:
        logps: [...], the policy's log-probs. ref_logps: [...], the reference's, taken as constants.
        estimator: "k1", "k2" or "k3".

    Returns:
        [...], unreduced.
    """
    checks.choice("estimator", estimator, ("k1", "k2", "k3"))
    r = logps - ref_logps.detach()
    if estimator == "k1":
        return r
    if estimator == "k2":
        return 0.5 * r * r
    return torch.expm1(-r) + r
