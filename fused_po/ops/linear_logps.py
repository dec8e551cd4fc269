"""`linear_logps`: log-probs of labels from hidden states and the head, without the [N, V] logits.

The forward walks tiles of rows: one GEMM writes a tile's logits, one pass reads them. The backward projects again,
turns a tile into the gradient of its raw logits, and two GEMMs use that up. It walks tiles of rows too, with the tile's
own statistics: another GEMM shape rounds another way, and only the lse of the very logits at hand makes p sum to 1.
For a trainable head in low precision, whose gradient must not be summed in its own dtype, it walks blocks of the
vocabulary outside and rows inside: that needs fp32 room for one block alone, and the rounding of p hides the lse's.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.ops import backend as backends
from fused_po.ops.gemm import gemm_dtype, head_block, head_slices, mm, operand, project
from fused_po.ops.logps import (
    TokenStats,
    dense,
    fake_stats,
    output_bits,
    refuse_second_derivative,
    requested,
    token_stats,
)
from fused_po.reference import stats_dtype
from fused_po.schedule import Schedule


def scored_rows(wanted: Tensor, compact: bool) -> Optional[Tensor]:
    """Numbers of the wanted rows, by the one host sync of `linear_logps`; None for all rows."""
    if not compact:
        return None
    rows = wanted.nonzero().squeeze(1)
    return None if rows.numel() == wanted.numel() else rows


@torch.library.custom_op("fused_po::linear_logps_fwd", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, outer: float, inner: Optional[float],
    ignore_index: int, outputs: int, compute_dtype: torch.dtype, logits_dtype: torch.dtype, tile_bytes: int,
    compact: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n_cols, width = weight.shape
    checks.label_range(labels, n_cols, ignore_index)
    statistics = backends.get(backend).statistics
    results = fake_stats(hidden.new_empty(0, dtype=logits_dtype), labels.numel(), outputs)
    for result in results:
        result.zero_()
    results[4][1] = torch.inf
    rows = scored_rows(labels != ignore_index, compact)
    if rows is not None:
        hidden, labels = hidden[rows], labels[rows]
    hidden = operand(hidden, compute_dtype, gemm_dtype(hidden.device, compute_dtype, logits_dtype))
    n_rows = labels.numel()
    step = max(1, tile_bytes // (n_cols * logits_dtype.itemsize))
    block = head_block(n_rows, n_cols, width, tile_bytes)
    tile = hidden.new_empty(min(step, n_rows), n_cols, dtype=logits_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, n_rows, step):
            some = slice(begin, min(begin + step, n_rows))
            logits = tile[: some.stop - begin]
            project(hidden[some], weight, bias, compute_dtype, logits, block)
            stats = statistics(logits[None], labels[some], outer, inner, ignore_index, outputs)
            where = some if rows is None else rows[some]
            for result, value in zip(results, stats):
                if result.numel():
                    result[..., where] = value
    return results


@_forward.register_fake
def _(hidden, weight, bias, labels, outer, inner, ignore_index, outputs, compute_dtype, logits_dtype, *how):
    return fake_stats(hidden.new_empty(0, dtype=logits_dtype), labels.numel(), outputs)


class _Rows(NamedTuple):
    """What the gradient pass needs of each row."""

    labels: Tensor  # [N]
    saved: Tensor  # [2, N]
    entropy: Optional[Tensor]  # [N], as the three below, or None
    g_logps: Optional[Tensor]
    g_entropy: Optional[Tensor]
    g_lse: Optional[Tensor]

    def at(self, index: slice | Tensor) -> _Rows:
        """Some of the rows."""
        return _Rows(*(None if v is None else v[..., index].contiguous() for v in self))


class _Backward(NamedTuple):
    """One backward: its operands, where the gradients go, and how the logits come about."""

    hidden: Tensor  # [N, H], the scored rows, in the GEMMs' dtype
    weight: Tensor
    bias: Optional[Tensor]
    grads: tuple[Tensor, Tensor, Tensor]  # of hidden (unused), weight, bias; no elements where not needed
    needs: list[bool]
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    tile_bytes: int

    def buffers(self, elements: int) -> tuple[Tensor, Tensor]:
        """Room for a tile of logits and for its gradient in the GEMMs' dtype, the same where the dtypes are."""
        tile = self.hidden.new_empty(elements, dtype=self.logits_dtype)
        return tile, tile if self.hidden.dtype == self.logits_dtype else self.hidden.new_empty(elements)

    def by_rows(self, rows: _Rows, statistics, gradient) -> Tensor:
        """Fill the gradients of head and bias, return hidden's [N, H] unrounded. The head's is its own accumulator."""
        (n_rows, width), n_cols, sums = self.hidden.shape, self.weight.shape[0], stats_dtype(self.logits_dtype)
        need_hidden, need_weight, need_bias = self.needs
        step = max(1, min(n_rows, self.tile_bytes // (n_cols * self.logits_dtype.itemsize)))
        block = head_block(n_rows, n_cols, width, self.tile_bytes)
        tile, basis = (buffer.view(step, n_cols) for buffer in self.buffers(step * n_cols))
        sum_hidden = self.hidden.new_empty(n_rows if need_hidden else 0, width, dtype=sums)
        sum_bias = self.hidden.new_zeros(n_cols if need_bias else 0, dtype=sums)
        if n_rows == 0:
            self.grads[1].zero_()
        for begin in range(0, n_rows, step):
            some = slice(begin, min(begin + step, n_rows))
            h, logits, d = self.hidden[some], tile[: some.stop - begin], basis[: some.stop - begin]
            project(h, self.weight, self.bias, self.compute_dtype, logits, block)
            part = rows.at(some)
            saved, entropy = statistics(logits[None], part.labels, part.g_entropy is not None)
            gradient(logits[None], *part._replace(saved=saved, entropy=entropy), out=d[None], first_col=0)
            for columns in head_slices(self.weight, self.compute_dtype, h.dtype, block) if need_hidden else ():
                head = operand(self.weight[columns], self.compute_dtype, h.dtype)
                mm(d[:, columns], head, sum_hidden[some], add=columns.start > 0)
            if need_weight:
                mm(d.t(), h, self.grads[1], add=begin > 0)
            if need_bias:
                sum_bias += d.sum(0, dtype=sums)
        if need_bias:
            self.grads[2].copy_(sum_bias)
        return sum_hidden

    def by_vocabulary(self, rows: _Rows, gradient) -> Tensor:
        """The same with fp32 room for the gradient of one block of the head, rounded once."""
        (n_rows, width), n_cols, sums = self.hidden.shape, self.weight.shape[0], stats_dtype(self.logits_dtype)
        need_hidden, _, need_bias = self.needs
        block = head_block(n_rows, n_cols, width, self.tile_bytes)
        step = max(1, min(n_rows, self.tile_bytes // (block * self.logits_dtype.itemsize)))
        tile, basis = self.buffers(step * block)
        sum_hidden = self.hidden.new_zeros(n_rows if need_hidden else 0, width, dtype=sums)
        for first in range(0, n_cols, block):
            columns = slice(first, min(first + block, n_cols))
            count = columns.stop - first
            head = operand(self.weight[columns], self.compute_dtype, self.hidden.dtype)
            bias = None if self.bias is None else self.bias[columns]
            sum_weight = self.hidden.new_zeros(count, width, dtype=sums)
            sum_bias = self.hidden.new_zeros(count if need_bias else 0, dtype=sums)
            for begin in range(0, n_rows, step):
                some = slice(begin, min(begin + step, n_rows))
                h = self.hidden[some]
                logits, d = (buffer[: len(h) * count].view(len(h), count) for buffer in (tile, basis))
                project(h, head, bias, h.dtype, logits, count)
                gradient(logits[None], *rows.at(some), out=d[None], first_col=first)
                if need_hidden:
                    mm(d, head, sum_hidden[some], add=True)
                mm(d.t(), h, sum_weight, add=True)
                if need_bias:
                    sum_bias += d.sum(0, dtype=sums)
            self.grads[1][columns] = sum_weight
            if need_bias:
                self.grads[2][columns] = sum_bias
        return sum_hidden


@torch.library.custom_op("fused_po::linear_logps_bwd", mutates_args=())
def _backward(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, saved: Tensor, entropy: Tensor,
    g_logps: Optional[Tensor], g_entropy: Optional[Tensor], g_lse: Optional[Tensor], outer: float,
    inner: Optional[float], ignore_index: int, compute_dtype: torch.dtype, logits_dtype: torch.dtype, tile_bytes: int,
    compact: bool, backend: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = [dense(g) for g in (g_logps, g_entropy, g_lse)]
    wanted = labels != ignore_index
    if labels.device.type == "cpu":  # where it costs no sync, rows without an incoming gradient drop out too
        wanted &= torch.stack([g != 0 for g in given if g is not None]).any(0)
    index = scored_rows(wanted, compact)
    rows = _Rows(labels, saved, None if g_entropy is None else entropy, *given)
    grads = tuple(_empty_gradient(v, need) for v, need in zip((hidden, weight, bias), needs))
    h = hidden if index is None else hidden[index]
    h = operand(h, compute_dtype, gemm_dtype(h.device, compute_dtype, logits_dtype))
    rows = rows if index is None else rows.at(index)

    kernels = backends.get(backend)

    def statistics(logits, labels, want_entropy):
        results = kernels.statistics(logits, labels, outer, inner, ignore_index, 2 * want_entropy)
        return results[4], results[1]

    def gradient(logits, labels, saved, entropy, g_logps, g_entropy, g_lse, out, first_col):
        grads = (g_logps, g_entropy, g_lse)
        kernels.gradient(logits, labels, saved, entropy, *grads, outer, inner, out, first_col)

    run = _Backward(h, weight, bias, grads, needs, compute_dtype, logits_dtype, tile_bytes)
    with torch.autocast(h.device.type, enabled=False):
        if needs[1] and weight.dtype != stats_dtype(logits_dtype):
            sums = run.by_vocabulary(rows, gradient)
        else:
            sums = run.by_rows(rows, statistics, gradient)
    if needs[0]:
        grads[0].zero_()[slice(None) if index is None else index] = sums.to(hidden.dtype)
    return grads


def _empty_gradient(value: Optional[Tensor], needed: bool) -> Tensor:
    """Room for the gradient of a value; no elements if nobody wants it."""
    if value is None or not needed:
        return torch.empty(0)
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(hidden, weight, bias, *others):
    return tuple(_empty_gradient(v, need) for v, need in zip((hidden, weight, bias), others[-1]))


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, labels, ctx.outer, ctx.inner, ctx.ignore_index, ctx.outputs, *ctx.how = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[4], output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_logps, g_entropy, g_lse, g_aux, g_saved):
    given = requested((g_logps, g_entropy, g_lse), ctx.outputs)
    if all(g is None for g in given):
        return (None,) * 13
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    scalars = (ctx.outer, ctx.inner, ctx.ignore_index, *ctx.how, needs)
    grads = torch.ops.fused_po.linear_logps_bwd(*ctx.saved_tensors, *given, *scalars)
    return *(grad if need else None for grad, need in zip(grads, needs)), *(None,) * 10


_forward.register_autograd(_autograd, setup_context=_setup_context)
refuse_second_derivative(_backward)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype autocast would give the projection, or the dtype both operands have."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"weight: got dtype {weight.dtype}, expected {hidden.dtype}, hidden's; cast one of them, "
            "or run under torch.autocast"
        )
    return hidden.dtype


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
    backend: Optional[str] = None,
    schedule: Optional[Schedule] = None,
) -> TokenStats:
    """Log-probs of labels, and other statistics, from hidden states and the LM head; the logits exist a tile at a time.

    raw = hidden @ weight.T + bias; the softmax is over z = softcap * tanh(raw * logit_scale / softcap) / temperature,
    or without the softcap z = raw * logit_scale / temperature. Under torch.autocast the head is cast block by block.
    With equal weights, labels and schedule two calls give bitwise equal results, whatever requires gradients.

    Args:
        hidden: [..., H], the input of the head, of the head's dtype (or under autocast).
        weight: [V, H], the head. bias: [V], of any floating dtype.
        labels: [...], integers in [0, V) or ignore_index, aligned with hidden: see `shift_labels`. On a GPU they are
            checked under FUSED_PO_DEBUG=1 only.
        temperature, logit_scale, softcap: finite and > 0.
        ignore_index: label of positions that cost nothing and give exactly 0.
        outputs: names of TokenStats' fields.
        backend: "triton" or "reference"; None chooses by device. See `backends`.
        schedule: how to compute it, see `Schedule`.

    Returns:
        TokenStats, fp32 (float64 for float64); gradients flow through logps, entropy and lse.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, by name.
    """
    checks.floating("hidden", hidden)
    checks.floating("weight", weight)
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
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
    labels = checks.integer("labels", labels, hidden.shape[:-1], hidden.device, why)
    outer, inner = checks.scaling(temperature, logit_scale, softcap)
    bits = output_bits(outputs)
    schedule = schedule or Schedule()
    dtype = compute_dtype(hidden, weight)
    logits_dtype = schedule.logits_dtype_for(dtype)
    name = backends.resolve(backend, hidden.device, logits_dtype)
    *results, _ = _forward(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), outer, inner, ignore_index, bits,
        dtype, logits_dtype, schedule.tile_bytes_on(hidden.device), schedule.compact, name,
    )  # fmt: skip
    stats = token_stats(tuple(results), bits, labels.shape)
    if stats.entropy is not None and not schedule.entropy_grad:
        stats = stats._replace(entropy=stats.entropy.detach())
    return stats
