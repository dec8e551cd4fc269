"""Tiles of logits of two heads, compared by the exact KL. Their bases are D = d KL / d raw and D' = d logp / d raw."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po.backend import choose as backends
from fused_po.backend.interface import Divergence, Grads, KLRow
from fused_po.lm_head.gemm import take
from fused_po.lm_head.head import Head, Operands
from fused_po.lm_head.plan import Dtypes, HeadPlan
from fused_po.lm_head.tiles import Buffers, Kept, Scored
from fused_po.parallel.row_passes import row_passes

OF_KL, OF_LOGP, OF_ENTROPY = range(3)  # rows of the incoming gradients


class KLHead(NamedTuple):
    """How the exact KL of two heads is computed."""

    head: Head  # the policy's
    ref_dtypes: Dtypes
    divergence: Divergence

    def plan(self, device: torch.device) -> HeadPlan:
        """The sizes of both heads' tiles."""
        bases = 1 + self.divergence.with_labels
        return self.head.plan(device).beside(self.ref_dtypes, device, bases)

    def ready(self, policy: Operands, reference: Operands, rows: Optional[Tensor]) -> tuple[Operands, Operands]:
        """Both heads' operands in the dtype of their GEMMs, of some rows."""
        device = policy.hidden.device
        sides = (policy, self.head.dtypes), (reference, self.ref_dtypes)
        own, theirs = (side.ready(rows, dtypes.compute, dtypes.gemm(device)) for side, dtypes in sides)
        return own, theirs


def saved_of(tokens: Tensor) -> Tensor:
    """The `saved` argument of a backend's `gradient` for the policy's rows, from the tokens of its `kl`."""
    return torch.stack([tokens[i] for i in (KLRow.SHIFT, KLRow.NORM, KLRow.LOGP)])


def unit_gradients(like: Tensor, which: int) -> Tensor:
    """[3, n] incoming gradients: 1 for one of them, 0 for the others."""
    grads = like.new_zeros(3, like.numel())
    grads[which] = 1
    return grads


class Memory(NamedTuple):
    """Buffers for a tile of each head. The bases overwrite the logits if the dtypes are the same."""

    own: Buffers
    reference: Buffers


class Logits(NamedTuple):
    """A tile of both heads' logits, [1, rows, columns] each."""

    own: Tensor
    reference: Tensor


