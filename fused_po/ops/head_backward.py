"""The backward of the LM head; its schedules are those of head.py."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po.ops import backend as backends
from fused_po.ops.gemm import back_project, head_block, mm, operand, project, spans, take
from fused_po.ops.head import Buffers, Head, Saved, guarded, take_rows
from fused_po.parallel import row_passes
from fused_po.reference import stats_dtype


class Incoming(NamedTuple):
    """Rows of the backward: their labels, what the forward left of them, and the incoming gradients, each [N]."""

    labels: Tensor
    saved: Tensor  # [SAVED_FIELDS, N]
    entropy: Optional[Tensor]
    g_logps: Optional[Tensor]
    g_entropy: Optional[Tensor]
    g_lse: Optional[Tensor]

    def at(self, index: slice | Tensor | None) -> Incoming:
        """Some of the rows."""
        return self if index is None else Incoming(*(None if v is None else v[..., index].contiguous() for v in self))

    @property
    def logps(self) -> Tensor:
        return self.saved[2]

    @property
    def grads(self) -> tuple[Optional[Tensor], ...]:
        return self[3:]

    @property
    def only_logps(self) -> bool:
        """Whether each row's gradient is a multiple of its basis."""
        return self.g_entropy is None and self.g_lse is None

    def live(self, ignore_index: int) -> Tensor:
        """[N] whether any gradient comes in to a row that is scored."""
        some = self.labels != ignore_index
        first, *others = (g != 0 for g in self.grads if g is not None)
        for g in others:
            first.logical_or_(g)
        return some.logical_and_(first)

    def masked(self, live: Tensor, ignore_index: int) -> Incoming:
        """These rows; those that are not live become ignored rows, and nothing reads them."""
        grads = [None if g is None else torch.where(live, g, 0) for g in self.grads]
        saved = torch.stack([self.saved[0], self.saved[1].masked_fill(~live, torch.inf), self.saved[2]])
        labels = self.labels.masked_fill(~live, ignore_index)
        return Incoming(labels, saved, self.entropy, *grads)


THIN_ROWS = {"cpu": 32}  # of a product with few columns that are summed in one go
THIN_ROWS_ELSEWHERE = 128


def add_product(d: Tensor, thin: Tensor, total: Tensor) -> None:
    """total += d^T thin, for thin of few columns: the gradients of a bias and of low.

    A GEMM adds the rows of such a product one after another and rounds each sum; plain PyTorch sums a bias's gradient
    in cascades. So it is made of sums of some rows; on a CPU the total is in float64.
    """
    part = torch.empty_like(total, dtype=stats_dtype(d.dtype))
    for some in spans(0, len(d), THIN_ROWS.get(d.device.type, THIN_ROWS_ELSEWHERE)):
        mm(d[some].t(), thin[some], part)
        total += part


