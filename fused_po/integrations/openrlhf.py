"""OpenRLHF's log-probs, KL estimates and losses by fused_po.

    import fused_po.integrations.openrlhf as fused
    fused.install()          # in each actor's process, before or after openrlhf.models is imported

The loss classes are those of `fused_po.modules`, but as in OpenRLHF an argument that a loss does not read is accepted:
it warns once. What is served, and what stays OpenRLHF's: docs/integrations.md. Written for OpenRLHF 0.11.2.
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
KL_BOUND = 10.0  # OpenRLHF's, of estimates and of the ratio to the old policy
_swap = Swap()
Unread = dict[str, tuple[object, str]]  # for `at_defaults`


def _unread_settings(name: str, given: dict[str, Any]) -> Unread:
    """What this loss, so constructed, does not read."""
    if name == "DPOLoss" and given["ipo"]:
        return {"label_smoothing": (0.0, "ipo=False")}
    if name == "PolicyLoss":
        corrects = 'policy_loss_type="ppo" with is_correction_level="token" or "seq"'
        if given["policy_loss_type"] == "gspo" or given["is_correction_level"] == "off":
            threshold = inspect.signature(modules.PolicyLoss).parameters["is_correction_threshold"].default
            unread = {"is_correction_gating": ("ratio", corrects), "is_correction_mode": ("mask", corrects)}
            return unread | {"is_correction_threshold": (threshold, corrects)}
    return {}


def _unread_in_call(name: str, settings: dict[str, Any], given: dict[str, Any]) -> Unread:
    """What it does not read in this call. Without the count that it divides by, it takes the batch's own."""
    if name == "LogExpLoss":
        return {"margin": (None, "PairWiseLoss")}
    if name not in ("PolicyLoss", "SFTLoss", "ValueLoss"):
        return {}
    of_tokens = settings["token_level_loss"] and settings.get("policy_loss_type") != "gspo"
    read, other = ("batch_num_tokens", "global_batch_size")[:: 1 if of_tokens else -1]
    if given.get(read) is not None:
        return {}
    level = f"token_level_loss={not of_tokens}"
    return {other: (None, level), "dp_size": (1, f"a loss that is given {read}")}


def _with_all_arguments(name: str) -> type:
    """The class of `modules`, which refuses what it does not read, made to accept it."""
    ours = getattr(modules, name)
    constructor = inspect.signature(ours) if "__init__" in vars(ours) else inspect.Signature()
    made = accepting(
        name, ours, constructor,
        settle=lambda given: at_defaults(name, given, _unread_settings(name, given)),
        unread=lambda settings, given: _unread_in_call(name, settings, given), more="",
    )  # fmt: skip
    made.__module__ = __name__
    return made


DPOLoss = _with_all_arguments("DPOLoss")
LogExpLoss = _with_all_arguments("LogExpLoss")
PolicyLoss = _with_all_arguments("PolicyLoss")
SFTLoss = _with_all_arguments("SFTLoss")
ValueLoss = _with_all_arguments("ValueLoss")
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
    """Put `log_probs_from_logits`, `compute_approx_kl` and the loss classes in OpenRLHF's places. Again: nothing.

    Raises:
        ImportError: OpenRLHF is not installed, or its modules cannot be imported here.
        RuntimeError: it lacks a name that is replaced. Nothing is changed then.
    """
    functions = [("openrlhf.models.utils", name, globals()[name]) for name in FUNCTIONS]
    _swap.replace(functions + [("openrlhf.models.loss", name, loss) for name, loss in LOSSES.items()])


def uninstall() -> None:
    """Give OpenRLHF back what it had."""
    _swap.undo()


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of the labels, fp32. openrlhf.models.utils.log_probs_from_logits, which writes the scaled logits back.

    Args:
        logits: [..., V], not changed. labels: [...], integers in [0, V), or -100: log-prob 0. temperature: > 0.
    """
    return logps_from_logits(logits, labels, temperature=temperature).logps


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Optional[Tensor] = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """Each token's estimate of the KL to the base, within +-10. openrlhf.models.utils.compute_approx_kl.

    Math: `losses.kl_loss`; which estimator belongs where: docs/derivations.md.

    Args:
        log_probs, log_probs_base: [...], of the policy and of the reference, which gets no gradient here.
        log_probs_old: [...], those of the policy that sampled; read with unbiased_gradient alone.
        kl_estimator: "k1", "k2" or "k3".
        unbiased_gradient: the estimator's value with the gradient of w k2, w = pi / pi_old held constant and <= 10.
    """
    checks.choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    checks.same_shape(
        log_probs=log_probs, log_probs_base=log_probs_base, **checks.not_none(log_probs_old=log_probs_old)
    )
    checks.flags(unbiased_gradient=unbiased_gradient)
    logps, base = log_probs.float(), log_probs_base.float().detach()
    if not unbiased_gradient:
        # k1 not by kl_loss, which warns: OpenRLHF puts it into the reward, by this function too
        value = logps - base if kl_estimator == "k1" else losses.kl_loss(logps, base, kl_estimator)
        return value.clamp(-KL_BOUND, KL_BOUND)
    value = losses.kl_estimate(logps, base, kl_estimator).clamp(-KL_BOUND, KL_BOUND)
    surrogate = losses.kl_loss(logps, base, "k2")
    if log_probs_old is not None:
        surrogate = surrogate * (logps - log_probs_old.float()).detach().exp().clamp(max=KL_BOUND)
    return value + surrogate - surrogate.detach()
