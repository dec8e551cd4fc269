"""`linear_logps`: log-probs of labels from hidden states and the LM head, computed in tiles.

It defines the ops that use forward.py and backward.py. What the forward keeps depends on which inputs require grad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional, overload

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend.interface import Grads, RowStats, Scaling
from fused_po.lm_head.backward import Backward, Gradients
from fused_po.lm_head.forward import Forward
from fused_po.lm_head.gemm import operand
from fused_po.lm_head.head import Head, Operands, empty_kept, make_head, used_bases, without_autocast, zero_unused
from fused_po.lm_head.logp_tiles import Incoming, LogpBackward, LogpForward
from fused_po.lm_head.plan import BASIS, NOTHING, PRODUCT, Needs
from fused_po.lm_head.scored import Dropping, LiveRows, ScoredTokens, scatter_rows, scored_rows
from fused_po.ops.autograd import public
from fused_po.ops.outputs import (
    TokenStats,
    empty_stats,
    outputs_of,
    token_stats,
    with_entropy,
    without_entropy,
)
from fused_po.ops.register import custom_op, differentiable
from fused_po.parallel.vocab import WHOLE, ProcessGroupLike, Shards, local_head
from fused_po.schedule import Schedule

if TYPE_CHECKING:
    from fused_po.ops.outputs import EntropyStats, LogpsEntropy, LogpsFirst, LogpsStats


class Results(NamedTuple):
    """What the op returns: RowStats, with the entropy as one more row of `saved` if it is an output, and `kept`."""

    logps: Tensor
    entropy: Tensor
    lse: Tensor
    aux: Tensor
    saved: Tensor
    kept: Tensor


class Saved(NamedTuple):
    """What the forward saves for the backward, in addition to the operands."""

    labels: Tensor  # [N]
    rows: Optional[Tensor]  # [n] indices of the scored tokens, None for all
    saved_rows: Tensor  # [SavedRow.COUNT, N]
    entropy: Optional[Tensor]  # [N]
    kept: Tensor


@without_autocast
def forward(
    head: Head, operands: Operands, labels: Tensor, rows: Optional[Tensor], n_kept: int
) -> tuple[RowStats, Tensor]:
    """(statistics of all labels [N], what is kept). rows [n]: indices of the scored tokens, None for all.

    n_kept: the number of tokens to allocate in what is kept, at least n.
    """
    plan, weight, n_all = head.plan(labels.device), operands.weight, labels.numel()
    widest = head.shards.widest(weight.shape[0])
    kept = empty_kept(plan, operands.hidden, weight, n_kept, widest)
    n_scored = n_all if rows is None else rows.numel()
    if plan.keep != NOTHING:
        zero_unused(plan, kept, n_scored, weight.shape[0], rows is None)
    operands = operands.ready(rows, plan.dtypes.compute, plan.gemm)
    tiles = LogpForward(head, plan, operands, labels if rows is None else labels[rows])
    run = Forward(plan, tiles, operands, rows, kept, n_all, bool(head.shards.group))
    return run.run(plan.tile_rows(widest)), kept


@without_autocast
def backward(
    head: Head,
    operands: Operands,
    saved: Saved,
    grads: Grads,
    needs: Needs,
    skip_zero_rows: bool,
    sums: Optional[Sequence[Tensor]] = None,
) -> Gradients:
    """Gradients of the operands; sums: add those of weight and bias to these instead; nothing reads low's then."""
    hidden, rows, plan = operands.hidden, saved.rows, head.plan(saved.labels.device)
    entropy = None if grads.entropy is None else saved.entropy
    incoming = Incoming(saved.labels, saved.saved_rows, entropy, grads)
    from_kept = head.scaling.inner is None or grads.only_logps  # the softcap's slope does not come back from the basis
    if head.keep == PRODUCT and from_kept:
        grad = head.shards.sum_of_rows(product_gradient(head, operands, incoming, saved.kept[0]), rows)
        return Gradients.empty(operands, Needs(False, False, False), grad.to(hidden.dtype))
    incoming = incoming.at(rows)
    live = incoming.live(head.ignore_index)
    n_rows, n_room = live.numel(), saved.kept.shape[1] if head.keep == BASIS and from_kept else 0
    bases = used_bases(saved.kept, min(n_rows, n_room), operands.weight.shape[0])
    if skip_zero_rows or hidden.device.type == "cpu":
        chosen = LiveRows.of(live, rows, bases.shape[1])
        incoming = incoming.at(chosen.index)
    else:
        chosen = LiveRows(rows, None, bases.shape[1])
        incoming = incoming.masked(live, head.ignore_index)
    ready = operands.ready(chosen.rows, plan.dtypes.compute, plan.gemm)
    wide = hidden.new_empty(ready.hidden.shape if needs.hidden else 0, dtype=plan.dtypes.sums)
    out = Gradients.empty(operands, needs, wide) if sums is None else Gradients(wide, *sums, low=sums[0])
    # The tiles are not bound to a variable, so that their memory is free when hidden's gradient is scattered.
    kept, add = chosen.kept(bases), sums is not None
    Backward(plan, head.shards, LogpBackward(head, plan, ready, incoming, kept), ready, out, needs, add).run()
    return Gradients(scatter_rows(wide, chosen.rows, hidden) if needs.hidden else wide.to(hidden.dtype), *out[1:])


