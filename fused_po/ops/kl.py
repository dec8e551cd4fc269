"""`kl_from_logits`: the exact KL of every token's whole distribution, policy against reference."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from fused_po import checks
from fused_po.ops import backend as backends
from fused_po.ops.autograd import custom_op, differentiable, direct, public
from fused_po.ops.logps import as_rows, gradient_by, logits_shards, on_rows
from fused_po.parallel import ProcessGroupLike, Shards, row_passes
from fused_po.reference import stats_dtype
from fused_po.reference.divergence import ENTROPY, KL, LOGP, REF_LOGP, TOKEN_FIELDS

DIRECTIONS = ("reverse", "forward", "js")
PerSide = Union[None, float, tuple[Optional[float], Optional[float]]]


class KLStats(NamedTuple):
    """Per-token divergences and what came in the same pass, each shaped like the tokens; fp32 (float64 for float64).

    kl: in nats, >= 0. Carries gradients to the policy, as do logps and entropy.
    logps, ref_logps: log-prob of the label under policy and reference. None without labels, and so is
    entropy: of the policy.
    """

    kl: Tensor
    logps: Optional[Tensor] = None
    ref_logps: Optional[Tensor] = None
    entropy: Optional[Tensor] = None


def results_of(tokens: Tensor, with_labels: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(kl, logps, entropy, ref_logps, tokens) as an op returns them: tokens for the backward alone, copies for callers.

    Without elements where not asked.
    """
    picked = (tokens[i].clone() if with_labels else tokens.new_empty(0) for i in (LOGP, ENTROPY, REF_LOGP))
    return tokens[KL].clone(), *picked, tokens


