"""`linear_dpo`: DPO with a per-token KL penalty from hidden states and LM heads."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend import choose as backends
from fused_po.lm_head.kl import linear_kl
from fused_po.lm_head.logps import linear_logps
from fused_po.ops.autograd import public
from fused_po.ops.dpo import DPOOutput, DPOSettings, dpo_output, from_logps, with_exact_kl
from fused_po.ops.dpo_loss import check_loss, check_stacked
from fused_po.parallel.vocab import ProcessGroupLike
from fused_po.schedule import Schedule

_reference_logps = checks.rename_in_errors(hidden="ref_hidden", weight="ref_weight", bias="ref_bias")(linear_logps)


@public
def linear_dpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Optional[Tensor] = None,
    ref_weight: Optional[Tensor] = None,
    ref_logps: Optional[Tensor] = None,
    *,
    bias: Optional[Tensor] = None,
    ref_bias: Optional[Tensor] = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kl: Optional[str] = None,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    ignore_index: int = -100,
    process_group: ProcessGroupLike = None,
    backend: Optional[str] = None,
    schedule: Optional[Schedule] = None,
) -> DPOOutput:
    """The DPO loss from hidden states and LM heads of policy and reference. Logits are computed in tiles.

    With a trainable head, tokens within `Schedule.logits_budget` keep a row of V numbers each for the backward;
    Schedule(logits_budget=0) keeps none, at the cost of one more GEMM. With a frozen head nothing of that size is kept.

    The loss, `beta`, `label_smoothing`, `kl` and `kl_coef`: see `dpo_from_logits`. The projection, `bias`,
    `process_group`, `backend` and `schedule`: see `linear_logps`. The reference may have another hidden size than the
    policy, but must have the same vocabulary.

    Args:
        hidden: [2B, T, H], of the policy, chosen answers first. weight: [V, H]. bias: [V].
        labels: [2B, T], aligned with hidden; ignore_index at prompts and padding, which are not computed.
        ref_hidden: [2B, T, H'], ref_weight: [V, H'], ref_bias: [V]: of the reference, without gradients. Pass these or
        ref_logps: the reference's log-probs of the labels, [2B, T], or their sums [2B] (then kl must be None).

    Returns:
        DPOOutput. A pair without scored tokens has log-probs of 0, a loss of log 2, and no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, by name.
    """
    check_stacked("hidden", hidden, 3)
    labels = checks.integer("labels", labels, hidden.shape[:-1], hidden.device, "[2B, T] of hidden")
    if (ref_hidden is None) == (ref_logps is None) or (ref_hidden is None) != (ref_weight is None):
        raise ValueError(
            "ref_hidden, ref_weight, ref_logps: expected either ref_hidden and ref_weight, or ref_logps; for a loss "
            "without a reference pass ref_logps=torch.zeros(2B)"
        )
    if ref_bias is not None and ref_hidden is None:
        raise ValueError("ref_bias: used only with ref_hidden and ref_weight; leave it out")
    loss = check_loss(beta, label_smoothing, kl, kl_coef, ref_logps, labels, hidden.device)
    how = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index)
    how |= dict(process_group=process_group, backend=backend, schedule=schedule)
    if kl == "full":
        stats = linear_kl(hidden, weight, ref_hidden, ref_weight, labels, bias=bias, ref_bias=ref_bias, **how)
        return with_exact_kl(stats, labels, loss, ignore_index, backend)
    logps = linear_logps(hidden, weight, labels, bias, **how).logps
    if ref_hidden is not None and ref_weight is not None:
        if checks.tensor("ref_weight", ref_weight).shape[:1] != weight.shape[:1]:
            got, expected = tuple(ref_weight.shape), weight.shape[0]
            raise ValueError(f"ref_weight: got shape {got}, expected [{expected}, H'], the vocabulary of the policy")
        with torch.no_grad():
            ref_logps = _reference_logps(ref_hidden, ref_weight, labels, ref_bias, **how).logps
    settings = DPOSettings(loss, ignore_index, backends.resolve(backend, logps.device, logps.dtype))
    return dpo_output(from_logps(logps, labels, ref_logps.detach().to(logps.dtype), settings), labels, kl)
