"""Which loss a `loss_type` of `policy_loss_from_logits` is: its settings, checked, as a Form."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend.interface import Form
from fused_po.losses.group_relative import CLIPPED, GRPO_MODES, plan
from fused_po.losses.policy import clip_range, ratio_bound
from fused_po.reduce import token_weights

TYPES = ("ppo", "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo", "cispo", "sapo", "reinforce", "sft")
WITHOUT_RATIO = ("reinforce", "sft")
KLS = (None, "k2", "k3")
SAPO_TEMPERATURES = {"temperature_pos": 1.0, "temperature_neg": 1.05}  # those of losses.sapo


def refuse_unknown(settings: dict, allowed: tuple[str, ...], loss_type: str) -> None:
    """Refuse settings that the loss_type does not take."""
    for name, value in settings.items():
        if name not in allowed:
            raise ValueError(f"{name}: got {value}, allowed for loss_type={loss_type!r} are {list(allowed) or 'none'}")


def form_of(loss_type: str, settings: dict, rest: dict) -> tuple[Form, bool]:
    """(what a token's loss is, whether an answer has one ratio); refuses settings that the loss_type does not take."""
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
            raise ValueError(f"importance_sampling_level: got 'sequence' with {loss_type!r}, which takes 'token' here")
        if loss_type == "cispo":
            return Form("weight", 0.0, checks.positive("epsilon_high", high), **rest), False
        if loss_type == "sapo":
            taus = SAPO_TEMPERATURES | p.settings
            low, high = (checks.positive(f"sapo_{name}", taus[name]) for name in SAPO_TEMPERATURES)
            return Form("gate", low, high, **rest), False
    return Form("clip", 1 - low, 1 + high, math.inf if bound is None else bound, **rest), per_answer


def terms_besides(kl: Optional[str], kl_coef: float, entropy_coef: float, ref_logps: object, settings: dict) -> dict:
    """The KL and the entropy bonus of a Form."""
    checks.choice("kl", kl, KLS)
    kl_coef = checks.number("kl_coef", kl_coef, "finite numbers >= 0", lambda v: v >= 0)
    if kl is None and kl_coef:
        raise ValueError(f"kl_coef: got {kl_coef} without an estimator; name one, such as kl='k3'")
    if (kl is None) != (ref_logps is None):
        got = "None" if ref_logps is None else "a tensor"
        raise ValueError(f"ref_logps: got {got} with kl={kl!r}; a KL needs both, and kl=None has none")
    times_ratio = settings.pop("use_bias_correction_kl", True)
    checks.choice("use_bias_correction_kl", times_ratio, (True, False))
    checks.only_with("use_bias_correction_kl", times_ratio, True, kl is not None, "a KL")
    entropy_coef = checks.number("entropy_coef", entropy_coef, "finite numbers >= 0", lambda v: v >= 0)
    return {"kl": kl, "kl_coef": kl_coef, "kl_times_ratio": times_ratio, "entropy_coef": entropy_coef}


def default_weights(mask: Tensor, loss_type: str) -> Tensor:
    """[B, T], those of the loss_type's own mode over this batch."""
    mode = GRPO_MODES.get(loss_type, "token-mean")
    if mode == "seq-mean-token-sum-norm":
        raise ValueError(
            f"weights: got None with {loss_type!r}, which divides by a fixed length; pass "
            f"fused_po.token_weights(mask, {mode!r}, max_length=...)"
        )
    return token_weights(mask, mode)


def per_token(name: str, value: object, mask: Tensor, dtype: torch.dtype) -> Optional[Tensor]:
    """[B, T] numbers of tokens as constants, 0 where nothing counts; None stays None."""
    if value is None:
        return None
    if checks.floating(name, value).shape != mask.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(mask.shape)}, that of labels")
    checks.same_device(name, value, mask.device)
    checks.finite(name, value, mask)
    return torch.where(mask, value.detach(), 0).to(dtype)
