"""Calls that a type checker must refuse. Each comment names the error; if it does not come, that is an error too."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from torch import Tensor

import fused_po
from fused_po import losses


def refused(hidden: Tensor, weight: Tensor, labels: Tensor, names: tuple[str, ...]) -> None:
    sums = fused_po.sequence_logps
    sums(fused_po.linear_logps(hidden, weight, labels, outputs=("entropy",)).logps)  # type: ignore[arg-type]
    sums(fused_po.linear_logps(hidden, weight, labels, outputs=names).logps)  # type: ignore[arg-type]
    sums(fused_po.linear_logps(hidden, weight, labels).entropy)  # type: ignore[arg-type]
    sums(fused_po.logps_from_logits(hidden, labels, outputs=("lse", "logps")).lse)  # type: ignore[arg-type]
    sums(fused_po.linear_logps(hidden, weight, labels))  # type: ignore[arg-type]
    fused_po.linear_logps(hidden, weight)  # type: ignore[call-overload]
    fused_po.linear_logps(hidden, weight, labels, temprature=0.7)  # type: ignore[call-overload]
    fused_po.linear_logps(hidden, weight, labels, outputs="logps")  # type: ignore[call-overload]
    fused_po.logps_from_logits(hidden, labels, schedule=fused_po.Schedule())  # type: ignore[call-overload]
    sums(fused_po.linear_logps(hidden, weight, labels).perplexity)  # type: ignore[attr-defined]
    fused_po.linear_dpo(hidden, weight, labels, beta="0.1")  # type: ignore[arg-type]
    fused_po.linear_dpo(hidden, weight, labels).kl.sum()  # type: ignore[union-attr]
    fused_po.dpo_from_logits(hidden, labels, reference=hidden)  # type: ignore[call-arg]
    fused_po.policy_loss_from_logits(hidden, labels, None)  # type: ignore[call-arg]
    sums(fused_po.gae(hidden, hidden).returns)  # type: ignore[attr-defined]
    fused_po.kl_from_logits(hidden, None)  # type: ignore[arg-type]
    fused_po.chunked_loss(lambda stats: stats.logps, hidden, weight, labels, labels)  # type: ignore[misc,arg-type]
    fused_po.Schedule(logits_budget="1 GiB")  # type: ignore[arg-type]
    fused_po.aggregate(hidden, "token-mean")  # type: ignore[arg-type]
    losses.dpo(hidden, hidden, beta=0.1, label_smooth=0.1)  # type: ignore[call-arg]
    fused_po.linear_logp(hidden, weight, labels)  # type: ignore[attr-defined]
