"""What benchmarks/overhead.py times: every public op beside eager code that gives the same numbers.

The shapes are small, so that the comparison is of the host's costs, not of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import overhead_floor
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_po
from fused_po import losses, modules

N, V, H = 64, 1000, 64
B, T = 4, 8  # pairs; tokens of a sequence: 2 B T = N
IGNORE = -100
LIMITS = {"linear": 2.0, "logits": 1.5}  # as a multiple of eager's time, by kind; other kinds have no limit

Results = tuple[Tensor, tuple[Tensor, ...]]  # (loss, what else is compared)


class Row(NamedTuple):
    """One op or loss: functions that return the same numbers, and the tensors that require grad."""

    name: str
    kind: str
    ours: Callable[[], Results]
    eager: Callable[[], Results]
    leaves: tuple[Tensor, ...]
    floor: Optional[Callable[[], Results]] = None  # our arithmetic without the package: overhead_floor.py


class Data(NamedTuple):
    """The tensors of all rows. 2B sequences of T tokens, the B chosen answers first."""

    hidden: Tensor  # [2B, T, H]
    weight: Tensor  # [V, H]
    logits: Tensor  # [2B, T, V]
    labels: Tensor  # [2B, T], all scored
    some: Tensor  # [2B, T], the first quarter of each sequence is ignored
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_logits: Tensor
    ref_logps: Tensor  # [2B, T]
    old_logps: Tensor
    advantages: Tensor  # [2B]
    rewards: Tensor  # [2B, T]
    values: Tensor
    mask: Tensor  # [2B, T], all True


def data(device: str) -> Data:
    """Random tensors, the same in each run."""
    made = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).to(device)

    hidden, weight = random(2 * B, T, H), random(V, H) / H**0.5
    labels = torch.randint(0, V, (2 * B, T), generator=made).to(device)
    some = labels.clone()
    some[:, : T // 4] = IGNORE
    logits, ref_hidden, ref_weight = random(2 * B, T, V), random(2 * B, T, H), random(V, H) / H**0.5
    old = logps_of(logits, labels) + 0.1 * random(2 * B, T)
    ref = logps_of(logits, labels) + 0.3 * random(2 * B, T)
    trained = (t.requires_grad_() for t in (hidden, weight, logits))
    return Data(*trained, labels, some, ref_hidden, ref_weight, random(2 * B, T, V), ref, old, random(2 * B),
                random(2 * B, T), random(2 * B, T), labels >= 0)  # fmt: skip


# The eager code.


def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of labels, 0 where they are ignored."""
    picked = F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(labels != IGNORE, picked, 0)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy of the softmax, in nats."""
    logp = F.log_softmax(logits, -1)
    return -(logp.exp() * logp).sum(-1)


def dpo_of(logps: Tensor, ref_logps: Tensor, labels: Tensor, kl: Optional[str], coef: float = 0.1) -> Results:
    """DPO with beta 0.1 and a KL penalty: the loss, and the outputs of DPOOutput that an eager trainer logs."""
    sums, ref_sums = logps.sum(-1), ref_logps.sum(-1)
    rewards = 0.1 * (sums - ref_sums)
    chosen, rejected = rewards.chunk(2)
    per_pair = -F.logsigmoid(chosen - rejected)
    loss = per_pair.mean()
    metrics = chosen.detach(), rejected.detach(), (chosen - rejected).detach(), (chosen > rejected).float()
    if kl is None:
        return loss, (per_pair, *metrics)
    k1 = logps - ref_logps
    mask = labels != IGNORE
    k3 = torch.where(mask, torch.expm1(-k1) + k1, 0)
    mean = k3.sum() / mask.sum().clamp(min=1)
    return loss + coef * mean, (per_pair, *metrics, mean.detach(), k3.detach())


def dpo_results(out: fused_po.DPOOutput) -> Results:
    """The same of a DPOOutput."""
    metrics = out.chosen_rewards, out.rejected_rewards, out.margins, out.accuracy
    kl = () if out.kl is None else (out.kl, out.kl_per_token)
    return out.loss, (out.losses, *metrics, *kl)


def kl_of(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The exact reverse KL of each token."""
    p, q = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    return (p.exp() * (p - q)).sum(-1)


def kl_results(stats: fused_po.KLStats) -> Results:
    """The loss of a distillation."""
    return stats.kl.mean(), (stats.kl,)


