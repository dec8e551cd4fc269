"""`linear_logps`: log-probs of labels from hidden states and the head, without the [N, V] logits.

The ops around the schedules of head.py: what the forward keeps for the backward is decided here, by what requires grad.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, overload

import torch
from torch import Tensor

from fused_po import checks
from fused_po.ops import backend as backends
from fused_po.ops.autograd import custom_op, differentiable, direct, public, transforms_active
from fused_po.ops.head import Head, Saved, forward, scored_rows
from fused_po.ops.head_backward import backward, empty_gradients
from fused_po.ops.logps import (
    TokenStats,
    dense,
    fake_stats,
    fake_with_entropy,
    output_bits,
    requested,
    token_stats,
    with_entropy,
    without_entropy,
)
from fused_po.parallel import WHOLE, ProcessGroupLike, Shards, placed
from fused_po.schedule import Schedule, logits_budget

if TYPE_CHECKING:
    from fused_po.ops.logps import EntropyStats, LogpsEntropy, LogpsFirst, LogpsStats


@custom_op("fused_po::linear_logps_fwd", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], low: Optional[Tensor], labels: Tensor,
    rows: Optional[Tensor], outer: float, inner: Optional[float], ignore_index: int, outputs: int,
    compute_dtype: torch.dtype, logits_dtype: torch.dtype, tile_bytes: int, budget: int, keep: str, backend: str,
    group: str, sizes: list[int], partial: bool, compact: bool, skip_zero_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    how = outer, inner, ignore_index, outputs, compute_dtype, logits_dtype, tile_bytes, budget, keep, backend
    head = Head(*how, group, sizes, partial)
    checks.label_range(labels, head.shards.n_cols(weight.shape[0]), ignore_index)
    n_room = labels.numel() if rows is None else rows.numel()
    rows = scored_rows(labels, ignore_index) if compact else rows
    *results, saved, kept = forward(head, hidden, weight, bias, labels, rows, n_room, low)
    return *results, with_entropy(saved, results, outputs), kept


@_forward.register_fake
def _(hidden, weight, bias, low, labels, rows, *how):
    head = Head(*how[:-2])
    results = fake_stats(hidden.new_empty(0, dtype=head.logits_dtype), labels.numel(), head.outputs)
    results = fake_with_entropy(results, head.outputs)
    return *results, head.empty_kept(hidden, labels.numel() if rows is None else rows.numel(), weight)


@custom_op("fused_po::linear_logps_bwd", mutates_args=())
def _backward(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], low: Optional[Tensor], labels: Tensor,
    rows: Optional[Tensor], stats: Tensor, entropy: Tensor, kept: Tensor, g_logps: Optional[Tensor],
    g_entropy: Optional[Tensor], g_lse: Optional[Tensor], outer: float, inner: Optional[float], ignore_index: int,
    outputs: int, compute_dtype: torch.dtype, logits_dtype: torch.dtype, tile_bytes: int, budget: int, keep: str,
    backend: str, group: str, sizes: list[int], partial: bool, compact: bool, skip_zero_rows: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    how = outer, inner, ignore_index, outputs, compute_dtype, logits_dtype, tile_bytes, budget, keep, backend
    head = Head(*how, group, sizes, partial)
    rows = scored_rows(labels, ignore_index) if compact else rows
    tensors = Saved(hidden, weight, bias, labels, rows, stats, entropy, kept, low)
    grads = (dense(g) for g in (g_logps, g_entropy, g_lse))
    return backward(head, tensors, *grads, needs, skip_zero_rows)


@_backward.register_fake
def _(hidden, weight, bias, low, *others):
    return empty_gradients((hidden, weight, bias, low), others[-1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output[4:])
    ctx.how = inputs[6:]
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_logps, g_entropy, g_lse, *g_others):
    given = requested((g_logps, g_entropy, g_lse), ctx.how[3])
    if all(g is None for g in given):
        return (None,) * (6 + len(ctx.how))
    needs = [bool(need) for need in ctx.needs_input_grad[:4]]
    *tensors, saved, kept = ctx.saved_tensors
    stats, entropy = without_entropy(saved, ctx.how[3])
    grads = _gradients(*tensors, stats, entropy, kept, *given, *ctx.how, needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), *(None,) * (2 + len(ctx.how))


_gradients = direct(_backward)
_score = differentiable(_forward, _autograd, _setup_context)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype autocast would give the projection, or hidden's: a head of lower precision is cast to it in blocks."""
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if weight.dtype != hidden.dtype and torch.promote_types(hidden.dtype, weight.dtype) != hidden.dtype:
        raise TypeError(
            f"weight: got dtype {weight.dtype}, expected {hidden.dtype}, hidden's, or a lower precision; cast one of "
            "them, or run under torch.autocast"
        )
    return hidden.dtype


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
    """Log-probs of labels, and other statistics, from hidden states and the LM head; the logits exist a tile at a time.

    raw = hidden @ weight.T + bias; the softmax is over z = softcap * tanh(raw * logit_scale / softcap) / temperature,
    or without the softcap z = raw * logit_scale / temperature. Under torch.autocast the head is cast block by block.
    With equal weights, labels and schedule two calls give bitwise equal results, whatever requires gradients.
    In another batch a token's may differ in the last bits: GEMMs, and rows that a GPU splits, sum in another order.

    Args:
        hidden: [..., H], the input of the head, of the head's dtype or wider (or under autocast).
        weight: [V, H], the head. bias: [V], of any floating dtype.
        labels: [...], integers in [0, V) or ignore_index, aligned with hidden: see `shift_labels`. On a GPU they are
            checked under FUSED_PO_DEBUG=1 only.
        temperature, logit_scale, softcap: finite and > 0.
        ignore_index: label of positions that cost nothing and give exactly 0.
        outputs: names of TokenStats' fields.
        low_rank: (u [..., r], low [V, r]) adds u @ low.T to raw: LoRA on the head, with u = scaling * hidden @ A.T and
            low = B, without the merged head. Of hidden's dtype; gradients flow to both. Costs r / H of each GEMM.
        process_group: the vocabulary is cut over its ranks (Megatron's tensor parallelism): weight, bias and low_rank's
            low are this rank's rows, rank 0's first; hidden and labels are the same on all. A torch.distributed
            ProcessGroup for rows in equal number, else `VocabParallel`. Every rank gets all results, bitwise equal, and
            the whole gradient of hidden. A DTensor weight with Shard(0) needs none.
        backend: "triton" or "reference"; None chooses by device. See `backends`.
        schedule: how to compute it, see `Schedule`.

    Returns:
        TokenStats, fp32 (float64 for float64); gradients flow through logps, entropy and lse.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, by name.
    """
    hidden, weight, bias, shards = placed(hidden, weight, bias, process_group)
    labels = check_operands(hidden, weight, labels, bias, shards)
    schedule = Schedule.of(schedule)
    checks.whole("ignore_index", ignore_index)
    bits, low = output_bits(outputs), None
    if low_rank is not None:
        u, low = check_low_rank(low_rank, hidden, weight)
        hidden = torch.cat((hidden, u), -1)
    head = make_head(
        (hidden, weight, bias, low),
        bits,
        ignore_index,
        checks.scaling(temperature, logit_scale, softcap),
        backend,
        schedule,
        shards,
    )
    flat, rows, compact = labels.reshape(-1), None, schedule.compact
    excess = None
    if schedule.num_scored is not None:
        rows, excess, compact = *bounded_rows(flat, ignore_index, schedule.num_scored), False
    elif compact and checks.has_values(flat) and not transforms_active():  # no shape may depend on the labels
        rows, compact = scored_rows(flat, ignore_index), False
    states = hidden.reshape(flat.numel(), hidden.shape[-1])
    results = _score(states, weight, bias, low, flat, rows, *head, compact, schedule.skip_zero_rows)
    if excess is not None:
        results = [value + excess for value in results]
    stats = token_stats(tuple(results[:4]), bits, labels.shape)
    if stats.entropy is not None and not schedule.entropy_grad:
        stats = stats._replace(entropy=stats.entropy.detach())
    return stats


