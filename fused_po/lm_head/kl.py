"""`linear_kl`: the exact KL from hidden states and LM heads of policy and reference, computed in tiles."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend.interface import Outputs
from fused_po.lm_head.backward import Backward, Gradients
from fused_po.lm_head.forward import Forward
from fused_po.lm_head.head import (
    Head,
    Operands,
    dtypes_of,
    empty_kept,
    make_head,
    used_bases,
    without_autocast,
    zero_unused,
)
from fused_po.lm_head.kl_tiles import OF_ENTROPY, KLBackward, KLForward, KLHead
from fused_po.lm_head.logps import check_operands
from fused_po.lm_head.plan import BASIS, NOTHING, PRODUCT, Needs
from fused_po.lm_head.scored import Dropping, LiveRows, ScoredTokens, scatter_rows, scored_rows
from fused_po.ops.autograd import public
from fused_po.ops.kl import (
    KLStats,
    PerSide,
    counted_labels,
    divergence_of,
    fake_results,
    incoming_gradients,
    kl_stats,
    negative_where_ignored,
    results_of,
)
from fused_po.ops.register import custom_op, differentiable
from fused_po.parallel.vocab import ProcessGroupLike, local_head
from fused_po.schedule import Schedule


class Results(NamedTuple):
    """What the op returns: KLResults, and what plan.py says."""

    kl: Tensor
    logps: Tensor
    entropy: Tensor
    ref_logps: Tensor
    tokens: Tensor
    kept: Tensor


class Saved(NamedTuple):
    """What the forward saves for the backward, in addition to the operands."""

    labels: Tensor  # [N], below 0 where a token does not count
    rows: Optional[Tensor]  # [n] numbers of the tokens that count, None for all
    tokens: Tensor  # [KLRow.COUNT, N]
    kept: Tensor


@without_autocast
def forward(
    head: Head,
    policy: Operands,
    reference: Operands,
    settings: KLHead,
    labels: Tensor,
    rows: Optional[Tensor],
    n_kept: int,
) -> tuple[Tensor, Tensor]:
    """(tokens [KLRow.COUNT, N], kept) of labels [N], below 0 where a token does not count.

    rows [n]: numbers of the tokens that count, None for all. n_kept: at least n, tokens to have memory for.
    """
    plan, weight, n_all = settings.plan(labels.device), policy.weight, labels.numel()
    widest = head.shards.widest(weight.shape[0])
    kept = empty_kept(plan, policy.hidden, weight, n_kept, widest)
    if plan.keep != NOTHING:
        zero_unused(plan, kept, n_all if rows is None else rows.numel(), weight.shape[0], rows is None)
    policy, reference = settings.ready(policy, reference, rows)
    tiles = KLForward(settings, plan, policy, reference, labels if rows is None else labels[rows])
    run = Forward(plan, tiles, policy, rows, kept, n_all, bool(head.shards.group))
    return run.run(plan.tile_rows(widest))[0], kept


@without_autocast
def backward(
    head: Head,
    policy: Operands,
    reference: Operands,
    settings: KLHead,
    saved: Saved,
    grads: list[Optional[Tensor]],
    needs: Needs,
    skip_zero_rows: bool,
) -> Gradients:
    """Gradients of the policy's operands; grads: of KL, log-prob and entropy, each [N] or None."""
    labels, rows, tokens, kept = saved
    hidden, plan, active = policy.hidden, settings.plan(labels.device), [g is not None for g in grads]
    grads = torch.where(labels >= 0, incoming_gradients(tokens[0], *grads), 0)
    # The softcap's slope does not come back from the basis, which a gradient of the entropy needs.
    from_kept = head.scaling.inner is None or not active[OF_ENTROPY]
    if head.keep == PRODUCT and not active[OF_ENTROPY]:
        product = head.shards.sum_of_rows(sum(g[:, None] * u for g, u in zip(grads, kept)), rows)
        return Gradients.empty(policy, Needs(False, False, False), product.to(hidden.dtype))
    labels, tokens, grads = (v if rows is None else v[..., rows] for v in (labels, tokens, grads))
    live = grads.any(0)
    n_kept = min(live.numel(), kept.shape[1]) if head.keep == BASIS and from_kept else 0
    chosen = LiveRows(rows, None, n_kept)
    if skip_zero_rows or hidden.device.type == "cpu":
        chosen = LiveRows.of(live, rows, n_kept)
        if chosen.index is not None:
            labels, tokens, grads = (v[..., chosen.index].contiguous() for v in (labels, tokens, grads))
    bases = used_bases(kept, n_kept, policy.weight.shape[0])
    ready, ref_ready = settings.ready(policy, reference, chosen.rows)
    wide = hidden.new_empty(ready.hidden.shape if needs.hidden else 0, dtype=plan.dtypes.sums)
    out = Gradients.empty(policy, needs, wide)
    arguments = settings, plan, ready, ref_ready, labels, tokens, grads, active, chosen.kept(bases)
    # The tiles are not bound to a variable, so that their memory is free when hidden's gradient is scattered.
    Backward(plan, head.shards, KLBackward(*arguments), ready, out, needs, False).run()
    return Gradients(scatter_rows(wide, chosen.rows, hidden) if needs.hidden else wide.to(hidden.dtype), *out[1:])