class _KLTiles:
    """The common part of forward and backward: both projections and both bases."""

    def __init__(self, settings: KLHead, plan: HeadPlan, policy: Operands, reference: Operands, labels: Tensor) -> None:
        """Operands and labels of the rows that count."""
        self.settings, self.policy, self.reference, self.labels = settings, policy, reference, labels
        self.head, self.divergence = settings.head, settings.divergence
        self.plan, self.run = plan, row_passes(backends.get(settings.head.backend), settings.head.shards)

    def buffers(self, n_rows: int, n_cols: int) -> Memory:
        """Memory for a tile."""
        dtypes = self.head.dtypes.logits, self.settings.ref_dtypes.logits
        return Memory(*(Buffers(self.policy.hidden, dtype, n_rows, n_cols) for dtype in dtypes))

    def project(
        self, rows: slice, columns: slice, weight: Tensor, compute_dtype: torch.dtype, memory: Memory
    ) -> Logits:
        """Both heads' logits; weight: the policy's columns, in compute_dtype or to be cast to it."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        logits = memory.own.logits(*shape), memory.reference.logits(*shape)
        ref_weight = take(self.reference.weight, columns)
        for side, part, compute, out in (
            (self.policy, weight, compute_dtype, logits[0]),
            (self.reference, ref_weight, self.settings.ref_dtypes.compute, logits[1]),
        ):
            block = self.plan.head_block(side.hidden.shape[0], *side.weight.shape)
            side.project(rows, columns, part, compute, out, block)
        return Logits(*(v[None] for v in logits))


class KLForward(_KLTiles):
    """Compares tiles; see `ForwardTiles`."""

    def allocate(self, n_rows: int) -> Memory:
        """Memory for a tile."""
        return self.buffers(n_rows, self.policy.weight.shape[0])

    def unscored(self, n_rows: int) -> tuple[Tensor]:
        """Zeros, and a norm of +inf, which marks a row that does not count."""
        tokens = self.policy.hidden.new_zeros(KLRow.COUNT, n_rows, dtype=self.head.dtypes.sums)
        tokens[KLRow.NORM] = torch.inf
        return (tokens,)

    def begin(self, rows: slice, memory: Memory, kept: Optional[Tensor]) -> Callable[[], Scored]:
        """Project both and start to compare them. Separate row passes compute the bases."""
        weight, labels = self.policy.weight, take(self.labels, rows)
        logits = self.project(rows, slice(0, weight.shape[0]), weight, self.head.dtypes.compute, memory)
        compared = self.run.begin_kl(*logits, labels, self.divergence)

        def finish() -> Scored:
            tokens = compared()
            if kept is None:
                return Scored((tokens,), self.bases(logits, labels, tokens, memory, None))
            n = kept.shape[1]
            if n == labels.numel():
                self.bases(logits, labels, tokens, memory, kept)
            elif n:  # the budget ends within this tile
                first = Logits(*(v[:, :n] for v in logits))
                self.bases(first, labels[:n], tokens[:, :n].contiguous(), memory, kept)
            return Scored((tokens,), [])

        return finish

    def bases(
        self, logits: Logits, labels: Tensor, tokens: Tensor, memory: Memory, kept: Optional[Tensor]
    ) -> list[Tensor]:
        """D and, with labels, D' [n, V]: written into kept [bases, n, V], or over the tiles, the reference's first."""
        shape = logits.own.shape[1:]
        out = [memory.reference.basis(*shape) if kept is None else kept[0]]
        alone = self.divergence._replace(with_labels=False)
        grads = unit_gradients(tokens[0], OF_KL)
        self.run.kl_gradient(*logits, labels, tokens, grads, alone, out[0][None])
        if self.divergence.with_labels:
            out.append(memory.own.basis(*shape) if kept is None else kept[1])
            saved, scaling = saved_of(tokens), self.head.scaling
            self.run.gradient(logits.own, labels, saved, tokens[KLRow.ENTROPY], Grads(), scaling, out[1][None])
        return out


class KLBackward(_KLTiles):
    """Forms gradients of tiles; see `BackwardTiles`."""

    def __init__(
        self,
        settings: KLHead,
        plan: HeadPlan,
        policy: Operands,
        reference: Operands,
        labels: Tensor,
        tokens: Tensor,
        grads: Tensor,
        active: list[bool],
        kept: Kept,
    ) -> None:
        """grads [3, N], of which `active` come in at all; labels [N], tokens [KLRow.COUNT, N] like it."""
        super().__init__(settings, plan, policy, reference, labels)
        self.tokens, self.grads, self.active, self.kept = tokens, grads, active, kept
        self.which = active.index(True)
        one_basis = sum(active) == 1 and not active[OF_ENTROPY]
        self.factors = grads[self.which] if one_basis else None

    def allocate(self, n_rows: int, n_cols: int) -> None:
        """Memory for a tile of each head."""
        self.memory = self.buffers(n_rows, n_cols)

    def tile(self, rows: slice, columns: slice, weight: Tensor) -> Tensor:
        """The gradient from the kept bases, or from new projections."""
        if rows.stop > self.kept.n_rows:
            return self.recompute(rows, columns, weight)
        if self.factors is not None:
            return self.kept.tile(self.which, rows, columns, self.memory.own.basis)
        d = self.kept.tile(OF_KL, rows, columns, self.memory.reference.basis)
        d_logp = self.kept.tile(OF_LOGP, rows, columns, self.memory.own.basis)
        out = self.memory.own.basis(*d.shape)
        g_kl, g_logp, g_entropy = (g[rows].contiguous() for g in self.grads)
        if self.active[OF_ENTROPY]:  # there is no softcap then: see `backward` in kl.py
            tokens = self.tokens[:, rows].contiguous()
            arguments = self.labels[rows].contiguous(), saved_of(tokens), tokens[KLRow.ENTROPY]
            grads, outer = Grads(g_logp, g_entropy), self.head.scaling.outer
            self.run.from_basis(d_logp, *arguments, grads, outer, out, columns.start)
        else:
            torch.mul(d_logp, g_logp[:, None], out=out)
        return out.addcmul_(d, g_kl[:, None])

    def recompute(self, rows: slice, columns: slice, weight: Tensor) -> Tensor:
        """The gradient, or the one basis that is needed, from new projections."""
        compute = self.head.dtypes.compute if weight is self.policy.weight else weight.dtype
        logits = self.project(rows, columns, weight, compute, self.memory)
        labels, tokens = self.labels[rows], self.tokens[:, rows].contiguous()
        out = self.memory.own.basis(*logits.own.shape[1:])
        if len(weight) == len(self.policy.weight) and not self.head.shards.group:  # whole rows: score them anew
            tokens = self.run.begin_kl(*logits, labels, self.divergence)()
        one_basis = self.factors is not None
        grads = unit_gradients(tokens[0], self.which) if one_basis else self.grads[:, rows].contiguous()
        self.run.kl_gradient(*logits, labels - columns.start, tokens, grads, self.divergence, out[None])
        return out
