"""A table of all public ops: for each a call, the tensors that get gradients, and the constants it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from numerics import DEVICE, IGNORE

import fused_po

B, T, V, H, R = 2, 3, 11, 5, 2
STATS = ("logps", "entropy", "lse")


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Arguments by name, the same in every call; the second token of every answer is ignored."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    tokens = (2 * B, T)
    t = {name: normal(*tokens, V) for name in ("logits", "ref_logits")}
    t |= {name: normal(*tokens, H) for name in ("hidden", "ref_hidden")}
    t |= {name: normal(V, H) for name in ("weight", "ref_weight")} | {name: normal(V) for name in ("bias", "ref_bias")}
    t |= {"u": normal(*tokens, R), "low": normal(V, R), "advantages": normal(2 * B), "last_values": normal(2 * B)}
    t |= {name: normal(*tokens) for name in ("rewards", "values")}
    t |= {name: -normal(*tokens).abs() for name in ("ref_logps", "old_logps")} | {"weights": normal(*tokens).abs()}
    labels = torch.randint(0, V, tokens, generator=generator).to(DEVICE)
    labels[:, 1] = IGNORE
    mask = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
    mask[0, 0] = False
    groups = torch.arange(2 * B, device=DEVICE)[:, None].expand(tokens).contiguous()
    return t | {"labels": labels, "mask": mask, "groups": groups}


class Row(NamedTuple):
    """An op: a call, the tensors that may require grad, the tensors that are constants."""

    call: Callable[..., tuple]  # (tensors by name, **options) -> results
    leaves: tuple[str, ...]
    constants: tuple[str, ...]
    inplace: bool = False  # whether it takes inplace_backward
    plain: Callable[..., torch.Tensor] | None = None  # the log-probs, the first result, in plain PyTorch


def plain_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probs of labels, 0 where ignored."""
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels != IGNORE, logps, 0)


def policy(loss_type: str, **settings) -> Callable:
    def call(t, **how):
        numbers = t["advantages"], t["old_logps"], t["ref_logps"], t["mask"]
        given = dict(loss_type=loss_type, weights=t["weights"], kl="k3", kl_coef=0.1, entropy_coef=0.3)
        return fused_po.policy_loss_from_logits(t["logits"], t["labels"], *numbers, **given, **settings, **how)

    return call


def chunked(t, **how):
    """`chunked_loss` of log-probs, entropy and lse."""

    def loss_fn(stats, rows):
        w = t["weights"].flatten()[rows]
        return (w * stats.logps.square() + w * stats.entropy + 0.3 * stats.lse.square()).sum()

    operands = t["hidden"], t["weight"], t["labels"], t["groups"], t["bias"]
    return (fused_po.chunked_loss(loss_fn, *operands, outputs=STATS, **how),)


def linear(*names, outputs=STATS) -> Callable:
    """`linear_logps` with or without bias and low_rank."""

    def call(t, **how):
        extra = {"low_rank": (t["u"], t["low"])} if "low" in names else {}
        bias = t["bias"] if "bias" in names else None
        return fused_po.linear_logps(t["hidden"], t["weight"], t["labels"], bias, outputs=outputs, **extra, **how)

    return call


def linear_kl(t, **how):
    sides = t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"], t["labels"], t["mask"]
    return fused_po.linear_kl(*sides, bias=t["bias"], ref_bias=t["ref_bias"], **how)


def linear_dpo(kl: str) -> Callable:
    def call(t, **how):
        reference = t["ref_hidden"], t["ref_weight"]
        return fused_po.linear_dpo(t["hidden"], t["weight"], t["labels"], *reference, kl=kl, kl_coef=0.1, **how)

    return call


def of_hidden(t, bias: bool = False):
    logits = t["hidden"] @ t["weight"].T
    return plain_logps(logits + t["bias"] if bias else logits, t["labels"])


def of_logits(t):
    return plain_logps(t["logits"], t["labels"])


def dpo(kl: str) -> Callable:
    def call(t, **how):
        return fused_po.dpo_from_logits(t["logits"], t["labels"], t["ref_logits"], kl=kl, kl_coef=0.1, **how)

    return call


HEAD, REF_HEAD = ("hidden", "weight", "bias"), ("ref_hidden", "ref_weight")
POLICY = ("labels", "advantages", "old_logps", "ref_logps", "mask", "weights")