def check_operands(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Optional[Tensor], shards: Shards = WHOLE
) -> Tensor:
    """The labels as int64, once all shapes, dtypes and devices fit."""
    checks.floating("hidden", hidden)
    checks.floating("weight", weight)
    empty = weight.ndim == 2 and shards.n_cols(weight.shape[0]) == 0
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or empty:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected [V, H] with V >= 1 and H = {hidden.shape[-1:]} of "
            f"hidden {tuple(hidden.shape)}"
        )
    checks.same_device("weight", weight, hidden.device)
    if bias is not None:
        checks.same_device("bias", checks.floating("bias", bias), hidden.device)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},), the vocabulary")
    why = "hidden's shape without its width"
    return checks.integer("labels", labels, hidden.shape[:-1], hidden.device, why)


def check_low_rank(low_rank: tuple[Tensor, Tensor], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(u, low) once they fit hidden [..., H] and weight [V, H]."""
    if not isinstance(low_rank, tuple) or len(low_rank) != 2:
        raise TypeError(f"low_rank: got {type(low_rank).__name__}, expected a tuple (u [..., r], low [V, r])")
    u, low = (checks.floating("low_rank", v) for v in low_rank)
    rank = low.shape[-1] if low.ndim else 0
    if rank < 1 or u.shape != (*hidden.shape[:-1], rank) or low.shape != (weight.shape[0], rank):
        raise ValueError(
            f"low_rank: got shapes {tuple(u.shape)} and {tuple(low.shape)}, expected {(*hidden.shape[:-1], 'r')} and "
            f"{(weight.shape[0], 'r')} with r >= 1"
        )
    for v in (u, low):
        checks.same_device("low_rank", v, hidden.device)
        if v.dtype != hidden.dtype:
            raise TypeError(f"low_rank: got dtype {v.dtype}, expected {hidden.dtype}, hidden's; cast it")
    return u, low


def make_head(
    operands: tuple, bits: int, ignore_index: int, scaling: tuple, backend, schedule: Schedule,
    shards: Shards = WHOLE,
) -> Head:  # fmt: skip
    """How to compute the projection of `operands` (hidden, weight, ...), and what to keep of it for its backward."""
    hidden, weight, *_ = operands
    dtype, device = compute_dtype(hidden, weight), hidden.device
    logits_dtype = schedule.logits_dtype_for(dtype)
    keep, budget = "nothing", 0
    trained = [v is not None and v.requires_grad for v in operands]
    if True in trained and torch.is_grad_enabled():
        entropy = bool(bits & 2) and schedule.entropy_grad
        frozen = True not in trained[1:]
        keep = "product" if frozen and not entropy else "basis"
        budget = logits_budget(schedule.logits_budget, device)
        bits |= 1  # the basis gives a gradient of entropy or lse with the log-prob beside it
    tile_bytes = max(1, schedule.tile_bytes_on(device) // (2 if shards.group else 1))  # two tiles are in flight
    name = backends.resolve(backend, device, logits_dtype)
    return Head(*scaling, ignore_index, bits, dtype, logits_dtype, tile_bytes, budget, keep, name, *shards)


def bounded_rows(labels: Tensor, ignore_index: int, bound: int) -> tuple[Tensor, Tensor]:
    """(numbers [bound] of the scored rows, filled up with an ignored one; NaN if there are more of them, else 0)."""
    if bound > labels.numel():
        raise ValueError(f"num_scored: got {bound}, allowed are 0 to {labels.numel()}, the number of labels")
    scored = labels != ignore_index
    count = scored.sum()
    if checks.looked_at(labels) and count > bound:
        raise ValueError(f"num_scored: got {bound}, but {int(count)} labels are not ignore_index={ignore_index}")
    rows = torch.nonzero_static(scored, size=bound, fill_value=-1).squeeze(1)
    if bound:  # no labels, no argmin
        rows = torch.where(rows < 0, scored.int().argmin(), rows)
    return rows, torch.where(count > bound, torch.nan, 0.0)
