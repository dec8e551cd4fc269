"""Every public name, used as README uses it. `make lint` checks the types; test_typing.py runs it too."""

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import assert_type

import fused_po
from fused_po import losses, modules

B, T, V, H = 2, 5, 7, 4


def log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The default output is a Tensor. So is the entropy if it is asked for."""
    stats = fused_po.linear_logps(hidden, weight, labels, schedule=fused_po.Schedule(logits_budget=0))
    sums = assert_type(fused_po.sequence_logps(stats.logps), Tensor)
    assert_type(stats.entropy, Optional[Tensor])
    logits = hidden @ weight.T
    sums = sums + fused_po.sequence_logps(fused_po.logps_from_logits(logits, labels, temperature=0.7).logps)
    both = fused_po.linear_logps(hidden, weight, labels, softcap=30.0, outputs=("logps", "entropy", "lse"))
    assert_type(both.logps, Tensor)
    assert_type(both.entropy, Tensor)
    assert_type(both.lse, Optional[Tensor])
    both = fused_po.logps_from_logits(logits, labels, outputs=("logps", "entropy"))
    assert_type(both.entropy, Tensor)
    ranked = fused_po.logps_from_logits(logits, labels, outputs=("logps", "is_top1"))
    assert_type(ranked.logps, Tensor)
    assert_type(ranked.is_top1, Optional[Tensor])
    return sums


def chosen_by_name(logits: Tensor, labels: Tensor, outputs: tuple[str, ...]) -> fused_po.TokenStats:
    """Names that only the run knows: every field may be None."""
    stats = fused_po.logps_from_logits(logits, labels, outputs=outputs)
    assert_type(stats.logps, Optional[Tensor])
    logps, *_ = stats
    assert_type(logps, Optional[Tensor])
    return assert_type(stats._replace(entropy=None), fused_po.TokenStats)


def preference(hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor) -> Tensor:
    logps = fused_po.linear_logps(hidden, weight, labels).logps
    with torch.no_grad():
        ref_logps = fused_po.linear_logps(ref_hidden, weight, labels).logps
    sums, ref_sums = fused_po.sequence_logps(logps), fused_po.sequence_logps(ref_logps)
    loss = losses.dpo(*sums.chunk(2), *ref_sums.chunk(2), beta=0.1).mean()
    loss = loss + losses.preference_loss(*sums.chunk(2), *ref_sums.chunk(2), loss_type="hinge").mean()
    loss = loss + losses.simpo(*fused_po.sequence_logps(logps, average=True).chunk(2)).mean()
    settings = assert_type(modules.DPOLoss(beta=0.1), modules.DPOLoss)
    loss = loss + settings.forward(*sums.chunk(2), *ref_sums.chunk(2))[0]
    liger = modules.FusedLinearDPOLoss(beta=0.1).forward(weight, hidden, labels, None, ref_hidden, weight)
    loss = loss + liger[0]
    out = fused_po.linear_dpo(
        hidden, weight, labels, ref_hidden, weight, beta=0.1, kl="k3", kl_coef=0.01, logit_scale=1.0, softcap=None
    )
    assert_type(out, fused_po.DPOOutput)
    assert_type(out.margins, Tensor)
    assert_type(out.kl, Optional[Tensor])
    logits = (hidden @ weight.T).requires_grad_()
    return loss + out.loss + fused_po.dpo_from_logits(logits, labels, ref_logps=ref_logps).loss


def divergence(hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor) -> Tensor:
    stats = fused_po.linear_kl(hidden, weight, ref_hidden, weight, labels)
    assert_type(stats, fused_po.KLStats)
    assert_type(stats.logps, Optional[Tensor])
    stats = fused_po.kl_from_logits(hidden @ weight.T, ref_hidden @ weight.T, direction="forward")
    return assert_type(stats.kl, Tensor).sum()


def policy(logits: Tensor, labels: Tensor, rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    advantages, returns = fused_po.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    old_logps = fused_po.logps_from_logits(logits.detach(), labels).logps
    weights = assert_type(fused_po.token_weights(mask, "token-mean", num_tokens=B * T), Tensor)
    out = fused_po.policy_loss_from_logits(
        logits, labels, advantages, old_logps, mask=mask, loss_type="ppo", weights=weights, epsilon=0.2
    )
    assert_type(out, fused_po.PolicyOutput)
    assert_type(out.ratio, Optional[Tensor])
    stats = fused_po.logps_from_logits(logits, labels, outputs=("logps", "entropy"))
    loss = losses.ppo_clip(stats.logps, old_logps, advantages, mask) - losses.entropy_bonus(
        stats.entropy, mask, coef=0.01
    )
    loss = loss + losses.value_loss(values, values, returns, mask)
    return out.loss + assert_type(fused_po.aggregate(loss, mask, "token-mean"), Tensor)


def in_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
    def share(stats: fused_po.TokenStats, rows: Tensor) -> Tensor:
        assert stats.logps is not None
        sums = torch.zeros(2 * B).index_add(0, rows // T, stats.logps)
        pairs = (rows // T % B).unique()
        return losses.dpo(sums[pairs], sums[pairs + B], ref[pairs], ref[pairs + B], beta=0.1).sum() / B

    groups = torch.arange(B).repeat(2)[:, None].expand(2 * B, T)
    return assert_type(fused_po.chunked_loss(share, hidden, weight, labels, groups), Tensor)


def cut_over_ranks(group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    shards = fused_po.VocabParallel(group, sizes=(4, 3), sequence_dim=None)
    whole = fused_po.linear_logps(hidden, weight, labels, process_group=group).logps
    return whole + fused_po.linear_logps(hidden, weight, labels, process_group=shards).logps


def main() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2 * B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    ref_hidden, mask = torch.randn(2 * B, T, H), torch.ones(2 * B, T)
    labels = fused_po.shift_labels(torch.arange(2 * B * T).view(2 * B, T) % V)
    scored = mask * (labels != -100)
    loss = log_probs(hidden, weight, labels).sum() + preference(hidden, weight, labels, ref_hidden)
    loss = loss + divergence(hidden, weight, labels, ref_hidden) + in_chunks(hidden, weight, labels, torch.zeros(2 * B))
    logits, values = hidden @ weight.T, torch.zeros(2 * B, T)
    loss = loss + policy(logits, labels, torch.randn(2 * B, T), values, scored)
    loss.backward()
    assert chosen_by_name(logits, labels, ("lse",)).logps is None
    assert "reference" in assert_type(fused_po.backends("cpu"), dict[str, str])


if __name__ == "__main__":
    main()