class HeadBackward:
    """One backward over rows of which the first n_kept have their basis kept; the rest project again."""

    def __init__(self, head: Head, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], rows: Incoming, kept: Tensor,
                 index: Optional[Tensor], n_kept: int, low: Optional[Tensor] = None) -> None:  # fmt: skip
        """hidden, low in the GEMMs' dtype. index [N]: numbers of the rows as the forward had them, None for all."""
        self.head, self.hidden, self.weight, self.bias, self.low = head, hidden, weight, bias, low
        n_cols = weight.shape[0]
        self.rows, self.index, self.n_kept = rows, index, n_kept
        self.kept = kept if kept.shape[1] == n_cols else kept[:, :n_cols]
        self.kept_as_is = index is None or n_kept == len(kept)  # no kept row was dropped
        self.run = row_passes(backends.get(head.backend), head.shards)
        # A row's gradient is this many times its basis, if there is such a number.
        self.multiples, self.factors = rows.only_logps, rows.g_logps

    def tile_rows(self, n_cols: int) -> int:
        """Rows of a tile of n_cols columns."""
        return self.head.tile_rows(n_cols, self.weight.device)

    def buffers(self, n_rows: int, n_cols: int) -> Buffers:
        """Room for a tile."""
        return Buffers(self.head, self.hidden, n_rows, n_cols)

    def tile(self, some: slice, columns: slice, weight: Tensor, buffers: Buffers) -> Tensor:
        """The gradient [rows, columns] in the raw logits; the basis, where each row's gradient is a multiple of it."""
        shape = some.stop - some.start, columns.stop - columns.start
        if some.stop > self.n_kept:
            return self.recompute(some, columns, weight, buffers.logits(*shape), buffers.basis(*shape))
        if self.kept_as_is:
            d = self.kept if self.kept.shape == shape else self.kept[some, columns]
        else:
            d = torch.index_select(self.kept[:, columns], 0, self.index[some], out=buffers.basis(*shape))
        if self.multiples:
            return d
        part, out = self.rows.at(some), buffers.basis(*shape)
        how = part.labels, part.saved, part.logps, part.entropy, *part.grads, self.head.outer, out
        self.run.from_basis(d, *how, first_col=columns.start)
        return out

    def recompute(self, some: slice, columns: slice, weight: Tensor, logits: Tensor, out: Tensor) -> Tensor:
        """The same by projecting again."""
        head, rows = self.head, self.rows.at(some)
        bias, low = (None if v is None else v[columns] for v in (self.bias, self.low))
        compute = head.compute_dtype if weight is self.weight else weight.dtype
        block = head_block(len(self.hidden), *self.weight.shape, head.tile_bytes)
        project(self.hidden[some], weight, bias, compute, logits, block, low)
        saved, entropy, scaling = rows.saved, rows.entropy, (head.outer, head.inner)
        if len(weight) == len(self.weight) and not head.group:  # whole rows: score them anew
            outputs, basis = 2 * (entropy is not None), out[None] if self.multiples else None
            how = *scaling, head.ignore_index, outputs, basis
            _, new_entropy, _, _, saved = self.run.begin_score(logits[None], rows.labels, *how)()
            if self.multiples:
                return out
            entropy = None if entropy is None else new_entropy
        grads = (None, None, None) if self.multiples else rows.grads
        how = *grads, *scaling, out[None]
        self.run.gradient(logits[None], rows.labels, saved, entropy, *how, first_col=columns.start)
        return out

    def fill(self, grads: tuple[Tensor, ...], needs: list[bool], add: bool) -> None:
        """Write the gradients of hidden and of low, and write, or with `add` add to, those of weight and bias."""
        head, weight, (n_cols, width), n_rows = self.head, self.weight, self.weight.shape, len(self.hidden)
        need_hidden, need_weight, need_bias, need_low = [*needs, False][:4]
        sums, gemm = stats_dtype(head.logits_dtype), self.hidden.dtype
        # A gradient is its own sum if it is as wide, or if one GEMM makes it.
        in_one = self.multiples and self.kept_as_is and self.n_kept == n_rows and weight.dtype == gemm
        own_sums = not need_weight or grads[1].dtype == sums or (in_one and not add)
        widest = head.shards.widest(n_cols)  # pieces are the same on all ranks
        block = head_block(n_rows, widest, width, head.tile_bytes)
        columns_at_once = widest if own_sums else block
        step = max(1, min(self.tile_rows(columns_at_once), n_rows))
        buffers = self.buffers(step, min(columns_at_once, n_cols))
        kept_step = self.n_kept if self.multiples and self.kept_as_is else step
        pieces = spans(0, self.n_kept, kept_step) + spans(self.n_kept, n_rows, step)

        g = self.factors[:, None] if self.multiples else torch.ones_like(self.rows.logps)[:, None]
        scaled = (self.hidden * g).to(gemm) if (need_weight or need_low) and self.multiples else self.hidden
        with_thin = need_bias or need_low
        if with_thin:
            thin = torch.cat([g.to(gemm)[:, :need_bias], scaled[:, width if need_low else self.hidden.shape[1] :]], 1)
            wide = torch.float64 if thin.device.type == "cpu" else sums
            sum_thin = self.hidden.new_zeros(n_cols, thin.shape[1], dtype=wide)  # of the bias, and of low
        states = scaled if scaled.shape[1] == width else scaled[:, :width]
        if not pieces and need_weight and not add:
            grads[1].zero_()
        room = None if own_sums else self.hidden.new_empty(min(columns_at_once, n_cols), width, dtype=sums)
        summed = []
        for columns in spans(0, n_cols, columns_at_once) or [slice(0, 0)]:
            part = weight if own_sums else operand(take(weight, columns), head.compute_dtype, gemm)
            low = None if self.low is None else self.low[columns]
            total = grads[1] if own_sums else room[: len(part)]
            for some in pieces:
                d = self.tile(some, columns, part, buffers)
                if need_hidden:
                    compute = head.compute_dtype if part is weight else gemm
                    back_project(d, part, compute, take(grads[0], some), block, low, add=columns.start > 0)
                    if head.shards.adds_up and columns.stop == n_cols:  # under the GEMM of the head's
                        summed.append(head.shards.add_up(grads[0][some]))
                if need_weight:
                    mm(d.t(), take(states, some), total, add=some.start > 0 or add)
                if with_thin:
                    add_product(d, thin[some], sum_thin[columns])
            if need_weight and not own_sums and pieces:
                grads[1][columns] = total
            del part  # before the next one is cast
        for work in summed:
            work.wait()
        if need_hidden and self.multiples:
            grads[0].mul_(g)
        if need_bias:
            grads[2].copy_(sum_thin[:, 0] + grads[2] if add else sum_thin[:, 0])
        if need_low:
            grads[3].copy_(sum_thin[:, need_bias:])