def full_kl_of(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Results:
    """The exact KL with log-probs and entropy."""
    p, q = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    kl, entropy = (p.exp() * (p - q)).sum(-1), -(p.exp() * p).sum(-1)
    at = labels[..., None]
    logps, ref_logps = p.gather(-1, at).squeeze(-1), q.gather(-1, at).squeeze(-1)
    return kl.mean() - logps.mean(), (kl, logps, ref_logps, entropy)


def full_kl_results(stats: fused_po.KLStats) -> Results:
    """The same of KLStats."""
    return stats.kl.mean() - stats.logps.mean(), (stats.kl, stats.logps, stats.ref_logps, stats.entropy)


def grpo_of(logps: Tensor, old: Tensor, advantages: Tensor, ref: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """(losses of tokens, ratio) of GRPO, with k3 times 0.1 where there is a reference."""
    a, ratio = advantages[:, None], (logps - old).exp()
    per_token = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    if ref is not None:
        apart = ref - logps
        per_token = per_token + 0.1 * (torch.expm1(apart) - apart)
    return per_token, ratio


def policy_of(d: Data, logits: Tensor, ref: Optional[Tensor]) -> Results:
    """What policy_loss_from_logits returns, without the clip marks."""
    logp = F.log_softmax(logits, -1)
    logps = logp.gather(-1, d.labels[..., None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    per_token, ratio = grpo_of(logps, d.old_logps, d.advantages, ref)
    return per_token.mean(), (per_token.detach(), logps.detach(), entropy, ratio.detach())


def policy_results(out: fused_po.PolicyOutput) -> Results:
    """The same of a PolicyOutput."""
    return out.loss, (out.losses, out.logps, out.entropy, out.ratio)


def gae_of(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Results:
    """GAE as a loop over tokens, as trainers write it."""
    after, last, found = 0.0, 0.0, []
    with torch.no_grad():
        for t in reversed(range(rewards.shape[1])):
            delta = rewards[:, t] + gamma * after - values[:, t]
            last = delta + gamma * lam * last
            found.append(last)
            after = values[:, t]
        advantages = torch.stack(found[::-1], 1)
        return advantages.sum(), (advantages, advantages + values)


# The rows.


def scored(stats: fused_po.TokenStats) -> Results:
    """Minus the mean log-prob, and the log-probs."""
    return -stats.logps.mean(), (stats.logps,)


def scored_eagerly(logits: Tensor, labels: Tensor) -> Results:
    """The same."""
    logps = logps_of(logits, labels)
    return -logps.mean(), (logps,)


def with_entropy(stats: fused_po.TokenStats) -> Results:
    """A loss of log-probs and entropy."""
    return -stats.logps.mean() - 0.1 * stats.entropy.mean(), (stats.logps, stats.entropy)


def with_entropy_eagerly(logits: Tensor, labels: Tensor) -> Results:
    """The same, from one log-softmax."""
    logp = F.log_softmax(logits, -1)
    logps, entropy = logp.gather(-1, labels[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
    return -logps.mean() - 0.1 * entropy.mean(), (logps, entropy)


def chunk_loss(stats: fused_po.TokenStats, rows: Tensor) -> Tensor:
    """For chunked_loss."""
    return -stats.logps.sum() / N


def linear_logps_rows(d: Data) -> list[Row]:
    """linear_logps, and what is built on it, from hidden states and the head."""
    both, frozen = (d.hidden, d.weight), d.weight.detach()
    both_outputs = {"outputs": ("logps", "entropy")}
    groups = torch.arange(2 * B, device=d.labels.device)[:, None].expand(2 * B, T)

    def logits(weight: Tensor = d.weight) -> Tensor:
        return F.linear(d.hidden, weight)

    def floor(labels: Tensor, weight: Tensor = d.weight) -> Results:
        values = overhead_floor.linear_logps(d.hidden, weight, labels)
        return values.mean().neg(), (values,)

    def policy(stats: fused_po.TokenStats) -> Results:
        per_token = losses.grpo(stats.logps, d.old_logps, d.advantages, d.mask)
        return per_token.mean(), (per_token, stats.logps)

    def policy_eagerly() -> Results:
        logps = logps_of(logits(), d.labels)
        per_token, _ = grpo_of(logps, d.old_logps, d.advantages)
        return per_token.mean(), (per_token, logps)

    def logps(**how) -> fused_po.TokenStats:
        return fused_po.linear_logps(d.hidden, how.pop("weight", d.weight), how.pop("labels", d.labels), **how)

    return [
        Row("linear_logps", "linear", lambda: scored(logps()), lambda: scored_eagerly(logits(), d.labels), both,
            lambda: floor(d.labels)),
        Row("linear_logps, a quarter ignored", "linear", lambda: scored(logps(labels=d.some)),
            lambda: scored_eagerly(logits(), d.some), both, lambda: floor(d.some)),
        Row("linear_logps, head frozen", "linear", lambda: scored(logps(weight=frozen)),
            lambda: scored_eagerly(logits(frozen), d.labels), (d.hidden,), lambda: floor(d.labels, frozen)),
        Row("linear_logps, entropy", "linear", lambda: with_entropy(logps(**both_outputs)),
            lambda: with_entropy_eagerly(logits(), d.labels), both),
        Row("linear_logps, losses.grpo", "linear", lambda: policy(logps()), policy_eagerly, both),
        Row("chunked_loss", "linear", lambda: (fused_po.chunked_loss(chunk_loss, *both, d.labels, groups), ()),
            lambda: (-logps_of(logits(), d.labels).sum() / N, ()), both),
    ]  # fmt: skip


def linear_reference_rows(d: Data) -> list[Row]:
    """The ops over hidden states and heads of policy and reference."""
    both = d.hidden, d.weight
    reference = {"ref_hidden": d.ref_hidden, "ref_weight": d.ref_weight}
    penalty = {"kl": "k3", "kl_coef": 0.1}

    def logits() -> Tensor:
        return F.linear(d.hidden, d.weight)

    def ref_logits() -> Tensor:
        with torch.no_grad():
            return F.linear(d.ref_hidden, d.ref_weight)

    def ref_logps() -> Tensor:
        with torch.no_grad():
            return logps_of(F.linear(d.ref_hidden, d.ref_weight), d.labels)

    def dpo(**how) -> Results:
        return dpo_results(fused_po.linear_dpo(d.hidden, d.weight, d.labels, **how))

    def kl(*labels: Tensor) -> fused_po.KLStats:
        return fused_po.linear_kl(d.hidden, d.weight, d.ref_hidden, d.ref_weight, *labels)

    return [
        Row("linear_dpo, ref_logps", "linear", lambda: dpo(ref_logps=d.ref_logps),
            lambda: dpo_of(logps_of(logits(), d.labels), d.ref_logps, d.labels, None), both),
        Row("linear_dpo, ref_hidden, k3", "linear", lambda: dpo(**reference, **penalty),
            lambda: dpo_of(logps_of(logits(), d.labels), ref_logps(), d.labels, "k3"), both),
        Row("linear_kl", "linear", lambda: kl_results(kl()),
            lambda: (lambda v: (v.mean(), (v,)))(kl_of(logits(), ref_logits())), both),
        Row("linear_kl, labels", "linear", lambda: full_kl_results(kl(d.labels)),
            lambda: full_kl_of(logits(), ref_logits(), d.labels), both),
    ]  # fmt: skip


def logits_rows(d: Data) -> list[Row]:
    """From logits."""
    leaf = (d.logits,)
    both_outputs = {"outputs": ("logps", "entropy")}

    def floor(labels: Tensor) -> Results:
        values = overhead_floor.logps_from_logits(d.logits, labels)
        return values.mean().neg(), (values,)

    def dpo(**how) -> Results:
        return dpo_results(fused_po.dpo_from_logits(d.logits, d.labels, **how))

    def dpo_eagerly(kl: Optional[str]) -> Results:
        with torch.no_grad():
            ref = logps_of(d.ref_logits, d.labels)
        return dpo_of(logps_of(d.logits, d.labels), ref, d.labels, kl)

    def policy(logits: Tensor, **how) -> Results:
        out = fused_po.policy_loss_from_logits(
            logits, d.labels, d.advantages, d.old_logps, loss_type="dapo", epsilon=0.2, epsilon_high=0.2, **how
        )
        return policy_results(out)

    def copied() -> Tensor:
        return d.logits * 1.0  # as from a model: not a leaf, so that the gradient may overwrite them

    penalty = {"ref_logps": d.ref_logps, "kl": "k3", "kl_coef": 0.1, "use_bias_correction_kl": False}
    return [
        Row("logps_from_logits", "logits", lambda: scored(fused_po.logps_from_logits(d.logits, d.labels)),
            lambda: scored_eagerly(d.logits, d.labels), leaf, lambda: floor(d.labels)),
        Row("logps_from_logits, a quarter ignored", "logits",
            lambda: scored(fused_po.logps_from_logits(d.logits, d.some)),
            lambda: scored_eagerly(d.logits, d.some), leaf, lambda: floor(d.some)),
        Row("logps_from_logits, entropy", "logits",
            lambda: with_entropy(fused_po.logps_from_logits(d.logits, d.labels, **both_outputs)),
            lambda: with_entropy_eagerly(d.logits, d.labels), leaf),
        Row("dpo_from_logits, ref_logps", "logits", lambda: dpo(ref_logps=d.ref_logps),
            lambda: dpo_of(logps_of(d.logits, d.labels), d.ref_logps, d.labels, None), leaf),
        Row("dpo_from_logits, ref_logits, k3", "logits", lambda: dpo(ref_logits=d.ref_logits, kl="k3", kl_coef=0.1),
            lambda: dpo_eagerly("k3"), leaf),
        Row("kl_from_logits", "logits", lambda: kl_results(fused_po.kl_from_logits(d.logits, d.ref_logits)),
            lambda: (lambda v: (v.mean(), (v,)))(kl_of(d.logits, d.ref_logits)), leaf),
        Row("kl_from_logits, labels", "logits",
            lambda: full_kl_results(fused_po.kl_from_logits(d.logits, d.ref_logits, d.labels)),
            lambda: full_kl_of(d.logits, d.ref_logits, d.labels), leaf),
        Row("policy_loss_from_logits", "logits", lambda: policy(d.logits), lambda: policy_of(d, d.logits, None), leaf),
        Row("policy_loss_from_logits, k3", "logits", lambda: policy(d.logits, **penalty),
            lambda: policy_of(d, d.logits, d.ref_logps), leaf),
        Row("policy_loss_from_logits, in place", "logits", lambda: policy(copied(), inplace_backward=True),
            lambda: policy_of(d, copied(), None), leaf),
    ]  # fmt: skip


def token_rows(d: Data) -> list[Row]:
    """The ops without a vocabulary."""
    x = d.ref_logps.clone().requires_grad_()
    mask = d.some != IGNORE

    def aggregated() -> Results:
        return fused_po.aggregate(x, mask, "token-mean"), ()

    def shifted_eagerly() -> Results:
        last = d.labels.new_full((2 * B, 1), IGNORE)
        return x.new_zeros(()), (torch.cat((d.labels[:, 1:], last), 1),)

    def weights_eagerly() -> Results:
        return x.new_zeros(()), (mask / mask.sum().clamp(min=1),)

    return [
        Row("gae", "tokens", lambda: (lambda v: (v[0].sum(), v))(fused_po.gae(d.rewards, d.values)),
            lambda: gae_of(d.rewards, d.values), ()),
        Row("sequence_logps", "tokens", lambda: (fused_po.sequence_logps(x, mask).sum(), ()),
            lambda: ((x * mask).sum(-1).sum(), ()), (x,)),
        Row("aggregate", "tokens", aggregated,
            lambda: ((x * mask).sum() / mask.sum().clamp(min=1), ()), (x,)),
        Row("token_weights", "tokens", lambda: (x.new_zeros(()), (fused_po.token_weights(mask, "token-mean"),)),
            weights_eagerly, ()),
        Row("shift_labels", "tokens", lambda: (x.new_zeros(()), (fused_po.shift_labels(d.labels),)),
            shifted_eagerly, ()),
    ]  # fmt: skip


def loss_rows(d: Data) -> list[Row]:
    """Losses of log-probs, and modules."""
    x = d.ref_logps.clone().requires_grad_()
    pairs = (d.ref_logps.sum(1).clone().requires_grad_(), d.old_logps.sum(1))
    chosen, rejected = pairs[0].chunk(2)
    ref_chosen, ref_rejected = pairs[1].chunk(2)
    leaf = (pairs[0],)

    def dpo_eagerly() -> Results:
        return -F.logsigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean(), ()

    def kl_eagerly() -> Results:
        apart = d.old_logps - x
        return (torch.expm1(apart) - apart).mean(), ()

    module = modules.DPOLoss(beta=0.1)
    return [
        Row("losses.dpo", "losses",
            lambda: (losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1).mean(), ()), dpo_eagerly, leaf),
        Row("losses.ppo_clip", "losses",
            lambda: (losses.ppo_clip(x, d.old_logps, d.advantages, d.mask).mean(), ()),
            lambda: (grpo_of(x, d.old_logps, d.advantages)[0].mean(), ()), (x,)),
        Row("losses.grpo", "losses", lambda: (losses.grpo(x, d.old_logps, d.advantages, d.mask).mean(), ()),
            lambda: (grpo_of(x, d.old_logps, d.advantages)[0].mean(), ()), (x,)),
        Row("losses.kl_loss", "losses", lambda: (losses.kl_loss(x, d.old_logps, "k3").mean(), ()), kl_eagerly, (x,)),
        Row("modules.DPOLoss", "losses", lambda: (module(chosen, rejected, ref_chosen, ref_rejected)[0], ()),
            dpo_eagerly, leaf),
    ]  # fmt: skip


def rows(device: str) -> list[Row]:
    """All of them."""
    d = data(device)
    return [*linear_logps_rows(d), *linear_reference_rows(d), *logits_rows(d), *token_rows(d), *loss_rows(d)]
