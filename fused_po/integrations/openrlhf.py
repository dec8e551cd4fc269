"""OpenRLHF's log-probs, KL estimates and losses, computed by fused_po.

    import fused_po.integrations.openrlhf as fused
    fused.install()          # in each actor's process, before or after openrlhf.models is imported

The loss classes are those of `fused_po.modules`, but as in OpenRLHF an argument that a loss does not use is accepted;
it warns once. docs/integrations.md lists what is replaced and what is not. Written for OpenRLHF 0.11.2.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Optional

from torch import Tensor

from fused_po import checks, losses, modules
from fused_po.integrations.swap import Swap
from fused_po.integrations.unread import accepting, at_defaults
from fused_po.ops.logps import logps_from_logits

FUNCTIONS = ("log_probs_from_logits", "compute_approx_kl")
KL_BOUND = 10.0  # OpenRLHF's bound on estimates and on the ratio to the old policy
_swap = Swap()
Unused = dict[str, tuple[object, str]]  # for `at_defaults`


def _unused_settings(name: str, settings: dict[str, Any]) -> Unused:
    """The constructor's arguments that a loss with these settings does not use."""
    if name == "DPOLoss" and settings["ipo"]:
        return {"label_smoothing": (0.0, "ipo=False")}
    if name == "PolicyLoss":
        corrects = 'policy_loss_type="ppo" and is_correction_level="token" or "seq"'
        if settings["policy_loss_type"] == "gspo" or settings["is_correction_level"] == "off":
            threshold = inspect.signature(modules.PolicyLoss).parameters["is_correction_threshold"].default
            unused = {"is_correction_gating": ("ratio", corrects), "is_correction_mode": ("mask", corrects)}
            return unused | {"is_correction_threshold": (threshold, corrects)}
    return {}


def _unused_in_call(name: str, settings: dict[str, Any], arguments: dict[str, Any]) -> Unused:
    """The forward's arguments that are not used. A loss without the count to divide by uses that of the batch."""
    if name == "LogExpLoss":
        return {"margin": (None, "PairWiseLoss")}
    if name not in ("PolicyLoss", "SFTLoss", "ValueLoss"):
        return {}
    token_level = settings["token_level_loss"] and settings.get("policy_loss_type") != "gspo"
    count, other = ("batch_num_tokens", "global_batch_size")[:: 1 if token_level else -1]
    if arguments.get(count) is not None:
        return {}
    return {other: (None, f"token_level_loss={not token_level}"), "dp_size": (1, count)}


def _accepting_class(name: str) -> type:
    """A subclass of the class in `modules` that accepts the arguments it does not use."""
    ours = getattr(modules, name)
    constructor = inspect.signature(ours) if "__init__" in vars(ours) else inspect.Signature()
    made = accepting(
        name,
        ours,
        constructor,
        convert=lambda arguments: at_defaults(name, arguments, _unused_settings(name, arguments)),
        unused=lambda settings, arguments: _unused_in_call(name, settings, arguments),
        extra_doc="",
    )
    made.__module__ = __name__
    return made


DPOLoss = _accepting_class("DPOLoss")
LogExpLoss = _accepting_class("LogExpLoss")
PolicyLoss = _accepting_class("PolicyLoss")
SFTLoss = _accepting_class("SFTLoss")
ValueLoss = _accepting_class("ValueLoss")
LOSSES: dict[str, Callable] = {
    "DPOLoss": DPOLoss,
    "GPTLMLoss": modules.GPTLMLoss,
    "LogExpLoss": LogExpLoss,
    "PairWiseLoss": modules.PairWiseLoss,
    "PolicyLoss": PolicyLoss,
    "SFTLoss": SFTLoss,
    "ValueLoss": ValueLoss,
}


def install() -> None:
    """Replace OpenRLHF's `log_probs_from_logits`, `compute_approx_kl` and loss classes. A second call does nothing.

    Raises:
        ImportError: OpenRLHF is not installed, or its modules cannot be imported.
        RuntimeError: OpenRLHF does not have one of the names. Nothing is replaced then.
    """
    functions = [("openrlhf.models.utils", name, globals()[name]) for name in FUNCTIONS]
    _swap.replace(functions + [("openrlhf.models.loss", name, loss) for name, loss in LOSSES.items()])


def uninstall() -> None:
    """Restore OpenRLHF's functions and classes."""
    _swap.undo()


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of the labels, fp32. Replaces openrlhf.models.utils.log_probs_from_logits.

    Args:
        logits: [..., V], not modified (OpenRLHF's function scales them in place).
        labels: [...], integers in [0, V), or -100, which gives log-prob 0. temperature: > 0.
    """
    return logps_from_logits(logits, labels, temperature=temperature).logps


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Optional[Tensor] = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """The KL estimate of each token, clamped to [-10, 10]. Replaces openrlhf.models.utils.compute_approx_kl.

    Math: `losses.kl_loss`. docs/derivations.md explains which estimator to use where.

    Args:
        log_probs, log_probs_base: [...], of the policy and of the reference, which gets no gradient.
        log_probs_old: [...], of the policy that sampled; used only with unbiased_gradient.
        kl_estimator: "k1", "k2" or "k3".
        unbiased_gradient: use the estimator's value with the gradient of w k2, where w = pi / pi_old has no gradient
            and is clamped to at most 10.
    """
    checks.choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    checks.same_shape(
        log_probs=log_probs, log_probs_base=log_probs_base, **checks.not_none(log_probs_old=log_probs_old)
    )
    checks.flags(unbiased_gradient=unbiased_gradient)
    logps, base = log_probs.float(), log_probs_base.float().detach()
    if not unbiased_gradient:
        # kl_loss warns for k1, but OpenRLHF also calls this function for k1 in the reward.
        value = logps - base if kl_estimator == "k1" else losses.kl_loss(logps, base, kl_estimator)
        return value.clamp(-KL_BOUND, KL_BOUND)
    value = losses.kl_estimate(logps, base, kl_estimator).clamp(-KL_BOUND, KL_BOUND)
    surrogate = losses.kl_loss(logps, base, "k2")
    if log_probs_old is not None:
        surrogate = surrogate * (logps - log_probs_old.float()).detach().exp().clamp(max=KL_BOUND)
    return value + surrogate - surrogate.detach()
