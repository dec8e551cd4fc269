"""Tiles of logits of one head, scored at the labels. The basis is D = d logp / d raw."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po.backend import choose as backends
from fused_po.backend.interface import Grads, Outputs, RowStats, SavedRow
from fused_po.lm_head.gemm import take
from fused_po.lm_head.head import Head, Operands
from fused_po.lm_head.plan import HeadPlan
from fused_po.lm_head.tiles import Buffers, Kept, Scored
from fused_po.ops.outputs import empty_stats
from fused_po.parallel.row_passes import row_passes


class Incoming(NamedTuple):
    """Rows of the backward: labels, what the forward saved, and incoming gradients, each [N]."""

    labels: Tensor
    saved: Tensor  # [SavedRow.COUNT, N]
    entropy: Optional[Tensor]
    grads: Grads

    def at(self, rows: slice | Tensor | None) -> Incoming:
        """Some of the rows."""
        if rows is None:
            return self
        values = self.labels, self.saved, self.entropy, *self.grads
        labels, saved, entropy, *grads = [None if v is None else v[..., rows].contiguous() for v in values]
        return Incoming(labels, saved, entropy, Grads(*grads))

    def live(self, ignore_index: int) -> Tensor:
        """[N], whether a row is scored and has a nonzero incoming gradient."""
        scored = self.labels != ignore_index
        nonzero, *others = (g != 0 for g in self.grads if g is not None)
        for other in others:
            nonzero.logical_or_(other)
        return scored.logical_and_(nonzero)

    def masked(self, live: Tensor, ignore_index: int) -> Incoming:
        """The rows with those that are not live turned into ignored rows, which are not read."""
        grads = Grads(*(None if g is None else torch.where(live, g, 0) for g in self.grads))
        shift, norm, logp = self.saved
        saved = torch.stack([shift, norm.masked_fill(~live, torch.inf), logp])
        return Incoming(self.labels.masked_fill(~live, ignore_index), saved, self.entropy, grads)


class LogpForward:
    """Scores tiles; see `ForwardTiles`."""

    def __init__(self, head: Head, plan: HeadPlan, operands: Operands, labels: Tensor) -> None:
        """operands and labels of the scored rows."""
        self.head, self.operands, self.labels = head, operands, labels
        self.plan, self.run = plan, row_passes(backends.get(head.backend), head.shards)
        self.n_cols = operands.weight.shape[0]
        self.block = self.plan.head_block(labels.numel(), *operands.weight.shape)

    def allocate(self, n_rows: int) -> Buffers:
        """Memory for a tile."""
        return Buffers(self.operands.hidden, self.head.dtypes.logits, n_rows, self.n_cols)

    def unscored(self, n_rows: int) -> RowStats:
        """Zeros, and a norm of +inf, which marks an ignored row."""
        stats = empty_stats(self.operands.hidden.new_empty(0, dtype=self.head.dtypes.logits), n_rows, self.head.outputs)
        for value in stats:
            value.zero_()
        stats.saved[SavedRow.NORM] = torch.inf
        return stats

    def begin(self, rows: slice, memory: Buffers, kept: Optional[Tensor]) -> Callable[[], Scored]:
        """Project and start to score. For a whole tile the same row pass computes the bases."""
        shape = n_rows, n_cols = rows.stop - rows.start, self.n_cols
        n_formed = n_rows if kept is None else kept.shape[1]
        d = memory.basis(*shape) if kept is None else kept[0] if n_formed else None
        logits = d if self.plan.in_place(n_formed, n_rows) else memory.logits(*shape)
        weight = self.operands.weight
        self.operands.project(rows, slice(0, n_cols), weight, self.head.dtypes.compute, logits, self.block)
        scored, labels = logits[None], take(self.labels, rows)
        basis = None if n_formed != n_rows else scored if d is logits else d[None]
        stats = self.run.begin_score(
            scored, labels, self.head.scaling, self.head.ignore_index, self.head.outputs, basis
        )

        def finish() -> Scored:
            results = stats()
            if 0 < n_formed < n_rows:  # the budget ends within this tile
                self.form_first(logits, labels, results, d)
            return Scored(results, [d])

        return finish

    def form_first(self, logits: Tensor, labels: Tensor, stats: RowStats, d: Tensor) -> None:
        """The basis of the first rows of a tile that has been scored."""
        n = len(d)
        saved = stats.saved[:, :n].contiguous()
        self.run.gradient(logits[None, :n], labels[:n], saved, stats.entropy, Grads(), self.head.scaling, d[None])


class LogpBackward:
    """Forms gradients of tiles; see `BackwardTiles`."""

    def __init__(self, head: Head, plan: HeadPlan, operands: Operands, incoming: Incoming, kept: Kept) -> None:
        self.head, self.operands, self.rows, self.kept = head, operands, incoming, kept
        self.plan, self.run = plan, row_passes(backends.get(head.backend), head.shards)
        self.factors = incoming.grads.logps if incoming.grads.only_logps else None
        self.block = self.plan.head_block(operands.hidden.shape[0], *operands.weight.shape)

    def allocate(self, n_rows: int, n_cols: int) -> None:
        """Memory for a tile."""
        self.buffers = Buffers(self.operands.hidden, self.head.dtypes.logits, n_rows, n_cols)

    def tile(self, rows: slice, columns: slice, weight: Tensor) -> Tensor:
        """The gradient from the kept basis, or from a new projection."""
        if rows.stop > self.kept.n_rows:
            return self.recompute(rows, columns, weight)
        d = self.kept.tile(0, rows, columns, self.buffers.basis)
        if self.factors is not None:
            return d
        part, out = self.rows.at(rows), self.buffers.basis(*d.shape)
        outer = self.head.scaling.outer
        self.run.from_basis(d, part.labels, part.saved, part.entropy, part.grads, outer, out, columns.start)
        return out

    def recompute(self, rows: slice, columns: slice, weight: Tensor) -> Tensor:
        """The gradient from a new projection."""
        head, shape, part = self.head, (rows.stop - rows.start, columns.stop - columns.start), self.rows.at(rows)
        logits, out = self.buffers.logits(*shape), self.buffers.basis(*shape)
        whole = self.operands.weight
        compute = head.dtypes.compute if weight is whole else weight.dtype
        self.operands.project(rows, columns, weight, compute, logits, self.block)
        saved, entropy, basis_only = part.saved, part.entropy, self.factors is not None
        if len(weight) == len(whole) and not head.shards.group:  # whole rows: score them anew, see BackwardPlan
            asked, basis = Outputs(entropy=entropy is not None), out[None] if basis_only else None
            stats = self.run.begin_score(logits[None], part.labels, head.scaling, head.ignore_index, asked, basis)()
            if basis_only:
                return out
            saved, entropy = stats.saved, stats.entropy if asked.entropy else None
        grads = Grads() if basis_only else part.grads
        self.run.gradient(logits[None], part.labels, saved, entropy, grads, head.scaling, out[None], columns.start)
        return out