def product_gradient(head: Head, operands: Operands, incoming: Incoming, product: Tensor) -> Tensor:
    """This rank's part of the gradient of hidden, without a GEMM, from product = basis @ weight."""
    weight, grads = operands.weight, incoming.grads
    valid = incoming.labels != head.ignore_index
    g_logps, g_lse = (None if g is None else torch.where(valid, g, 0) for g in (grads.logps, grads.lse))
    g = g_logps if g_lse is None else -g_lse if g_logps is None else g_logps - g_lse
    grad = product * g[:, None]
    if g_lse is not None:
        labels = incoming.labels - head.shards.start()
        here = valid & (labels >= 0) & (labels < len(weight))
        labels, g = torch.where(here, labels, 0), torch.where(here, head.scaling.outer * g_lse, 0)
        if len(weight):
            parts = [w[labels] for w in (weight, operands.low) if w is not None]
            label_rows = [operand(part, head.dtypes.compute, operands.hidden.dtype) for part in parts]
            grad += g[:, None] * torch.cat(label_rows, 1)
    return grad


@custom_op("fused_po::linear_logps_fwd")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    low: Optional[Tensor],
    labels: Tensor,
    rows: Optional[Tensor],
    head: Head,
    dropping: Dropping,
) -> Results:
    checks.label_range(labels, head.shards.n_cols(weight.shape[0]), head.ignore_index)
    n_kept = labels.numel() if rows is None else rows.numel()
    rows = scored_rows(labels, head.ignore_index) if dropping.ignored else rows
    stats, kept = forward(head, Operands(hidden, weight, bias, low), labels, rows, n_kept)
    return Results(*with_entropy(stats, head.outputs), kept)


@_forward.register_fake
def _(hidden, weight, bias, low, labels, rows, head, dropping):
    stats = empty_stats(hidden.new_empty(0, dtype=head.dtypes.logits), labels.numel(), head.outputs)
    n_kept = labels.numel() if rows is None else rows.numel()
    kept = empty_kept(head.plan(hidden.device), hidden, weight, n_kept, head.shards.widest(weight.shape[0]))
    return Results(*with_entropy(stats, head.outputs), kept)


@custom_op("fused_po::linear_logps_bwd")
def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    low: Optional[Tensor],
    labels: Tensor,
    rows: Optional[Tensor],
    stats: Tensor,
    entropy: Tensor,
    kept: Tensor,
    g_logps: Optional[Tensor],
    g_entropy: Optional[Tensor],
    g_lse: Optional[Tensor],
    head: Head,
    dropping: Dropping,
    needs: Needs,
) -> Gradients:
    rows = scored_rows(labels, head.ignore_index) if dropping.ignored else rows
    saved, grads = Saved(labels, rows, stats, entropy, kept), Grads(g_logps, g_entropy, g_lse).contiguous()
    return backward(head, Operands(hidden, weight, bias, low), saved, grads, needs, dropping.zero_gradients)


