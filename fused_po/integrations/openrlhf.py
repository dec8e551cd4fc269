"""OpenRLHF's log-probs, KL estimates and losses by fused_po.

    import fused_po.integrations.openrlhf as fused
    fused.install()          # in each actor's process, before or after openrlhf.models is imported

The loss classes are those of `fused_po.modules`. What is served, and what stays OpenRLHF's: docs/integrations.md.
Written for OpenRLHF 0.11.2.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from fused_po import checks, losses, modules
from fused_po.integrations.swap import Swap
from fused_po.ops.logps import logps_from_logits

FUNCTIONS = ("log_probs_from_logits", "compute_approx_kl")
LOSSES = ("DPOLoss", "GPTLMLoss", "LogExpLoss", "PairWiseLoss", "PolicyLoss", "SFTLoss", "ValueLoss")
KL_BOUND = 10.0  # OpenRLHF's, of estimates and of the ratio to the old policy
_swap = Swap()


def install() -> None:
    """Put `log_probs_from_logits`, `compute_approx_kl` and the loss classes in OpenRLHF's places. Again: nothing.

    Raises:
        ImportError: OpenRLHF is not installed, or its modules cannot be imported here.
        RuntimeError: it lacks a name that is replaced. Nothing is changed then.
    """
    functions = [("openrlhf.models.utils", name, globals()[name]) for name in FUNCTIONS]
    _swap.replace(functions + [("openrlhf.models.loss", name, getattr(modules, name)) for name in LOSSES])


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
    checks.alike(log_probs=log_probs, log_probs_base=log_probs_base, **checks.given(log_probs_old=log_probs_old))
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
