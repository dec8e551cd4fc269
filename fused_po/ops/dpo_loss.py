"""The arguments of the DPO loss, checked: `dpo_from_logits` and `linear_dpo` take the same."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks

KL_ESTIMATORS = ("k1", "k2", "k3", "full")


class DPOLoss(NamedTuple):
    """The numbers of the loss."""

    beta: float
    label_smoothing: float
    kl: Optional[str]
    kl_coef: float


def check_stacked(name: str, value: Tensor, dims: int) -> None:
    """Refuse what is not [2B, ..., last]."""
    checks.floating(name, value)
    if value.ndim != dims or value.shape[0] % 2 or value.shape[-1] == 0:
        last = "V" if name.endswith("logits") else "H"
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected [2B, T, {last}] with {last} >= 1: B chosen answers, "
            "then B rejected ones"
        )


def check_loss(
    beta: float,
    label_smoothing: float,
    kl: Optional[str],
    kl_coef: float,
    ref_logps: Optional[Tensor],
    labels: Tensor,
    device: torch.device,
) -> DPOLoss:
    """The numbers of the loss, and what holds between its arguments."""
    beta = checks.positive("beta", beta)
    smoothing = checks.number("label_smoothing", label_smoothing, "0 <= label_smoothing < 0.5", lambda v: 0 <= v < 0.5)
    coef = checks.number("kl_coef", kl_coef, "finite numbers >= 0", lambda v: v >= 0)
    checks.choice("kl", kl, (None, *KL_ESTIMATORS))
    if kl is None and coef:
        raise ValueError(f"kl_coef: got {kl_coef} with kl=None; set kl to one of {', '.join(map(repr, KL_ESTIMATORS))}")
    loss = DPOLoss(beta, smoothing, kl, coef)
    if ref_logps is None:
        return loss
    if kl == "full":
        raise ValueError("kl: got 'full' with ref_logps; the exact KL needs ref_logits, or ref_hidden and ref_weight")
    checks.same_device("ref_logps", checks.floating("ref_logps", ref_logps), device)
    if ref_logps.shape not in (labels.shape, labels.shape[:1]):
        allowed = f"{tuple(labels.shape)} per token or {tuple(labels.shape[:1])} summed over tokens"
        raise ValueError(f"ref_logps: got shape {tuple(ref_logps.shape)}, expected {allowed}")
    if kl is not None and ref_logps.ndim == 1:
        raise ValueError(f"kl: got {kl!r} with ref_logps of shape [2B], expected ref_logps per token, [2B, T]")
    return loss
