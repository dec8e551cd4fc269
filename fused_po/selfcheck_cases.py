"""The checks of `python -m fused_po selfcheck`: random inputs, and every op with the same math in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor

import fused_po

IGNORE = -100
PAIRS, JS_WEIGHT, SOFTCAP, TEMPERATURE, RANK, KL_COEF = 32, 0.3, 20.0, 0.8, 4, 0.1
STATS = ("logps", "entropy", "lse")
HEAD = ("hidden", "weight")
Values = dict[str, Tensor]


class Size(NamedTuple):
    """tokens: a multiple of 2 * PAIRS, with the ignored ones; vocab: the vocabulary; hidden: the hidden size."""

    tokens: int
    vocab: int
    hidden: int


class Check(NamedTuple):
    """One op in one form. `ours` and `plain` map the inputs to results; gradients are taken for the inputs `leaves`."""

    name: str
    leaves: tuple[str, ...]
    ours: Callable[[Values], Values]
    plain: Callable[[Values], Values]


def problem(size: Size, dtype: torch.dtype, device: str, seed: int) -> Values:
    """Random inputs. Label probabilities range from about 1e-6 to almost 1; a third of the rows is ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    n, v, h = size
    weight, hidden = normal(v, h) / h**0.5, normal(n, h)
    labels = torch.randint(v, (n,), generator=generator)
    hidden += 9 * torch.rand(n, 1, generator=generator, dtype=torch.float32) * weight[labels]
    ref_weight = weight + 0.1 * normal(v, h) / h**0.5
    tensors = {"hidden": hidden, "weight": weight, "ref_hidden": hidden + 0.3 * normal(n, h), "ref_weight": ref_weight}
    tensors["logits"], tensors["ref_logits"] = hidden @ weight.T, tensors["ref_hidden"] @ ref_weight.T
    tensors["u"], tensors["low"] = normal(n, RANK), normal(v, RANK) / RANK
    forbidden = torch.rand(v, generator=generator, dtype=torch.float32) < 0.02
    forbidden[labels] = False
    for name in ("logits", "ref_logits"):
        tensors[name][:, forbidden] = -torch.inf
    labels[torch.rand(n, generator=generator, dtype=torch.float32) < 1 / 3] = IGNORE
    cast = {name: value.to(device, dtype) for name, value in tensors.items()}
    steps = {"rewards": normal(8, n), "values": normal(8, n)}
    return cast | {name: value.to(device) for name, value in steps.items()} | {"labels": labels.to(device)}


# Plain PyTorch. In float64 it gives the exact results.


def wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def plain_scores(t: Values, side: str = "") -> Tensor:
    return wide(t[f"{side}hidden"] @ t[f"{side}weight"].T)


def plain_logps(z: Tensor, labels: Tensor) -> Tensor:
    logps = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(labels != IGNORE, logps, 0)


def plain_stats(z: Tensor, labels: Tensor) -> Values:
    logp, counts = z.log_softmax(-1), labels != IGNORE
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    stats = {"logps": plain_logps(z, labels), "entropy": entropy, "lse": z.logsumexp(-1)}
    return {name: torch.where(counts, value, 0) for name, value in stats.items()}


def plain_kl(z: Tensor, ref_z: Tensor, labels: Tensor, direction: str) -> Values:
    log_p, log_q = z.log_softmax(-1), ref_z.detach().log_softmax(-1)
    p, q, w = log_p.exp(), log_q.exp(), JS_WEIGHT

    def mean(weights: Tensor, log_ratio: Tensor) -> Tensor:
        return (weights * log_ratio.masked_fill(weights.detach() == 0, 0)).sum(-1)

    if direction == "js":
        mixed = w * q + (1 - w) * p
        log_m = mixed.masked_fill(mixed == 0, 1).log()  # where both are 0 the gradient must be 0, not 0 / 0
        value = w * mean(q, log_q - log_m) + (1 - w) * mean(p, log_p - log_m)
    else:
        value = mean(p, log_p - log_q) if direction == "reverse" else mean(q, log_q - log_p)
    return {"kl": torch.where(labels != IGNORE, value, 0)}


def plain_dpo(z: Tensor, ref_z: Tensor, labels: Tensor, beta: float = 0.1) -> Values:
    ratios = (plain_logps(z, labels) - plain_logps(ref_z.detach(), labels)).view(2 * PAIRS, -1).sum(-1)
    return {"losses": -torch.nn.functional.logsigmoid(beta * (ratios[:PAIRS] - ratios[PAIRS:]))}


def plain_dpo_with_kl(z: Tensor, ref_z: Tensor, labels: Tensor) -> Values:
    ratios = plain_logps(z, labels) - plain_logps(ref_z.detach(), labels)
    k3 = torch.where(labels != IGNORE, torch.exp(-ratios) - 1 + ratios, 0).sum() / (labels != IGNORE).sum()
    return {"loss": plain_dpo(z, ref_z, labels)["losses"].mean() + KL_COEF * k3}


