"""Forward and backward of the LM head, a tile of logits at a time. What is kept in between decides the GEMMs.

A GEMM over all scored tokens counts as 1. For one token, D = d logp / d raw, a row of V numbers with no loss in it. For
any loss with the derivative g on that log-prob, d hidden = g D W, d weight = D^T (g hidden), d bias = D^T g.

    keep        forward                        backward
    "nothing"   1: scores                      nothing, or as over the budget
    "product"   2: scores, then u = D W        0: d hidden = g u                      (the head is frozen)
    "basis"     1: scores, D kept              2: D W, D^T (g hidden), or one of them
    over the budget: 1                         3: the tile and D again, then the same

Forward tiles are rows x the whole vocabulary, and their grid follows from shapes, dtypes and tile_bytes alone. Rows of
one backward GEMM: all that are kept, or a tile to be projected again. A recomputed tile is scored anew, since only the
lse of the very logits at hand makes p sum to 1. Except where the gradient of a low-precision head needs fp32 room, a
block of the vocabulary at a time: that block cannot know its rows' lse, and the rounding of D hides the difference.

A low-rank addition to the head (LoRA: weight + low A) is `low` [V, r]; hidden is then [N, H + r], its last columns
being hidden A^T. All of the above holds with [weight | low] for the weight, which never lie side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po.ops import backend as backends
from fused_po.ops.gemm import back_project, gemm_dtype, head_block, mm, operand, padded, project, room, spans
from fused_po.ops.logps import fake_stats
from fused_po.reference import stats_dtype


class Head(NamedTuple):
    """One projection and how to compute it. The fields are also the scalar arguments of the ops, in this order."""

    outer: float  # z = outer * tanh(inner * raw), or outer * raw where inner is None
    inner: Optional[float]
    ignore_index: int
    outputs: int  # bits in the order of TokenStats
    compute_dtype: torch.dtype  # of the factors: the inputs' or autocast's
    logits_dtype: torch.dtype
    tile_bytes: int
    budget: int  # bytes
    keep: str  # "nothing", "product", "basis"
    backend: str

    def gemm(self, device: torch.device) -> torch.dtype:
        """The dtype of the GEMMs' factors, and of the basis."""
        return gemm_dtype(device, self.compute_dtype, self.logits_dtype)

    def tile_rows(self, n_cols: int, device: torch.device) -> int:
        """Rows of a tile: its logits and, where that needs room of its own, its basis stay within tile_bytes."""
        gemm = self.gemm(device)
        row = padded(n_cols, self.logits_dtype) * self.logits_dtype.itemsize
        return max(1, self.tile_bytes // (row + (gemm != self.logits_dtype) * padded(n_cols, gemm) * gemm.itemsize))

    def rows_within_budget(self, n_cols: int, device: torch.device) -> int:
        """How many rows of the basis the budget holds."""
        gemm = self.gemm(device)
        return self.budget // (padded(n_cols, gemm) * gemm.itemsize)

    def empty_kept(self, hidden: Tensor, n_rows, weight: Tensor) -> Tensor:
        """Room for what is kept of n_rows scored tokens among hidden [N, H]."""
        if self.keep == "product":
            return hidden.new_empty(hidden.shape, dtype=stats_dtype(self.logits_dtype))
        n_cols = weight.shape[0]
        gemm = self.gemm(hidden.device)
        rows = torch.sym_min(n_rows, self.rows_within_budget(n_cols, hidden.device)) if self.keep == "basis" else 0
        return hidden.new_empty(rows, padded(n_cols, gemm), dtype=gemm)


class Saved(NamedTuple):
    """What a backward gets of its forward."""

    hidden: Tensor  # [N, H], or [N, H + r]
    weight: Tensor
    bias: Optional[Tensor]
    labels: Tensor  # [N]
    rows: Optional[Tensor]  # [n]
    stats: Tensor  # [2, N]
    logps: Tensor
    entropy: Tensor
    kept: Tensor
    low: Optional[Tensor] = None  # [V, r]


def guarded(run: Callable) -> Callable:
    """Run without autocast; if memory ends, say what to lower, and leave nothing that was allocated behind."""

    @functools.wraps(run)
    def guard(head: Head, tensors: Tensor | Saved, *arguments, **options):
        device = (tensors if isinstance(tensors, Tensor) else tensors.hidden).device
        try:
            with torch.autocast(device.type, enabled=False):
                return run(head, tensors, *arguments, **options)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            said = str(error)
        # Raised out here, when the first error is gone, and with it the frames that held the tiles.
        raise torch.OutOfMemoryError(
            f"fused_po: out of memory in the LM head. Lower Schedule.logits_budget (now {head.budget} bytes kept from "
            f"forward to backward) or Schedule.tile_bytes (now {head.tile_bytes} bytes a tile). {said}"
        )

    return guard


def scored_rows(labels: Tensor, ignore_index: int) -> Optional[Tensor]:
    """Numbers [n] of the rows that are not ignored, None if all are: the one host sync of a forward on a GPU."""
    rows = (labels != ignore_index).nonzero().squeeze(1)
    return None if rows.numel() == labels.numel() else rows


def take_rows(value: Tensor, rows: Optional[Tensor]) -> Tensor:
    """value[rows]; all of it for rows None."""
    return value if rows is None else value[rows]


class Buffers:
    """Room for one tile of logits and one of its basis, made when first asked for; the same where the dtypes are."""

    def __init__(self, head: Head, like: Tensor, n_rows: int, n_cols: int) -> None:
        self.head, self.like, self.shape = head, like, (n_rows, n_cols)
        self.made: dict[torch.dtype, Tensor] = {}

    def _tile(self, dtype: torch.dtype, n_rows: int, n_cols: int) -> Tensor:
        if dtype not in self.made:
            self.made[dtype] = room(self.like, *self.shape, dtype)
        return self.made[dtype][:n_rows, :n_cols]

    def logits(self, n_rows: int, n_cols: int) -> Tensor:
        return self._tile(self.head.logits_dtype, n_rows, n_cols)

    def basis(self, n_rows: int, n_cols: int) -> Tensor:
        return self._tile(self.like.dtype, n_rows, n_cols)


@guarded
def forward(
    head: Head, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, rows: Optional[Tensor],
    n_room: int, low: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, entropy, lse, aux, saved, kept) of hidden [N, H], labels [N]; with low [V, r], hidden is [N, H + r].

    rows [n]: numbers of the rows that are scored, None for all. n_room: at least n, rows to hold room for in `kept`.
    """
    n_cols, run = weight.shape[0], backends.get(head.backend)
    results = fake_stats(hidden.new_empty(0, dtype=head.logits_dtype), labels.numel(), head.outputs)
    kept = head.empty_kept(hidden, n_room, weight)
    if head.keep == "basis":  # an op's result must not hold what was in memory before
        kept[:, n_cols:], kept[labels.numel() if rows is None else rows.numel() :] = 0, 0
    if rows is not None:
        for result in (*results, kept) if head.keep == "product" else results:
            result.zero_()
        results[4][1] = torch.inf
    hidden = operand(take_rows(hidden, rows), head.compute_dtype, head.gemm(hidden.device))
    labels = take_rows(labels, rows)
    low = None if low is None else operand(low, head.compute_dtype, hidden.dtype)
    n_rows, step = len(hidden), head.tile_rows(n_cols, hidden.device)
    block = head_block(n_rows, *weight.shape, head.tile_bytes)
    buffers = Buffers(head, hidden, min(step, n_rows), n_cols)
    for some in spans(0, n_rows, step):
        count = some.stop - some.start
        d = buffers.basis(count, n_cols) if head.keep == "product" else kept[some, :n_cols]
        in_place = d.dtype == head.logits_dtype and len(d) == count
        logits = d if in_place else buffers.logits(count, n_cols)
        project(hidden[some], weight, bias, head.compute_dtype, logits, block, low)
        scaling = (head.outer, head.inner)
        basis = d[None] if len(d) == count else None
        stats = run.score(logits[None], labels[some], *scaling, head.ignore_index, head.outputs, basis)
        if 0 < len(d) < count:  # the budget ends within this tile
            part, saved = slice(some.start, some.start + len(d)), stats[4][:, : len(d)].contiguous()
            run.gradient(logits[None, : len(d)], labels[part], saved, stats[1], None, None, None, *scaling, d[None])
        where = some if rows is None else rows[some]
        for result, value in zip(results, stats):
            if result.numel():
                result[..., where] = value
        if head.keep == "product":
            product = kept[some] if rows is None else kept.new_empty(count, kept.shape[1])
            back_project(d, weight, head.compute_dtype, product, block, low)
            if rows is not None:
                kept[where] = product
    return *results, kept


class Incoming(NamedTuple):
    """Rows of the backward: their labels, what the forward left of them, and the incoming gradients, each [N]."""

    labels: Tensor
    saved: Tensor  # [2, N]
    logps: Tensor
    entropy: Optional[Tensor]
    g_logps: Optional[Tensor]
    g_entropy: Optional[Tensor]
    g_lse: Optional[Tensor]

    def at(self, index: slice | Tensor | None) -> Incoming:
        """Some of the rows."""
        return self if index is None else Incoming(*(None if v is None else v[..., index].contiguous() for v in self))

    @property
    def grads(self) -> tuple[Optional[Tensor], ...]:
        return self[4:]

    @property
    def only_logps(self) -> bool:
        """Whether each row's gradient is a multiple of its basis."""
        return self.g_entropy is None and self.g_lse is None

    def masked(self, ignore_index: int) -> tuple[Incoming, Tensor]:
        """(these rows, whether any gradient comes in); rows without one become ignored rows, and nothing reads them."""
        live = torch.stack([g != 0 for g in self.grads if g is not None]).any(0) & (self.labels != ignore_index)
        grads = [None if g is None else torch.where(live, g, 0) for g in self.grads]
        saved = torch.stack([self.saved[0], self.saved[1].masked_fill(~live, torch.inf)])
        labels = self.labels.masked_fill(~live, ignore_index)
        return Incoming(labels, saved, self.logps, self.entropy, *grads), live


class HeadBackward:
    """One backward over rows of which the first n_kept have their basis kept; the rest project again."""

    def __init__(self, head: Head, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], rows: Incoming, kept: Tensor,
                 index: Optional[Tensor], n_kept: int, low: Optional[Tensor] = None) -> None:  # fmt: skip
        """hidden, low in the GEMMs' dtype. index [N]: numbers of the rows as the forward had them, None for all."""
        self.head, self.hidden, self.weight, self.bias, self.low = head, hidden, weight, bias, low
        self.rows, self.kept, self.index, self.n_kept = rows, kept[:, : weight.shape[0]], index, n_kept
        self.kept_as_is = index is None or n_kept == len(kept)  # no kept row was dropped
        self.run = backends.get(head.backend)
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
            d = self.kept[some, columns]
        else:
            d = torch.index_select(self.kept[:, columns], 0, self.index[some], out=buffers.basis(*shape))
        if self.multiples:
            return d
        part, out = self.rows.at(some), buffers.basis(*shape)
        self.run.from_basis(d, part.labels, part.logps, part.entropy, *part.grads, self.head.outer, out, columns.start)
        return out

    def recompute(self, some: slice, columns: slice, weight: Tensor, logits: Tensor, out: Tensor) -> Tensor:
        """The same by projecting again."""
        head, rows = self.head, self.rows.at(some)
        bias, low = (None if v is None else v[columns] for v in (self.bias, self.low))
        compute = head.compute_dtype if weight is self.weight else weight.dtype
        block = head_block(len(self.hidden), *self.weight.shape, head.tile_bytes)
        project(self.hidden[some], weight, bias, compute, logits, block, low)
        saved, entropy, scaling = rows.saved, rows.entropy, (head.outer, head.inner)
        if len(weight) == len(self.weight):  # whole rows: score them anew
            outputs, basis = 2 * (entropy is not None), out[None] if self.multiples else None
            _, new_entropy, _, _, saved = self.run.score(
                logits[None], rows.labels, *scaling, head.ignore_index, outputs, basis
            )
            if self.multiples:
                return out
            entropy = None if entropy is None else new_entropy
        grads = (None, None, None) if self.multiples else rows.grads
        self.run.gradient(logits[None], rows.labels, saved, entropy, *grads, *scaling, out[None], columns.start)
        return out

    def fill(self, grads: tuple[Tensor, ...], needs: list[bool], add: bool) -> None:
        """Write the gradients of hidden and of low, and write, or with `add` add to, those of weight and bias."""
        head, weight, (n_cols, width), n_rows = self.head, self.weight, self.weight.shape, len(self.hidden)
        need_hidden, need_weight, need_bias, need_low = [*needs, False][:4]
        sums, gemm = stats_dtype(head.logits_dtype), self.hidden.dtype
        # A gradient is its own sum if it is as wide, or if one GEMM makes it.
        in_one = self.multiples and self.kept_as_is and self.n_kept == n_rows and weight.dtype == gemm
        own_sums = not need_weight or grads[1].dtype == sums or (in_one and not add)
        block = head_block(n_rows, n_cols, width, head.tile_bytes)
        columns_at_once = n_cols if own_sums else block
        step = max(1, min(self.tile_rows(columns_at_once), n_rows))
        buffers = self.buffers(step, columns_at_once)
        kept_step = self.n_kept if self.multiples and self.kept_as_is else step
        pieces = spans(0, self.n_kept, kept_step) + spans(self.n_kept, n_rows, step)

        g = self.factors[:, None] if self.multiples else torch.ones_like(self.rows.logps)[:, None]
        scaled = (self.hidden * g).to(gemm) if (need_weight or need_low) and self.multiples else self.hidden
        thin = torch.cat([g.to(gemm)[:, :need_bias], scaled[:, width if need_low else self.hidden.shape[1] :]], 1)
        sum_thin = self.hidden.new_zeros(n_cols, thin.shape[1], dtype=sums)  # of the bias, and of low
        if not pieces and need_weight and not add:
            grads[1].zero_()
        for columns in spans(0, n_cols, columns_at_once):
            part = weight if own_sums else operand(weight[columns], head.compute_dtype, gemm)
            low = None if self.low is None else self.low[columns]
            total = grads[1] if own_sums else self.hidden.new_zeros(len(part), width, dtype=sums)
            for some in pieces:
                d = self.tile(some, columns, part, buffers)
                if need_hidden:
                    compute = head.compute_dtype if part is weight else gemm
                    back_project(d, part, compute, grads[0][some], block, low, add=columns.start > 0)
                if need_weight:
                    mm(d.t(), scaled[some, :width], total, add=some.start > 0 or not own_sums or add)
                if thin.shape[1]:
                    mm(d.t(), thin[some], sum_thin[columns], add=True)
            if need_weight and not own_sums:
                grads[1][columns] = total
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
    hidden, weight, bias, labels, rows, saved, logps, entropy, kept, low = tensors
    entropy = None if g_entropy is None else entropy
    incoming = Incoming(labels, saved, logps, entropy, g_logps, g_entropy, g_lse)
    from_kept = head.inner is None or incoming.only_logps  # the softcap's slope does not come back from the basis
    if head.keep == "product" and from_kept:
        grad = product_gradient(head, hidden, (weight, low), incoming, kept)
        return grad, *(weight.new_empty(0) for _ in needs[1:])
    incoming, live = incoming.at(rows).masked(head.ignore_index)
    kept = kept[: len(live) if head.keep == "basis" and from_kept else 0]
    n_kept, index = len(kept), None
    if skip_zero_rows or hidden.device.type == "cpu":
        n_live, n_kept = torch.stack([live.sum(), live[:n_kept].sum()]).tolist()  # one sync on a GPU
        if n_live < live.numel():
            index = torch.nonzero_static(live, size=n_live).squeeze(1)
            incoming = incoming.at(index)
            rows = index if rows is None else rows[index]
    h = operand(take_rows(hidden, rows), head.compute_dtype, head.gemm(hidden.device))
    wide = stats_dtype(head.logits_dtype)
    sum_hidden = hidden.new_empty((len(h), hidden.shape[1]) if needs[0] else 0, dtype=wide)
    grads = empty_gradients((None, weight, bias, low), needs)[1:] if sums is None else sums
    low = None if low is None else operand(low, head.compute_dtype, h.dtype)
    run = HeadBackward(head, h, weight, bias, incoming, kept, index, n_kept, low)
    run.fill((sum_hidden, *grads), needs, sums is not None)
    if needs[0] and rows is not None:
        sum_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(
            0, rows, sum_hidden.to(hidden.dtype)
        )
    return sum_hidden.to(hidden.dtype), *grads