ROWS = {
    "logps_from_logits": Row(
        lambda t, **how: fused_po.logps_from_logits(t["logits"], t["labels"], outputs=STATS, **how),
        ("logits",),
        ("labels",),
        True,
        of_logits,
    ),
    "linear_logps": Row(linear("bias"), HEAD, ("labels",), plain=lambda t: of_hidden(t, True)),
    "linear_logps, frozen head": Row(
        linear(outputs=("logps", "lse")), ("hidden",), ("labels", "weight"), plain=of_hidden
    ),
    "linear_logps, head alone": Row(linear(), ("weight",), ("labels", "hidden"), plain=of_hidden),
    "linear_logps, low rank": Row(linear("low"), ("hidden", "weight", "u", "low"), ("labels",)),
    "kl_from_logits": Row(
        lambda t, **how: fused_po.kl_from_logits(t["logits"], t["ref_logits"], t["labels"], t["mask"], **how),
        ("logits",),
        ("ref_logits", "labels", "mask"),
        True,
    ),
    "linear_kl": Row(linear_kl, HEAD, (*REF_HEAD, "ref_bias", "labels", "mask")),
    "linear_kl, frozen head": Row(linear_kl, ("hidden",), ("weight", "bias", *REF_HEAD, "labels", "mask")),
    "dpo_from_logits": Row(
        dpo("k3"),
        ("logits",),
        ("labels", "ref_logits"),
        True,
    ),
    "dpo_from_logits, full KL": Row(
        dpo("full"),
        ("logits",),
        ("labels", "ref_logits"),
        True,
    ),
    "dpo_from_logits, ref_logps": Row(
        lambda t, **how: fused_po.dpo_from_logits(t["logits"], t["labels"], ref_logps=t["ref_logps"], **how),
        ("logits",),
        ("labels", "ref_logps"),
        True,
    ),
    "linear_dpo": Row(linear_dpo("k3"), HEAD[:2], ("labels", *REF_HEAD)),
    "linear_dpo, full KL": Row(linear_dpo("full"), HEAD[:2], ("labels", *REF_HEAD)),
    "policy_loss_from_logits": Row(policy("grpo"), ("logits",), POLICY, True),
    "policy_loss_from_logits, one ratio an answer": Row(policy("gspo"), ("logits",), POLICY, True),
    "gae": Row(
        lambda t, **how: fused_po.gae(t["rewards"], t["values"], t["mask"], t["last_values"], **how),
        (),
        ("rewards", "values", "mask", "last_values"),
    ),
    "chunked_loss": Row(chunked, HEAD, ("labels", "groups", "weights")),
    "chunked_loss, frozen head": Row(chunked, ("hidden",), ("labels", "groups", "weights", "weight", "bias")),
}


def leaves_of(name: str, t: dict) -> dict[str, torch.Tensor]:
    """The row's leaves, which require grad. The call gets 1.0 times the logits, which may be overwritten."""
    leaves = {leaf: t[leaf].clone().requires_grad_() for leaf in ROWS[name].leaves}
    t |= leaves
    if "logits" in leaves:
        t["logits"] = leaves["logits"] * 1.0
    return leaves


def total(results: tuple) -> torch.Tensor:
    """A scalar that depends on every result that carries gradients."""
    carrying = [v for v in results if isinstance(v, torch.Tensor) and v.requires_grad]
    return sum((i + 1) * v.sum() for i, v in enumerate(carrying))


def named(results: tuple) -> dict[str, torch.Tensor]:
    """Results by name, without those that are None."""
    fields = getattr(results, "_fields", range(len(results)))
    return {str(name): value for name, value in zip(fields, results) if value is not None}


def split_over_ranks(name: str) -> None:
    """A row with the vocabulary split over two ranks: edits by all_reduce, a second derivative, forward mode."""
    import torch.distributed as dist
    from torch.autograd import forward_ad

    rank, row = dist.get_rank(), ROWS[name]
    t = tensors()
    for argument in ("weight", "ref_weight", "low", "bias", "ref_bias"):
        t[argument] = t[argument].tensor_split(2)[rank].clone()
    for argument in ("logits", "ref_logits"):
        t[argument] = t[argument].tensor_split(2, -1)[rank].clone()
    cut = fused_po.VocabParallel(dist.group.WORLD, ((V + 1) // 2, V // 2))
    own = {leaf: t[leaf].clone().requires_grad_() for leaf in row.leaves}
    given, leaves = t | own, list(own.values())

    def results():
        return row.call(given, process_group=cut, backend="reference")

    expected = torch.autograd.grad(total(results()), leaves)
    edited = results()
    loss = total(edited)
    for value in named(edited).values():
        dist.all_reduce(value.detach())
    found = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected)), "an all_reduce of results changed a gradient"
    first = row.leaves[0]

    def second_derivative() -> None:
        torch.autograd.grad(sum(g.sum() for g in found), leaves, allow_unused=True)

    def forward_mode() -> None:
        with forward_ad.dual_level():
            row.call(t | {first: forward_ad.make_dual(t[first], t[first])}, process_group=cut)

    for refused, error in ((second_derivative, "second derivatives"), (forward_mode, "forward-mode tangent")):
        try:
            refused()
        except RuntimeError as raised:
            assert error in str(raised), raised
        else:
            raise AssertionError(f"no error about {error}")


DIFFERENTIABLE = [name for name, row in ROWS.items() if row.leaves]
IN_PLACE = [(name, {}) for name in DIFFERENTIABLE]
IN_PLACE += [(name, {"inplace_backward": True}) for name in DIFFERENTIABLE if ROWS[name].inplace]
every = pytest.mark.parametrize("name", DIFFERENTIABLE)
in_place_too = pytest.mark.parametrize(
    "name, options", IN_PLACE, ids=[f"{n}{', in place' * len(o)}" for n, o in IN_PLACE]
)


def run(name, backend="reference", **options):
    """(results by name, a scalar of all results that carry gradients, leaves) of a row."""
    t = tensors()
    leaves = leaves_of(name, t)
    results = ROWS[name].call(t, backend=backend, **options)
    return named(results), total(results), list(leaves.values())


def storage(value):
    return value.untyped_storage().data_ptr()


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