def weighted_sum(logps: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """A loss that is a sum over tokens, each weighted by its number in the batch."""
    return (logps * (rows + 1) / n_rows).sum()


def plain_policy(z: Tensor, old_z: Tensor, labels: Tensor) -> Values:
    """SAPO's token losses with an entropy bonus. SAPO is the one policy loss without a kink."""
    now, old = plain_stats(z, labels), plain_logps(old_z.detach(), labels)
    a = torch.linspace(-1, 1, 2 * PAIRS, dtype=z.dtype, device=z.device).repeat_interleave(len(labels) // (2 * PAIRS))
    tau = torch.where(a > 0, 1.0, torch.full_like(a, 1.05))
    losses = -4 / tau * a * torch.sigmoid(tau * ((now["logps"] - old).exp() - 1)) - 0.1 * now["entropy"]
    losses = torch.where(labels != IGNORE, losses, 0)
    return {"losses": with_gradient_of(losses, losses.sum() / len(labels))}


def with_gradient_of(losses: Tensor, loss: Tensor) -> Tensor:
    """Token losses with the gradient of `loss`, their mean. The error of that one number alone would depend on luck."""
    return losses.detach().flatten() + (loss - loss.detach())


def plain_gae(t: Values, gamma: float = 0.99, lam: float = 0.95) -> Values:
    rewards, values = t["rewards"], t["values"]
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta, advantages, last = rewards + gamma * after - values, [], torch.zeros_like(values[:, 0])
    for step in reversed(range(delta.shape[1])):
        last = delta[:, step] + gamma * lam * last
        advantages.append(last)
    return {"advantages": torch.stack(advantages[::-1], 1)}


# The ops, each with its plain version.


def checks(backend: Optional[str]) -> Iterator[Check]:
    """The checks of all ops, with one check for each way an op computes."""
    for name, options in (("", {}), (", softcap", {"softcap": SOFTCAP}), (", in place", {"inplace_backward": True})):
        yield logps_from_logits_check(name, backend, **options)
    yield linear_logps_check("", backend, HEAD, STATS, fused_po.Schedule())
    yield linear_logps_check(", none kept", backend, HEAD, STATS, fused_po.Schedule(logits_budget=0))
    yield linear_logps_check(", head frozen", backend, ("hidden",), ("logps",), fused_po.Schedule())
    yield low_rank_check(backend)
    yield chunked_check(backend)
    for direction in ("reverse", "forward", "js"):
        yield from kl_checks(direction, backend)
    yield dpo_from_logits_check(backend)
    yield dpo_with_kl_check(backend)
    yield linear_dpo_check(backend)
    yield policy_check("", backend, inplace=False)
    yield policy_check(", in place", backend, inplace=True)
    yield gae_check(backend)


def select(stats: fused_po.TokenStats, names: tuple[str, ...]) -> Values:
    return {name: getattr(stats, name) for name in names}


def as_pairs(value: Tensor) -> Tensor:
    """[N, ...] as [2 * PAIRS, tokens per sequence, ...]."""
    return value.view(2 * PAIRS, -1, *value.shape[1:])


def logps_from_logits_check(name: str, backend: Optional[str], softcap: Optional[float] = None, **options) -> Check:
    def ours(t: Values) -> Values:
        scaling = {"temperature": TEMPERATURE, "softcap": softcap}
        logits, labels = t["logits"] + 0, t["labels"]
        stats = fused_po.logps_from_logits(logits, labels, outputs=STATS, backend=backend, **scaling, **options)
        return select(stats, STATS)

    def plain(t: Values) -> Values:
        z = wide(t["logits"])
        capped = z if softcap is None else softcap * torch.tanh(z / softcap)
        return plain_stats(capped / TEMPERATURE, t["labels"])

    return Check(f"logps_from_logits{name}", ("logits",), ours, plain)


def linear_logps_check(
    name: str, backend: Optional[str], leaves: tuple[str, ...], outputs: tuple[str, ...], schedule: fused_po.Schedule
) -> Check:
    def ours(t: Values) -> Values:
        options = {"outputs": outputs, "schedule": schedule, "backend": backend}
        return select(fused_po.linear_logps(t["hidden"], t["weight"], t["labels"], **options), outputs)

    def plain(t: Values) -> Values:
        stats = plain_stats(plain_scores(t), t["labels"])
        return {output: stats[output] for output in outputs}

    return Check(f"linear_logps{name}", leaves, ours, plain)


def low_rank_check(backend: Optional[str]) -> Check:
    def ours(t: Values) -> Values:
        low_rank = (t["u"], t["low"])
        stats = fused_po.linear_logps(t["hidden"], t["weight"], t["labels"], low_rank=low_rank, backend=backend)
        return {"logps": stats.logps}

    def plain(t: Values) -> Values:
        return {"logps": plain_logps(wide(t["hidden"] @ t["weight"].T + t["u"] @ t["low"].T), t["labels"])}

    return Check("linear_logps, low rank", ("hidden", "u", "low"), ours, plain)


def chunked_check(backend: Optional[str]) -> Check:
    def ours(t: Values) -> Values:
        n_rows = len(t["labels"])
        rows = torch.arange(n_rows, device=t["labels"].device)
        budget = n_rows // 8 * 4 * len(t["weight"])  # for chunks of an eighth of the rows
        schedule = fused_po.Schedule(logits_budget=budget)
        arguments = t["hidden"], t["weight"], t["labels"], rows // 4
        loss = fused_po.chunked_loss(
            lambda stats, rows: weighted_sum(stats.logps, rows, n_rows), *arguments, schedule=schedule, backend=backend
        )
        return {"loss": loss}

    def plain(t: Values) -> Values:
        rows = torch.arange(len(t["labels"]), device=t["labels"].device)
        return {"loss": weighted_sum(plain_logps(plain_scores(t), t["labels"]), rows, len(rows))}

    return Check("chunked_loss", HEAD, ours, plain)


def kl_checks(direction: str, backend: Optional[str]) -> Iterator[Check]:
    """kl_from_logits and linear_kl in this direction."""
    options = {"direction": direction, "backend": backend}
    if direction == "js":
        options["js_weight"] = JS_WEIGHT

    def from_logits(t: Values) -> Values:
        return {"kl": fused_po.kl_from_logits(t["logits"], t["ref_logits"], t["labels"], **options).kl}

    def plain_from_logits(t: Values) -> Values:
        return plain_kl(wide(t["logits"]), wide(t["ref_logits"]), t["labels"], direction)

    def linear(t: Values) -> Values:
        heads = t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"]
        return {"kl": fused_po.linear_kl(*heads, t["labels"], **options).kl}

    def plain_linear(t: Values) -> Values:
        return plain_kl(plain_scores(t), plain_scores(t, "ref_"), t["labels"], direction)

    yield Check(f"kl_from_logits, {direction}", ("logits",), from_logits, plain_from_logits)
    yield Check(f"linear_kl, {direction}", HEAD, linear, plain_linear)


def dpo_from_logits(t: Values, **options) -> fused_po.DPOOutput:
    logits, labels, ref_logits = (as_pairs(t[name]) for name in ("logits", "labels", "ref_logits"))
    return fused_po.dpo_from_logits(logits, labels, ref_logits, **options)


def dpo_from_logits_check(backend: Optional[str]) -> Check:
    def ours(t: Values) -> Values:
        return {"losses": dpo_from_logits(t, backend=backend).losses}

    def plain(t: Values) -> Values:
        return plain_dpo(wide(t["logits"]), wide(t["ref_logits"]), t["labels"])

    return Check("dpo_from_logits", ("logits",), ours, plain)


def dpo_with_kl_check(backend: Optional[str]) -> Check:
    def ours(t: Values) -> Values:
        return {"loss": dpo_from_logits(t, kl="k3", kl_coef=KL_COEF, backend=backend).loss}

    def plain(t: Values) -> Values:
        return plain_dpo_with_kl(wide(t["logits"]), wide(t["ref_logits"]), t["labels"])

    return Check("dpo_from_logits, k3", ("logits",), ours, plain)


def linear_dpo_check(backend: Optional[str]) -> Check:
    def ours(t: Values) -> Values:
        hidden, labels, ref_hidden = (as_pairs(t[name]) for name in ("hidden", "labels", "ref_hidden"))
        out = fused_po.linear_dpo(hidden, t["weight"], labels, ref_hidden, t["ref_weight"], backend=backend)
        return {"losses": out.losses}

    def plain(t: Values) -> Values:
        return plain_dpo(plain_scores(t), plain_scores(t, "ref_"), t["labels"])

    return Check("linear_dpo", HEAD, ours, plain)


def policy_check(name: str, backend: Optional[str], inplace: bool) -> Check:
    def ours(t: Values) -> Values:
        logits, labels = as_pairs(t["logits"] + 0), as_pairs(t["labels"])
        old = as_pairs(plain_logps(wide(t["ref_logits"]), t["labels"]))
        a = torch.linspace(-1, 1, 2 * PAIRS, dtype=torch.float32, device=old.device)
        weights = torch.full_like(old, 1 / labels.numel())
        options = {"loss_type": "sapo", "entropy_coef": 0.1, "inplace_backward": inplace, "backend": backend}
        out = fused_po.policy_loss_from_logits(logits, labels, a, old, weights=weights, **options)
        return {"losses": with_gradient_of(out.losses, out.loss)}

    def plain(t: Values) -> Values:
        return plain_policy(wide(t["logits"]), wide(t["ref_logits"]), t["labels"])

    return Check(f"policy_loss_from_logits{name}", ("logits",), ours, plain)


def gae_check(backend: Optional[str]) -> Check:
    def ours(t: Values) -> Values:
        advantages, _ = fused_po.gae(t["rewards"], t["values"], gamma=0.99, lam=0.95, backend=backend)
        return {"advantages": advantages}

    return Check("gae", (), ours, plain_gae)