def product_gradient(
    head: Head, hidden: Tensor, weights: tuple[Optional[Tensor], ...], rows: Incoming, product: Tensor
) -> Tensor:
    """The gradient of hidden from product = basis @ weights: no GEMM. d lse = slope of the label - d logp."""
    valid = rows.labels != head.ignore_index
    zero = torch.zeros_like(rows.saved[0])
    g_logps, g_lse = (zero if g is None else torch.where(valid, g, 0) for g in (rows.g_logps, rows.g_lse))
    grad = product * (g_logps - g_lse)[:, None]
    if rows.g_lse is not None:
        labels = torch.where(valid, rows.labels, 0)
        label_rows = torch.cat(
            [operand(w[labels], head.compute_dtype, hidden.dtype) for w in weights if w is not None], 1
        )
        grad += (head.outer * g_lse)[:, None] * label_rows
    return grad.to(hidden.dtype)


def empty_gradients(values: tuple[Optional[Tensor], ...], needs: list[bool]) -> tuple[Tensor, ...]:
    """Room for gradients; no elements where not needed."""
    wanted = [v is not None and need for v, need in zip(values, needs)]
    return tuple(
        torch.empty_like(v, memory_format=torch.contiguous_format) if want else torch.empty(0)
        for v, want in zip(values, wanted)
    )
