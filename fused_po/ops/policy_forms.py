"""The settings of each `loss_type` of `policy_loss_from_logits`, checked and converted to a Form."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend.interface import Form, TokenInputs
from fused_po.losses.group_relative import CLIPPED, GRPO_MODES, plan
from fused_po.losses.policy import broadcast_advantages, clip_range, ratio_bound
from fused_po.reduce import token_weights

IGNORE = -100
TYPES = ("ppo", "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo", "cispo", "sapo", "reinforce", "sft")
WITHOUT_RATIO = ("reinforce", "sft")
KLS = (None, "k2", "k3")
SAPO_TEMPERATURES = {"temperature_pos": 1.0, "temperature_neg": 1.05}  # those of losses.sapo


def refuse_unknown(settings: dict, allowed: tuple[str, ...], loss_type: str) -> None:
    """Raise for settings that the loss_type does not use."""
    for name, value in settings.items():
        if name not in allowed:
            raise ValueError(
                f"{name}: got {value}, not a setting of loss_type={loss_type!r}, which has "
                f"{', '.join(allowed) or 'none'}; leave it out"
            )


def form_of(loss_type: str, settings: dict, rest: dict) -> tuple[Form, bool]:
    """(form of the token loss, whether the ratio is per answer). Raises for settings the loss_type does not use."""
    bounds = {name: settings.pop(name, None) for name in ("epsilon", "epsilon_high", "delta") if name in settings}
    if loss_type in WITHOUT_RATIO:
        refuse_unknown(bounds | settings, (), loss_type)
        return Form("weight", 1.0, 1.0, **rest), False
    if loss_type == "ppo":
        dual_clip = settings.pop("dual_clip", None)
        refuse_unknown(settings, ("epsilon", "epsilon_high", "delta", "dual_clip"), loss_type)
        low, high = clip_range(bounds.get("epsilon", 0.2), bounds.get("epsilon_high"))
        bound, per_answer = ratio_bound(high, dual_clip, bounds.get("delta")), False
    else:
        level = settings.pop("importance_sampling_level", None)
        p = plan(loss_type, *(bounds.get(name) for name in ("epsilon", "epsilon_high", "delta")), level, settings)
        low, high, bound, per_answer = p.low, p.high, p.bound, p.level == "sequence"
        if per_answer and loss_type not in CLIPPED:
            raise ValueError(
                f"importance_sampling_level: got 'sequence', expected 'token' with loss_type={loss_type!r}"
            )
        if loss_type == "cispo":
            return Form("weight", 0.0, checks.positive("epsilon_high", high), **rest), False
        if loss_type == "sapo":
            taus = SAPO_TEMPERATURES | p.settings
            low, high = (checks.positive(f"sapo_{name}", taus[name]) for name in SAPO_TEMPERATURES)
            return Form("gate", low, high, **rest), False
    return Form("clip", 1 - low, 1 + high, math.inf if bound is None else bound, **rest), per_answer


def kl_and_entropy_terms(
    kl: Optional[str], kl_coef: float, entropy_coef: float, ref_logps: object, settings: dict
) -> dict:
    """The KL and the entropy bonus of a Form."""
    checks.choice("kl", kl, KLS)
    kl_coef = checks.number("kl_coef", kl_coef, "finite numbers >= 0", lambda v: v >= 0)
    if kl is None and kl_coef:
        raise ValueError(f"kl_coef: got {kl_coef} with kl=None; set kl to 'k2' or 'k3'")
    if (kl is None) != (ref_logps is None):
        got = "None" if ref_logps is None else "a tensor"
        raise ValueError(f"ref_logps: got {got} with kl={kl!r}, expected a tensor if kl is set, else None")
    times_ratio = settings.pop("use_bias_correction_kl", True)
    checks.choice("use_bias_correction_kl", times_ratio, (True, False))
    checks.only_with("use_bias_correction_kl", times_ratio, True, kl is not None, "kl")
    entropy_coef = checks.number("entropy_coef", entropy_coef, "finite numbers >= 0", lambda v: v >= 0)
    return {"kl": kl, "kl_coef": kl_coef, "kl_times_ratio": times_ratio, "entropy_coef": entropy_coef}


def default_weights(mask: Tensor, loss_type: str) -> Tensor:
    """[B, T], the weights of the loss_type's mode over this batch."""
    mode = GRPO_MODES.get(loss_type, "token-mean")
    if mode == "seq-mean-token-sum-norm":
        raise ValueError(
            f"weights: got None with loss_type={loss_type!r}, which divides by a fixed length; pass "
            f"fused_po.token_weights(mask, {mode!r}, max_length=...)"
        )
    return token_weights(mask, mode)


def per_token(name: str, value: object, mask: Tensor, dtype: torch.dtype) -> Optional[Tensor]:
    """[B, T] values per token, checked and detached, 0 where masked; None stays None."""
    if value is None:
        return None
    if checks.floating(name, value).shape != mask.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(mask.shape)}, the shape of labels")
    checks.same_device(name, value, mask.device)
    checks.finite(name, value, mask)
    return torch.where(mask, value.detach(), 0).to(dtype)


def counted_labels(labels: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """(labels [B, T] with IGNORE where masked, the mask), both contiguous."""
    counted = labels != IGNORE
    if mask is not None:
        counted = counted & checks.mask_like("mask", mask, labels, "labels")
    counted = counted.contiguous()  # so that sums over tokens have the same order for all memory layouts
    # Not labels.where(labels != IGNORE, IGNORE), which equals labels: Inductor 2.13 compiles it wrongly for AVX2.
    return (labels if mask is None else torch.where(counted, labels, IGNORE)).contiguous(), counted


def inputs_of(
    advantages: Optional[Tensor],
    numbers: dict[str, Optional[Tensor]],
    counted: Tensor,
    loss_type: str,
    reads_old: bool,
    dtype: torch.dtype,
) -> TokenInputs:
    """What the losses read of tokens; numbers: the arguments weights, old_logps and ref_logps. counted: [B, T]."""
    if (advantages is None) != (loss_type == "sft"):
        got = "None" if advantages is None else "a tensor"
        raise ValueError(
            f"advantages: got {got} with loss_type={loss_type!r}, expected None for sft, else [B] or [B, T]"
        )
    old = numbers["old_logps"]
    checks.only_with("old_logps", None if old is None else "a tensor", None, reads_old, "a loss that has a ratio")
    a = counted if advantages is None else broadcast_advantages(advantages, counted)
    if numbers["weights"] is None:
        numbers = numbers | {"weights": default_weights(counted, loss_type)}
    per_tokens = (per_token(name, value, counted, dtype) for name, value in numbers.items())
    return TokenInputs(a.expand(counted.shape).to(dtype), *per_tokens)