def fake_results(values: Tensor, n_rows, with_labels: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the same."""

    def new(*shape):
        return values.new_empty(shape, dtype=stats_dtype(values.dtype))

    some = n_rows if with_labels else 0
    return new(n_rows), new(some), new(some), new(some), new(TOKEN_FIELDS, n_rows)


def kl_stats(results: tuple[Tensor, Tensor, Tensor, Tensor], shape: torch.Size, with_labels: bool) -> KLStats:
    """KLStats from an op's results."""
    kl, logps, entropy, ref_logps = results
    if not with_labels:
        return KLStats(kl.view(shape))
    return KLStats(kl.view(shape), logps.view(shape), ref_logps.detach().view(shape), entropy.view(shape))


def stacked(like: Tensor, *grads: Optional[Tensor]) -> Tensor:
    """[3, N] incoming gradients, 0 where there are none."""
    return torch.stack([torch.zeros_like(like) if g is None else g for g in grads])


def side(value: PerSide, which: int) -> Optional[float]:
    """The policy's (0) or the reference's (1) of one value for both, or of a pair."""
    return value[which] if isinstance(value, tuple) else value


def scalings(temperature: PerSide, logit_scale: PerSide, softcap: PerSide) -> list[tuple[float, Optional[float]]]:
    """(outer, inner) of either side."""
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if isinstance(value, tuple) and len(value) != 2:
            raise ValueError(f"{name}: got {len(value)} values, expected one, or a pair (policy's, reference's)")
    return [checks.scaling(side(temperature, i), side(logit_scale, i), side(softcap, i)) for i in (0, 1)]


def direction_of(direction: str, js_weight: float) -> tuple[str, float]:
    """The direction and js's weight, checked."""
    checks.choice("direction", direction, DIRECTIONS)
    checks.only_with("js_weight", js_weight, 0.5, direction == "js", 'direction="js"')
    allowed = '0 < js_weight < 1 (the limits are the directions "forward" and "reverse")'
    return direction, checks.number("js_weight", js_weight, allowed, lambda v: 0 < v < 1)


def form(direction: str, js_weight: float) -> Union[str, float]:
    """The direction as a backend takes it."""
    return js_weight if direction == "js" else direction


def counted_labels(
    labels: Optional[Tensor], mask: Optional[Tensor], like: Tensor, name: str, ignore_index: int
) -> Tensor:
    """Labels in the shape of like [..., *] without its last dimension, ignore_index where a token does not count."""
    shape, why = like.shape[:-1], f"{name}'s shape without its last dimension"
    checks.whole("ignore_index", ignore_index)
    if labels is None:
        labels = torch.zeros(shape, dtype=torch.int64, device=like.device)
        if ignore_index == 0:
            raise ValueError("ignore_index: got 0, which without labels marks every token; leave it at -100")
    labels = checks.integer("labels", labels, shape, like.device, why)
    if mask is None:
        return labels
    return torch.where(checks.mask_like("mask", mask, labels, "the tokens"), labels, ignore_index)


def _ref_rows(ref_logits: Tensor, rows: Tensor) -> Tensor:
    """The reference's logits as [O, I, V], as those of the policy are."""
    ref_rows = as_rows(ref_logits)
    return ref_rows if ref_rows.shape == rows.shape else ref_rows.reshape(rows.shape)


def negative_where_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """As a backend takes labels: below 0 where a token does not count."""
    return torch.where(labels == ignore_index, -1, labels)


@custom_op("fused_po::kl_fwd", mutates_args=())
def _forward(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, outer: float, inner: Optional[float], ref_outer: float,
    ref_inner: Optional[float], direction: str, js_weight: float, with_labels: bool, ignore_index: int,
    inplace_backward: bool, backend: str, group: str, sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shards = Shards(group, tuple(sizes))
    checks.overwritable(logits, inplace_backward, ref_logits)
    checks.label_range(labels, shards.n_cols(logits.shape[-1]), ignore_index)
    rows, labels = as_rows(logits), negative_where_ignored(labels, ignore_index)
    run, how = row_passes(backends.get(backend), shards), ((outer, inner), (ref_outer, ref_inner))
    how = *how, form(direction, js_weight), with_labels
    tokens = run.begin_kl(rows, _ref_rows(ref_logits, rows), labels, *how)()
    return results_of(tokens, with_labels)


@_forward.register_fake
def _(logits, ref_logits, labels, outer, inner, ref_outer, ref_inner, direction, js_weight, with_labels, *others):
    return fake_results(logits, labels.numel(), with_labels)


def _gradient(logits, out, ref_logits, labels, tokens, grads, *how):
    outer, inner, ref_outer, ref_inner, direction, js_weight, with_labels, ignore_index, backend, group, sizes = how
    labels = negative_where_ignored(labels, ignore_index)
    run = row_passes(backends.get(backend), Shards(group, tuple(sizes))).kl_gradient
    scaling = (outer, inner), (ref_outer, ref_inner)

    def write(rows, target):
        ref_rows, kind = _ref_rows(ref_logits, rows), form(direction, js_weight)
        run(rows, ref_rows, labels, tokens, grads, *scaling, kind, with_labels, target)

    on_rows(write, logits, out)


@custom_op("fused_po::kl_bwd", mutates_args=())
def _backward(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, tokens: Tensor, grads: Tensor, outer: float,
    inner: Optional[float], ref_outer: float, ref_inner: Optional[float], direction: str, js_weight: float,
    with_labels: bool, ignore_index: int, backend: str, group: str, sizes: list[int],
) -> Tensor:  # fmt: skip
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    how = outer, inner, ref_outer, ref_inner, direction, js_weight, with_labels, ignore_index, backend, group, sizes
    _gradient(logits, out, ref_logits, labels, tokens, grads, *how)
    return out


@_backward.register_fake
def _(logits, *others):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@custom_op("fused_po::kl_bwd_", mutates_args=("logits",))
def _backward_(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, tokens: Tensor, grads: Tensor, outer: float,
    inner: Optional[float], ref_outer: float, ref_inner: Optional[float], direction: str, js_weight: float,
    with_labels: bool, ignore_index: int, backend: str, group: str, sizes: list[int],
) -> None:  # fmt: skip
    how = outer, inner, ref_outer, ref_inner, direction, js_weight, with_labels, ignore_index, backend, group, sizes
    _gradient(logits, logits, ref_logits, labels, tokens, grads, *how)


def _setup_context(ctx, inputs, output):
    logits, ref_logits, labels, *how, ctx.inplace, backend, group, sizes = inputs
    ctx.how = (*how, backend, group, sizes)
    ctx.save_for_backward(logits, ref_logits, labels, output[-1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_kl, g_logps, g_entropy, *g_others):
    nothing = (None,) * (4 + len(ctx.how))
    logits, ref_logits, labels, tokens = ctx.saved_tensors
    with_labels = ctx.how[-3]
    given = (g_kl, g_logps, g_entropy) if with_labels else (g_kl, None, None)
    if all(g is None for g in given):
        return nothing
    arguments = ref_logits, labels, tokens, stacked(tokens[0], *given), *ctx.how
    return gradient_by(_GRADIENT, ctx.inplace, logits, *arguments), *nothing[1:]


_GRADIENT = direct(_backward), direct(_backward_)
_compare = differentiable(_forward, _autograd, _setup_context)


@public
def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    *,
    direction: str = "reverse",
    js_weight: float = 0.5,
    temperature: PerSide = 1.0,
    logit_scale: PerSide = 1.0,
    softcap: PerSide = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroupLike = None,
    backend: Optional[str] = None,
) -> KLStats:
    """The exact KL of each token between policy p and reference q, from logits; one read of both, gradients to p alone.

        reverse   KL(p || q) = sum p (log p - log q)
        forward   KL(q || p) = sum q (log q - log p)
        js        w KL(q || m) + (1 - w) KL(p || m),  m = w q + (1 - w) p,  w = js_weight

    js is the generalised Jensen-Shannon divergence of on-policy distillation (Agarwal et al. 2023, arXiv:2306.13649,
    eq. 1, with the teacher for q and w for beta; TRL's and Liger's beta). Derivation: docs/derivations.md.

    A token that p gives probability 0 counts nothing. One that p may say and q may not makes the reverse KL +inf, and
    its row's gradient NaN; the other way about the forward KL; js is finite always.

    Args:
        logits, ref_logits: [..., V], of the same shape; float32, bfloat16, float16 or float64, any strides.
        labels: [...], integers in [0, V) or ignore_index: then log-probs and entropy come too. None: the KL alone.
        mask: [...], True where a token counts. None: everywhere but at ignore_index. The rest is not read, gives 0.
        direction: "reverse", "forward" or "js". js_weight: in (0, 1).
        temperature, logit_scale, softcap: as in `logps_from_logits`; one for both, or a pair (policy's, reference's).
        inplace_backward: the backward overwrites the policy's logits with their gradient. An error where their
            elements share memory, with each other or with ref_logits (the same view is allowed), and for leaves.
        process_group: the vocabulary of both is cut over its ranks, see `logps_from_logits`; js gathers twice.
        backend: "triton" or "reference"; None chooses by device. See `backends`.

    Returns:
        KLStats. With equal logits the KL is exactly 0 and so is its gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, by name.
    """
    checks.floating("logits", logits)
    shards = logits_shards(logits, process_group)
    checks.alike(logits=logits, ref_logits=ref_logits)
    checks.inplace(inplace_backward, logits)
    counted = counted_labels(labels, mask, logits, "logits", ignore_index)
    sides = scalings(temperature, logit_scale, softcap)
    how = direction_of(direction, js_weight)
    name = backends.resolve(backend, logits.device, logits.dtype)
    backends.resolve(name, ref_logits.device, ref_logits.dtype)
    results = _compare(
        logits, ref_logits.detach(), counted.reshape(-1), *sides[0], *sides[1], *how, labels is not None, ignore_index,
        inplace_backward, name, *shards[:2],
    )  # fmt: skip
    return kl_stats(results[:4], counted.shape, labels is not None)
