"""`kl_from_logits`: the exact KL between policy and reference at every token, over the whole vocabulary."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend import choose as backends
from fused_po.backend.interface import Divergence, KLRow, Scaling, stats_dtype
from fused_po.ops.autograd import public
from fused_po.ops.logps import logits_shards
from fused_po.ops.register import custom_op, differentiable
from fused_po.ops.rows import GradientOps, as_rows, empty_gradient, on_rows
from fused_po.parallel.row_passes import row_passes
from fused_po.parallel.vocab import ProcessGroupLike, Shards

DIRECTIONS = ("reverse", "forward", "js")
PerSide = Union[None, float, tuple[Optional[float], Optional[float]]]


class KLStats(NamedTuple):
    """Per-token divergences and statistics of the same pass, each shaped like the tokens; fp32 (float64 for float64).

    kl: in nats, >= 0. kl, logps and entropy have gradients with respect to the policy.
    logps, ref_logps: log-probs of the labels under policy and reference. None without labels.
    entropy: of the policy. None without labels.
    """

    kl: Tensor
    logps: Optional[Tensor] = None
    ref_logps: Optional[Tensor] = None
    entropy: Optional[Tensor] = None


class KLResults(NamedTuple):
    """The results of an op: tokens for the backward, copies for callers. Those not requested have no elements."""

    kl: Tensor
    logps: Tensor
    entropy: Tensor
    ref_logps: Tensor
    tokens: Tensor  # [KLRow.COUNT, N]


def results_of(tokens: Tensor, with_labels: bool) -> KLResults:
    """The results from a backend's tokens."""
    picked = (KLRow.LOGP, KLRow.ENTROPY, KLRow.REF_LOGP)
    copies = (tokens[i].clone() if with_labels else tokens.new_empty(0) for i in picked)
    return KLResults(tokens[KLRow.KL].clone(), *copies, tokens)


def fake_results(values: Tensor, n_rows, with_labels: bool) -> KLResults:
    """Shapes and dtypes of the same."""

    def new(*shape):
        return values.new_empty(shape, dtype=stats_dtype(values.dtype))

    n_labels = n_rows if with_labels else 0
    return KLResults(new(n_rows), new(n_labels), new(n_labels), new(n_labels), new(KLRow.COUNT, n_rows))


def kl_stats(results: KLResults, shape: torch.Size, with_labels: bool) -> KLStats:
    """KLStats from an op's results."""
    kl, logps, entropy, ref_logps, *_ = results
    if not with_labels:
        return KLStats(kl.view(shape))
    return KLStats(kl.view(shape), logps.view(shape), ref_logps.detach().view(shape), entropy.view(shape))


def incoming_gradients(like: Tensor, *grads: Optional[Tensor]) -> Tensor:
    """[3, N] incoming gradients, 0 where there are none."""
    zero = torch.zeros_like(like)
    return torch.stack([zero if g is None else g for g in grads])


def side(value: PerSide, which: int) -> Optional[float]:
    """The policy's (0) or the reference's (1) of one value for both, or of a pair."""
    return value[which] if isinstance(value, tuple) else value


def divergence_of(
    temperature: PerSide,
    logit_scale: PerSide,
    softcap: PerSide,
    direction: str,
    js_weight: float,
    with_labels: bool,
) -> Divergence:
    """The divergence that the public arguments name, checked."""
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if isinstance(value, tuple) and len(value) != 2:
            raise ValueError(f"{name}: got {len(value)} values, expected one, or a pair (policy, reference)")
    scalings = (Scaling(*checks.scaling(side(temperature, i), side(logit_scale, i), side(softcap, i))) for i in (0, 1))
    own, reference = scalings
    checks.choice("direction", direction, DIRECTIONS)
    checks.only_with("js_weight", js_weight, 0.5, direction == "js", 'direction="js"')
    allowed = '0 < js_weight < 1 (the limits are the directions "forward" and "reverse")'
    weight = checks.number("js_weight", js_weight, allowed, lambda v: 0 < v < 1)
    return Divergence(own, reference, direction, weight, with_labels)


def counted_labels(
    labels: Optional[Tensor], mask: Optional[Tensor], like: Tensor, name: str, ignore_index: int
) -> Tensor:
    """Labels in the shape of like [..., *] without its last dimension, ignore_index where a token does not count."""
    shape, why = like.shape[:-1], f"the shape of {name} without its last dimension"
    checks.whole_number("ignore_index", ignore_index)
    if labels is None:
        labels = torch.zeros(shape, dtype=torch.int64, device=like.device)
        if ignore_index == 0:
            raise ValueError("ignore_index: got 0 without labels, which would ignore every token; leave it at -100")
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


class KLSettings(NamedTuple):
    """How two tensors of logits are compared."""

    divergence: Divergence
    ignore_index: int
    inplace_backward: bool
    backend: str
    shards: Shards


