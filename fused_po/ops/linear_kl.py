"""`linear_kl`: the exact KL from hidden states and heads of policy and reference, without [N, V] logits of either."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.ops import kl_head
from fused_po.ops.autograd import custom_op, differentiable, direct, public, transforms_active
from fused_po.ops.head import Head, scored_rows
from fused_po.ops.head_backward import empty_gradients
from fused_po.ops.kl import (
    KLStats,
    PerSide,
    counted_labels,
    direction_of,
    fake_results,
    kl_stats,
    negative_where_ignored,
    results_of,
    scalings,
)
from fused_po.ops.kl_head import Other, Side
from fused_po.ops.linear_logps import bounded_rows, check_operands, compute_dtype, make_head
from fused_po.ops.logps import dense
from fused_po.parallel import ProcessGroupLike, placed
from fused_po.schedule import Schedule


@custom_op("fused_po::linear_kl_fwd", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], ref_hidden: Tensor, ref_weight: Tensor,
    ref_bias: Optional[Tensor], labels: Tensor, rows: Optional[Tensor], outer: float, inner: Optional[float],
    ignore_index: int, outputs: int, compute_dtype: torch.dtype, logits_dtype: torch.dtype, tile_bytes: int,
    budget: int, keep: str, backend: str, group: str, sizes: list[int], partial: bool, ref_outer: float,
    ref_inner: Optional[float], ref_compute_dtype: torch.dtype, ref_logits_dtype: torch.dtype, direction: str,
    js_weight: float, with_labels: bool, compact: bool, skip_zero_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    how = outer, inner, ignore_index, outputs, compute_dtype, logits_dtype, tile_bytes, budget, keep, backend
    head = Head(*how, group, sizes, partial)
    checks.label_range(labels, head.shards.n_cols(weight.shape[0]), ignore_index)
    other = Other(ref_outer, ref_inner, ref_compute_dtype, ref_logits_dtype, direction, js_weight, with_labels)
    n_room = labels.numel() if rows is None else rows.numel()
    rows = scored_rows(labels, ignore_index) if compact else rows
    sides = Side(hidden, weight, bias), Side(ref_hidden, ref_weight, ref_bias)
    counted = negative_where_ignored(labels, ignore_index)
    tokens, kept = kl_head.forward(head, hidden, other, *sides, counted, rows, n_room)
    return *results_of(tokens, with_labels), kept


@_forward.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, rows, *how):
    head, other = Head(*how[:13]), Other(*how[13:20])
    n_room = labels.numel() if rows is None else rows.numel()
    results = fake_results(hidden.new_empty(0, dtype=head.logits_dtype), labels.numel(), other.with_labels)
    return *results, kl_head.empty_kept(head, other, hidden, n_room, weight)


@custom_op("fused_po::linear_kl_bwd", mutates_args=())
def _backward(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], ref_hidden: Tensor, ref_weight: Tensor,
    ref_bias: Optional[Tensor], labels: Tensor, rows: Optional[Tensor], tokens: Tensor, kept: Tensor,
    g_kl: Optional[Tensor], g_logps: Optional[Tensor], g_entropy: Optional[Tensor], outer: float,
    inner: Optional[float], ignore_index: int, outputs: int, compute_dtype: torch.dtype, logits_dtype: torch.dtype,
    tile_bytes: int, budget: int, keep: str, backend: str, group: str, sizes: list[int], partial: bool,
    ref_outer: float, ref_inner: Optional[float], ref_compute_dtype: torch.dtype, ref_logits_dtype: torch.dtype,
    direction: str, js_weight: float, with_labels: bool, compact: bool, skip_zero_rows: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    how = outer, inner, ignore_index, outputs, compute_dtype, logits_dtype, tile_bytes, budget, keep, backend
    head = Head(*how, group, sizes, partial)
    other = Other(ref_outer, ref_inner, ref_compute_dtype, ref_logits_dtype, direction, js_weight, with_labels)
    rows = scored_rows(labels, ignore_index) if compact else rows
    sides = Side(hidden, weight, bias), Side(ref_hidden, ref_weight, ref_bias)
    saved = kl_head.Saved(*sides, negative_where_ignored(labels, ignore_index), rows, tokens, kept)
    grads = [dense(g) for g in (g_kl, g_logps, g_entropy)]
    return kl_head.backward(head, saved, other, grads, needs, skip_zero_rows)


@_backward.register_fake
def _(hidden, weight, bias, *others):
    return empty_gradients((hidden, weight, bias), others[-1])


def _setup_context(ctx, inputs, output):
    tensors, ctx.how = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, *output[4:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_kl, g_logps, g_entropy, *g_others):
    with_labels = ctx.how[-3]
    given = (g_kl, g_logps, g_entropy) if with_labels else (g_kl, None, None)
    if all(g is None for g in given):
        return (None,) * (8 + len(ctx.how))
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = _gradients(*ctx.saved_tensors, *given, *ctx.how, needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), *(None,) * (5 + len(ctx.how))


_gradients = direct(_backward)
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
    """The exact KL of each token between policy and reference, from hidden states and LM heads, a tile at a time.

    The divergences, `direction`, `js_weight`, and what `labels` and `mask` do: see `kl_from_logits`. The projections
    and `schedule`: see `linear_logps`; what it costs is in docs/api.md. Gradients flow to hidden, weight and bias,
    never to the reference, of which no more than a tile of logits exists at a time.

    Args:
        hidden: [..., H], weight: [V, H], bias: [V], the policy's.
        ref_hidden: [..., H'], ref_weight: [V, H'], ref_bias: [V], the reference's. H' may differ from H; V may not.
        labels: [...], integers in [0, V) or ignore_index. mask: [...], True where a token counts.
        temperature, logit_scale, softcap: one for both, or a pair (policy's, reference's).
        process_group: both vocabularies are cut over its ranks, see `linear_logps`; js gathers twice a tile.
        backend: "triton" or "reference"; None chooses by device. schedule: see `Schedule`.

    Returns:
        KLStats, fp32 (float64 for float64); gradients flow through kl, logps and entropy.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, by name.
    """
    checks.floating("hidden", hidden)
    if hidden.ndim < 1:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected [..., H]")
    with_labels = labels is not None
    hidden, weight, bias, shards = placed(hidden, weight, bias, process_group)
    counted = counted_labels(labels, mask, hidden, "hidden", ignore_index)
    check_operands(hidden, weight, counted, bias, shards)
    ref_hidden = checks.floating("ref_hidden", ref_hidden).detach()
    ref_weight = checks.floating("ref_weight", ref_weight).detach()
    ref_bias = None if ref_bias is None else checks.floating("ref_bias", ref_bias).detach()
    ref_hidden, ref_weight, ref_bias, ref_shards = placed(ref_hidden, ref_weight, ref_bias, process_group, "ref_weight")
    if shards[:2] != ref_shards[:2]:
        got, expected = ref_shards.sizes or "the whole vocabulary", shards.sizes or "the whole vocabulary"
        raise ValueError(f"ref_weight: its ranks hold {got}, expected {expected}, as the policy's head; cut both alike")
    checks.same_device("ref_hidden", ref_hidden, hidden.device)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        got, expected = tuple(ref_hidden.shape), tuple(hidden.shape[:-1])
        raise ValueError(f"ref_hidden: got shape {got}, expected {(*expected, 'H')}, as many tokens as hidden's")
    _check_reference(ref_hidden, ref_weight, counted, ref_bias, weight)
    schedule, sides, kind = (
        Schedule.of(schedule),
        scalings(temperature, logit_scale, softcap),
        direction_of(direction, js_weight),
    )
    head = make_head((hidden, weight, bias), 1, ignore_index, sides[0], backend, schedule, shards)
    ref_dtype = compute_dtype(ref_hidden, ref_weight)
    other = Other(*sides[1], ref_dtype, schedule.logits_dtype_for(ref_dtype), *kind, with_labels)
    flat, rows, excess, compact = counted.reshape(-1), None, None, schedule.compact
    if schedule.num_scored is not None:
        rows, excess, compact = *bounded_rows(flat, ignore_index, schedule.num_scored), False
    elif compact and checks.has_values(flat) and not transforms_active():  # no shape may depend on the labels
        rows, compact = scored_rows(flat, ignore_index), False
    n_rows = flat.numel()  # given, since -1 is ambiguous for a width of 0
    tensors = (
        hidden.reshape(n_rows, hidden.shape[-1]), weight, bias, ref_hidden.reshape(n_rows, ref_hidden.shape[-1]),
    )  # fmt: skip
    results = _compare(*tensors, ref_weight, ref_bias, flat, rows, *head, *other, compact, schedule.skip_zero_rows)[:4]
    if excess is not None:
        results = [value + excess for value in results]
    stats = kl_stats(tuple(results), counted.shape, with_labels)
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
            raise ValueError(f"ref_bias: got shape {tuple(bias.shape)}, expected {expected[:1]}, the vocabulary")