@custom_op("fused_po::linear_kl_fwd")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Optional[Tensor],
    labels: Tensor,
    rows: Optional[Tensor],
    settings: KLHead,
    dropping: Dropping,
) -> Results:
    head = settings.head
    checks.label_range(labels, head.shards.n_cols(weight.shape[0]), head.ignore_index)
    n_kept = labels.numel() if rows is None else rows.numel()
    rows = scored_rows(labels, head.ignore_index) if dropping.ignored else rows
    sides = Operands(hidden, weight, bias), Operands(ref_hidden, ref_weight, ref_bias)
    counted = negative_where_ignored(labels, head.ignore_index)
    tokens, kept = forward(head, *sides, settings, counted, rows, n_kept)
    return Results(*results_of(tokens, settings.divergence.with_labels), kept)


@_forward.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, rows, settings, dropping):
    n_kept = labels.numel() if rows is None else rows.numel()
    values = hidden.new_empty(0, dtype=settings.head.dtypes.logits)
    results = fake_results(values, labels.numel(), settings.divergence.with_labels)
    widest = settings.head.shards.widest(weight.shape[0])
    return Results(*results, empty_kept(settings.plan(hidden.device), hidden, weight, n_kept, widest))


@custom_op("fused_po::linear_kl_bwd")
def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Optional[Tensor],
    labels: Tensor,
    rows: Optional[Tensor],
    tokens: Tensor,
    kept: Tensor,
    g_kl: Optional[Tensor],
    g_logps: Optional[Tensor],
    g_entropy: Optional[Tensor],
    settings: KLHead,
    dropping: Dropping,
    needs: Needs,
) -> Gradients:
    head = settings.head
    rows = scored_rows(labels, head.ignore_index) if dropping.ignored else rows
    sides = Operands(hidden, weight, bias), Operands(ref_hidden, ref_weight, ref_bias)
    saved = Saved(negative_where_ignored(labels, head.ignore_index), rows, tokens, kept)
    grads = [None if g is None else g.contiguous() for g in (g_kl, g_logps, g_entropy)]
    return backward(head, *sides, settings, saved, grads, needs, dropping.zero_gradients)


@_backward.register_fake
def _(hidden, weight, bias, *others):
    return Gradients.fake(Operands(hidden, weight, bias), others[-1])


def _setup_context(ctx, inputs, results):
    *tensors, ctx.settings, ctx.dropping = inputs
    ctx.save_for_backward(*tensors, results.tokens, results.kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_kl, g_logps, g_entropy, *g_others):
    grads = (g_kl, g_logps, g_entropy) if ctx.settings.divergence.with_labels else (g_kl, None, None)
    if all(g is None for g in grads):
        return ()
    needs = Needs(*map(bool, ctx.needs_input_grad[:3]))
    found = _backward(*ctx.saved_tensors, *grads, ctx.settings, ctx.dropping, needs)
    return tuple(grad if need else None for grad, need in zip(found, needs[:3]))


_compare = differentiable(_forward, _autograd, _setup_context)