@custom_op("fused_po::kl_fwd")
def _forward(logits: Tensor, ref_logits: Tensor, labels: Tensor, settings: KLSettings) -> KLResults:
    divergence, ignore_index, inplace, backend, shards = settings
    checks.overwritable(logits, inplace, ref_logits)
    checks.label_range(labels, shards.n_cols(logits.shape[-1]), ignore_index)
    rows, labels = as_rows(logits), negative_where_ignored(labels, ignore_index)
    run = row_passes(backends.get(backend), shards)
    tokens = run.begin_kl(rows, _ref_rows(ref_logits, rows), labels, divergence)()
    return results_of(tokens, divergence.with_labels)


@_forward.register_fake
def _(logits, ref_logits, labels, settings):
    return fake_results(logits, labels.numel(), settings.divergence.with_labels)


def _write_gradient(
    logits: Tensor, out: Tensor, ref_logits: Tensor, labels: Tensor, tokens: Tensor, grads: Tensor, settings: KLSettings
) -> None:
    labels = negative_where_ignored(labels, settings.ignore_index)
    run = row_passes(backends.get(settings.backend), settings.shards)

    def write(rows, target):
        run.kl_gradient(rows, _ref_rows(ref_logits, rows), labels, tokens, grads, settings.divergence, target)

    on_rows(write, logits, out)


@custom_op("fused_po::kl_bwd")
def _backward(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, tokens: Tensor, grads: Tensor, settings: KLSettings
) -> Tensor:
    out = empty_gradient(logits)
    _write_gradient(logits, out, ref_logits, labels, tokens, grads, settings)
    return out


_backward.register_fake(empty_gradient)


@custom_op("fused_po::kl_bwd_", mutates_args=("logits",))
def _backward_(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, tokens: Tensor, grads: Tensor, settings: KLSettings
) -> None:
    _write_gradient(logits, logits, ref_logits, labels, tokens, grads, settings)


def _setup_context(ctx, inputs, results):
    logits, ref_logits, labels, ctx.settings = inputs
    ctx.save_for_backward(logits, ref_logits, labels, results.tokens)
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_kl, g_logps, g_entropy, *g_others):
    grads = (g_kl, g_logps, g_entropy) if ctx.settings.divergence.with_labels else (g_kl, None, None)
    if all(g is None for g in grads):
        return ()
    logits, ref_logits, labels, tokens = ctx.saved_tensors
    arguments = ref_logits, labels, tokens, incoming_gradients(tokens[0], *grads), ctx.settings
    return (_gradient(ctx.settings.inplace_backward, logits, *arguments),)


_gradient = GradientOps(_backward, _backward_)
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
    """The exact KL of each token between policy p and reference q, from logits. Only p gets gradients.

        reverse   KL(p || q) = sum p (log p - log q)
        forward   KL(q || p) = sum q (log q - log p)
        js        w KL(q || m) + (1 - w) KL(p || m),  m = w q + (1 - w) p,  w = js_weight

    js is the generalized Jensen-Shannon divergence of on-policy distillation (Agarwal et al. 2023, arXiv:2306.13649,
    eq. 1, where q is the teacher and w is beta, as in TRL and Liger). Derivation: docs/derivations.md.

    In the reverse KL, a token with p = 0 counts as 0, and a token with p > 0 and q = 0 makes the KL +inf and the
    gradient of its row NaN. In the forward KL, p and q change roles. js is always finite.

    Args:
        logits, ref_logits: [..., V], of the same shape; float32, bfloat16, float16 or float64, any strides.
        labels: [...], integers in [0, V) or ignore_index. With labels, log-probs and entropy are computed too.
        mask: [...], True where a token counts. None: all tokens except those with ignore_index. Other tokens are not
            read and give 0.
        direction: "reverse", "forward" or "js". js_weight: in (0, 1).
        temperature, logit_scale, softcap: as in `logps_from_logits`; one value for both, or a pair (policy, reference).
        inplace_backward: overwrite the policy's logits with their gradient in the backward. An error for leaves, and if
            elements share memory with each other or with ref_logits (the same view is allowed).
        process_group: the ranks over which both vocabularies are sharded, see `logps_from_logits`. js does two
            all_gathers.
        backend: "triton" or "reference" ("cuda" has no exact KL); None selects one by device. See `backends`.

    Returns:
        KLStats. For equal logits the KL and its gradient are exactly 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, by name.
    """
    checks.floating("logits", logits)
    shards = logits_shards(logits, process_group)
    checks.same_shape(logits=logits, ref_logits=ref_logits)
    checks.inplace(inplace_backward, logits)
    counted = counted_labels(labels, mask, logits, "logits", ignore_index)
    divergence = divergence_of(temperature, logit_scale, softcap, direction, js_weight, labels is not None)
    name = backends.resolve(backend, logits.device, logits.dtype)
    backends.resolve(name, ref_logits.device, ref_logits.dtype)
    settings = KLSettings(divergence, ignore_index, inplace_backward, name, shards)
    results = _compare(logits, ref_logits.detach(), counted.reshape(-1), settings)
    return kl_stats(results, counted.shape, labels is not None)