@_backward.register_fake
def _(hidden, weight, bias, low, *others):
    return Gradients.fake(Operands(hidden, weight, bias, low), others[-1])


def _setup_context(ctx, inputs, results):
    *tensors, ctx.head, ctx.dropping = inputs
    ctx.save_for_backward(*tensors, results.saved, results.kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_logps, g_entropy, g_lse, *g_others):
    grads = Grads(g_logps, g_entropy, g_lse).requested(ctx.head.outputs)
    if grads.absent:
        return ()
    needs = Needs(*map(bool, ctx.needs_input_grad[:4]))
    *tensors, saved, kept = ctx.saved_tensors
    stats, entropy = without_entropy(saved, ctx.head.outputs)
    found = _backward(*tensors, stats, entropy, kept, *grads, ctx.head, ctx.dropping, needs)
    return tuple(grad if need else None for grad, need in zip(found, needs))


_score = differentiable(_forward, _autograd, _setup_context)


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional[Tensor] = ...,
    *,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: Optional[float] = ...,
    ignore_index: int = ...,
    outputs: LogpsEntropy,
    low_rank: Optional[tuple[Tensor, Tensor]] = ...,
    process_group: ProcessGroupLike = ...,
    backend: Optional[str] = ...,
    schedule: Optional[Schedule] = ...,
) -> EntropyStats: ...


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional[Tensor] = ...,
    *,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: Optional[float] = ...,
    ignore_index: int = ...,
    outputs: LogpsFirst = ...,
    low_rank: Optional[tuple[Tensor, Tensor]] = ...,
    process_group: ProcessGroupLike = ...,
    backend: Optional[str] = ...,
    schedule: Optional[Schedule] = ...,
) -> LogpsStats: ...


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional[Tensor] = ...,
    *,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: Optional[float] = ...,
    ignore_index: int = ...,
    outputs: tuple[str, ...],
    low_rank: Optional[tuple[Tensor, Tensor]] = ...,
    process_group: ProcessGroupLike = ...,
    backend: Optional[str] = ...,
    schedule: Optional[Schedule] = ...,
) -> TokenStats: ...