@public
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    *,
    bias: Optional[Tensor] = None,
    ref_bias: Optional[Tensor] = None,
    direction: str = "reverse",
    js_weight: float = 0.5,
    temperature: PerSide = 1.0,
    logit_scale: PerSide = 1.0,
    softcap: PerSide = None,
    ignore_index: int = -100,
    process_group: ProcessGroupLike = None,
    backend: Optional[str] = None,
    schedule: Optional[Schedule] = None,
) -> KLStats:
    """The exact KL of each token between policy and reference, from hidden states and LM heads, computed in tiles.

    The divergences, `direction`, `js_weight`, `labels` and `mask`: see `kl_from_logits`. The projections and
    `schedule`: see `linear_logps`. docs/api.md lists the cost. Gradients flow to hidden, weight and bias, not to the
    reference. With a trainable head, tokens within `Schedule.logits_budget` keep one row of V numbers (two with labels)
    for the backward; Schedule(logits_budget=0) keeps none.

    Args:
        hidden: [..., H], weight: [V, H], bias: [V], of the policy.
        ref_hidden: [..., H'], ref_weight: [V, H'], ref_bias: [V], of the reference. H' may differ from H.
        labels: [...], integers in [0, V) or ignore_index. mask: [...], True where a token counts.
        temperature, logit_scale, softcap: one value for both, or a pair (policy, reference).
        process_group: the ranks over which both vocabularies are sharded, see `linear_logps`. js does two all_gathers
            per tile.
        backend: "triton" or "reference" ("cuda" has no exact KL); None selects one by device. schedule: see `Schedule`.

    Returns:
        KLStats, fp32 (float64 for float64); gradients flow through kl, logps and entropy.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, by name.
    """
    checks.floating("hidden", hidden)
    if hidden.ndim < 1:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected [..., H]")
    with_labels = labels is not None
    hidden, weight, bias, shards = local_head(hidden, weight, bias, process_group)
    counted = counted_labels(labels, mask, hidden, "hidden", ignore_index)
    check_operands(hidden, weight, counted, bias, shards)
    ref_hidden = checks.floating("ref_hidden", ref_hidden).detach()
    ref_weight = checks.floating("ref_weight", ref_weight).detach()
    ref_bias = None if ref_bias is None else checks.floating("ref_bias", ref_bias).detach()
    ref_hidden, ref_weight, ref_bias, ref_shards = local_head(
        ref_hidden, ref_weight, ref_bias, process_group, "ref_weight"
    )
    if shards[:2] != ref_shards[:2]:
        got, expected = ref_shards.sizes or "the whole vocabulary", shards.sizes or "the whole vocabulary"
        raise ValueError(f"ref_weight: its ranks have {got}, expected {expected} rows, as weight; shard both equally")
    checks.same_device("ref_hidden", ref_hidden, hidden.device)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        got, expected = tuple(ref_hidden.shape), tuple(hidden.shape[:-1])
        raise ValueError(
            f"ref_hidden: got shape {got}, expected [{', '.join(map(str, expected))}, H'], the tokens of hidden"
        )
    _check_reference(ref_hidden, ref_weight, counted, ref_bias, weight)
    schedule = Schedule.of(schedule)
    divergence = divergence_of(temperature, logit_scale, softcap, direction, js_weight, with_labels)
    asked, operands = Outputs(logps=True), Operands(hidden, weight, bias)
    head = make_head(operands, asked, ignore_index, divergence.scaling, backend, schedule, shards)
    settings = KLHead(head, dtypes_of(ref_hidden, ref_weight, schedule), divergence)
    flat = counted.reshape(-1)
    tokens = ScoredTokens.of(flat, ignore_index, schedule)
    n_rows = flat.numel()  # given, since -1 is ambiguous for a width of 0
    states, ref_states = (h.reshape(n_rows, h.shape[-1]) for h in (hidden, ref_hidden))
    dropping = Dropping(tokens.find, schedule.skip_zero_rows)
    arguments = states, weight, bias, ref_states, ref_weight, ref_bias, flat, tokens.rows, settings, dropping
    results = _compare(*arguments)
    stats = kl_stats(tokens.checked(results), counted.shape, with_labels)
    if stats.entropy is not None and not schedule.entropy_grad:
        stats = stats._replace(entropy=stats.entropy.detach())
    return stats


def _check_reference(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Optional[Tensor], policy: Tensor) -> None:
    """The reference's operands, by their own names."""
    checks.same_device("ref_weight", weight, hidden.device)
    expected = policy.shape[0], hidden.shape[-1]
    if tuple(weight.shape) != expected:
        why = "[V, H'] with the policy's vocabulary and ref_hidden's width"
        raise ValueError(f"ref_weight: got shape {tuple(weight.shape)}, expected {expected}, {why}")
    if bias is not None:
        checks.same_device("ref_bias", bias, hidden.device)
        if tuple(bias.shape) != expected[:1]:
            raise ValueError(f"ref_bias: got shape {tuple(bias.shape)}, expected {expected[:1]}, the vocabulary size")