@guarded
def backward(
    head: Head, tensors: Saved, g_logps: Optional[Tensor], g_entropy: Optional[Tensor], g_lse: Optional[Tensor],
    needs: list[bool], skip_zero_rows: bool, sums: Optional[tuple[Tensor, Tensor]] = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of hidden, weight, bias (and low, if `needs` has four); without elements where not needed.

    sums: add those of weight and bias to these instead; there is no low then.
    """
    hidden, weight, bias, labels, rows, saved, entropy, kept, low = tensors
    entropy = None if g_entropy is None else entropy
    incoming = Incoming(labels, saved, entropy, g_logps, g_entropy, g_lse)
    from_kept = head.inner is None or incoming.only_logps  # the softcap's slope does not come back from the basis
    if head.keep == "product" and from_kept:
        grad = head.shards.sum_of_rows(product_gradient(head, hidden, (weight, low), incoming, kept), rows)
        return grad.to(hidden.dtype), *empty_gradients((None, weight, bias, low), [False] * len(needs))[1:]
    incoming = incoming.at(rows)
    live = incoming.live(head.ignore_index)
    n_rows = live.numel()
    kept = take(kept, slice(0, min(n_rows, kept.shape[0]) if head.keep == "basis" and from_kept else 0))
    n_kept, index = kept.shape[0], None
    if skip_zero_rows or hidden.device.type == "cpu":
        n_live, n_kept = counted(live, n_kept)
        if n_live < n_rows:
            index = torch.nonzero_static(live, size=n_live).squeeze(1)
            incoming = incoming.at(index)
            rows = index if rows is None else rows[index]
    else:
        incoming = incoming.masked(live, head.ignore_index)
    h = operand(take_rows(hidden, rows), head.compute_dtype, head.gemm(hidden.device))
    wide = stats_dtype(head.logits_dtype)
    sum_hidden = hidden.new_empty((h.shape[0], hidden.shape[1]) if needs[0] else 0, dtype=wide)
    grads = empty_gradients((None, weight, bias, low), needs)[1:] if sums is None else sums
    low = None if low is None else operand(low, head.compute_dtype, h.dtype)
    run = HeadBackward(head, h, weight, bias, incoming, kept, index, n_kept, low)
    run.fill((sum_hidden, *grads), needs, sums is not None)
    if needs[0] and rows is not None:
        sum_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(
            0, rows, sum_hidden.to(hidden.dtype)
        )
    return sum_hidden.to(hidden.dtype), *grads


def counted(live: Tensor, n_kept: int) -> tuple[int, int]:
    """(how many rows are live, how many of the first n_kept): one sync on a GPU."""
    if n_kept in (0, live.numel()):
        n_live = int(torch.count_nonzero(live))
        return n_live, n_live if n_kept else 0
    n_live, n_kept = torch.stack([live.sum(), live[:n_kept].sum()]).tolist()
    return n_live, n_kept


def product_gradient(
    head: Head, hidden: Tensor, weights: tuple[Optional[Tensor], ...], rows: Incoming, product: Tensor
) -> Tensor:
    """This rank's part of hidden's gradient from product = basis @ weights: no GEMM. d lse = label's slope - d logp."""
    valid = rows.labels != head.ignore_index
    g_logps, g_lse = (None if g is None else torch.where(valid, g, 0) for g in (rows.g_logps, rows.g_lse))
    g = g_logps if g_lse is None else -g_lse if g_logps is None else g_logps - g_lse
    grad = product * g[:, None]
    if g_lse is not None:
        labels = rows.labels - head.shards.start()
        here = valid & (labels >= 0) & (labels < len(weights[0]))
        labels, g = torch.where(here, labels, 0), torch.where(here, head.outer * g_lse, 0)
        if len(weights[0]):
            label_rows = [operand(w[labels], head.compute_dtype, hidden.dtype) for w in weights if w is not None]
            grad += g[:, None] * torch.cat(label_rows, 1)
    return grad


def empty_gradients(values: tuple[Optional[Tensor], ...], needs: list[bool]) -> tuple[Tensor, ...]:
    """Room for gradients of (hidden or None, weight, ...); where not needed, no elements, of that dtype and device."""
    weight = values[1]
    return tuple(
        torch.empty_like(v, memory_format=torch.contiguous_format)
        if v is not None and need
        else (weight if v is None else v).new_empty(0)
        for v, need in zip(values, needs)
    )