@public
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional[Tensor] = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logps",),
    low_rank: Optional[tuple[Tensor, Tensor]] = None,
    process_group: ProcessGroupLike = None,
    backend: Optional[str] = None,
    schedule: Optional[Schedule] = None,
) -> TokenStats:
    """Log-probs of labels, and other statistics, from hidden states and the LM head. Logits are computed in tiles.

    raw = hidden @ weight.T + bias; the softmax is over z = softcap * tanh(raw * logit_scale / softcap) / temperature,
    or without a softcap over z = raw * logit_scale / temperature. Under torch.autocast the head is cast in blocks.

    Memory: with a frozen head, without gradients, and for tokens beyond the budget, no [tokens, V] matrix exists. With
    a trainable head, each token within `Schedule.logits_budget` keeps a row of V numbers for the backward, which saves
    one GEMM. Schedule(logits_budget=0) keeps none.

    Two calls with equal weights, labels and schedule give bitwise equal results, whichever inputs require gradients. In
    another batch, the result for a token may differ in the last bits, because GEMMs, and rows that a GPU splits, sum in
    another order.

    Args:
        hidden: [..., H], the input of the head. Its dtype must be that of the head or wider, unless under autocast.
        weight: [V, H], the head. bias: [V], of any floating dtype.
        labels: [...], integers in [0, V) or ignore_index, aligned with hidden: see `shift_labels`. On a GPU the range
            is checked only with FUSED_PO_DEBUG=1.
        temperature, logit_scale, softcap: finite and > 0.
        ignore_index: the label of positions that are not computed and give exactly 0.
        outputs: the fields of TokenStats to compute.
        low_rank: (u [..., r], low [V, r]) adds u @ low.T to raw. This is LoRA on the head without a merged weight, with
            u = scaling * hidden @ A.T and low = B. Both have the dtype of hidden and get gradients. It adds r / H to
            the cost of each GEMM.
        process_group: the ranks over which the vocabulary is sharded (Megatron's tensor parallelism). weight, bias and
            low_rank's low are the rows of this rank, in rank order; hidden and labels are the same on all ranks. Pass a
            torch.distributed ProcessGroup if all ranks have the same number of rows, else a `VocabParallel`. Every rank
            gets the same results, bitwise, and the full gradient of hidden. Not needed with a DTensor weight
            (Shard(0)).
        backend: "triton", "cuda" (only log-probs, entropy and lse, and no softcap) or "reference"; None selects one by
            device. See `backends`.
        schedule: how to use memory and compute, see `Schedule`.

    Returns:
        TokenStats, fp32 (float64 for float64); gradients flow through logps, entropy and lse.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, by name.
    """
    hidden, weight, bias, shards = local_head(hidden, weight, bias, process_group)
    labels = check_operands(hidden, weight, labels, bias, shards)
    schedule = Schedule.of(schedule)
    checks.whole_number("ignore_index", ignore_index)
    asked, low = outputs_of(outputs), None
    if low_rank is not None:
        u, low = check_low_rank(low_rank, hidden, weight)
        hidden = torch.cat((hidden, u), -1)
    scaling, operands = Scaling(*checks.scaling(temperature, logit_scale, softcap)), (hidden, weight, bias, low)
    head = make_head(Operands(*operands), asked, ignore_index, scaling, backend, schedule, shards)
    flat = labels.reshape(-1)
    tokens = ScoredTokens.of(flat, ignore_index, schedule)
    states = hidden.reshape(flat.numel(), hidden.shape[-1])
    dropping = Dropping(tokens.find, schedule.skip_zero_rows)
    results = _score(states, weight, bias, low, flat, tokens.rows, head, dropping)
    stats = token_stats(tokens.checked(results), asked, labels.shape)
    if stats.entropy is not None and not schedule.entropy_grad:
        stats = stats._replace(entropy=stats.entropy.detach())
    return stats


def check_operands(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Optional[Tensor], shards: Shards = WHOLE
) -> Tensor:
    """Check shapes, dtypes and devices, and return the labels as int64."""
    checks.floating("hidden", hidden)
    checks.floating("weight", weight)
    empty = weight.ndim == 2 and shards.n_cols(weight.shape[0]) == 0
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or empty:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected [V, H] with V >= 1 and the H of hidden "
            f"{tuple(hidden.shape)}"
        )
    checks.same_device("weight", weight, hidden.device)
    if bias is not None:
        checks.same_device("bias", checks.floating("bias", bias), hidden.device)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},), the vocabulary size")
    why = "the shape of hidden without its last dimension"
    return checks.integer("labels", labels, hidden.shape[:-1], hidden.device, why)


def check_low_rank(low_rank: tuple[Tensor, Tensor], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Check (u, low) against hidden [..., H] and weight [V, H], and return them."""
    if not isinstance(low_rank, tuple) or len(low_rank) != 2:
        raise TypeError(f"low_rank: got {type(low_rank).__name__}, expected a tuple (u [..., r], low [V, r])")
    u, low = (checks.floating("low_rank", v) for v in low_rank)
    rank = low.shape[-1] if low.ndim else 0
    if rank < 1 or u.shape != (*hidden.shape[:-1], rank) or low.shape != (weight.shape[0], rank):
        raise ValueError(
            f"low_rank: got shapes {tuple(u.shape)} and {tuple(low.shape)}, expected "
            f"[{', '.join(map(str, hidden.shape[:-1]))}, r] and [{weight.shape[0]}, r] with r >= 1"
        )
    for v in (u, low):
        checks.same_device("low_rank", v, hidden.device)
        if v.dtype != hidden.dtype:
            raise TypeError(f"low_rank: got dtype {v.dtype}, expected {hidden.dtype}, the dtype of hidden; cast it")
    return u, low
