"""A backend's row passes over logits whose vocabulary is whole, or sharded over the ranks of a process group.

Sharded: each rank computes statistics of its own columns with the usual row passes. It writes them into one record per
token (shift, norm, log-prob of the label, and what the outputs need). One all_gather exchanges the records, and every
rank merges them in rank order, so that all ranks have the same statistics of whole rows. The basis and the gradient of
a rank's columns need nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from fused_po import checks
from fused_po.backend.interface import (
    AuxRow,
    Backend,
    Divergence,
    Grads,
    KLRow,
    Outputs,
    RowStats,
    SavedRow,
    Scaling,
    stats_dtype,
)
from fused_po.parallel.vocab import Shards

# Rows of a record of the exact KL.
KL_RECORD_WITHOUT_LABELS = [KLRow.KL, KLRow.SHIFT, KLRow.NORM, KLRow.REF_SHIFT, KLRow.REF_NORM]
KL_RECORD = [*KL_RECORD_WITHOUT_LABELS, KLRow.LOGP, KLRow.REF_LOGP, KLRow.ENTROPY]


@functools.lru_cache
def column_ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[ranks], the end of each rank's columns."""
    return torch.tensor(sizes, device=device).cumsum(0)


class WholeRows:
    """The row passes of a backend over logits with the whole vocabulary."""

    first_col = 0  # the vocabulary index of the first column on this rank

    def __init__(self, run: Backend) -> None:
        self.run = run

    def begin_score(
        self,
        logits: Tensor,
        labels: Tensor,
        scaling: Scaling,
        ignore_index: int,
        outputs: Outputs,
        basis: Optional[Tensor],
    ) -> Callable[[], RowStats]:
        """Start a backend's `score`. The returned function returns the statistics of whole rows; call it once."""
        return lambda: RowStats(*self.run.score(logits, labels, *scaling, ignore_index, outputs.bits, basis))

    def begin_kl(
        self, logits: Tensor, ref_logits: Tensor, labels: Tensor, divergence: Divergence
    ) -> Callable[[], Tensor]:
        """Start a backend's `kl`. The returned function returns tokens [KLRow.COUNT, N]."""
        return lambda: self.run.kl(logits, ref_logits, labels, *divergence.arguments)

    def gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        saved: Tensor,
        entropy: Tensor,
        grads: Grads,
        scaling: Scaling,
        out: Tensor,
        first_col: int = 0,
    ) -> None:
        """A backend's `gradient`; first_col: the logits' first column, counted from the first one on this rank."""
        self.run.gradient(logits, labels, saved, entropy, *grads, *scaling, out, first_col + self.first_col)

    def from_basis(
        self,
        basis: Tensor,
        labels: Tensor,
        saved: Tensor,
        entropy: Tensor,
        grads: Grads,
        outer: float,
        out: Tensor,
        first_col: int = 0,
    ) -> None:
        """A backend's `from_basis`; first_col as in `gradient`."""
        logps, first = saved[SavedRow.LOGP], first_col + self.first_col
        self.run.from_basis(basis, labels, saved, logps, entropy, *grads, outer, out, first)

    def kl_gradient(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        labels: Tensor,
        tokens: Tensor,
        grads: Tensor,
        divergence: Divergence,
        out: Tensor,
    ) -> None:
        """A backend's `kl_gradient`. Labels are counted from the first column, so another rank's are outside."""
        labels = labels - self.first_col if self.first_col else labels
        self.run.kl_gradient(logits, ref_logits, labels, tokens, grads, *divergence.arguments, out)


class SplitRows(WholeRows):
    """The same over this rank's columns, with results of whole rows. The gather overlaps with the next tile."""

    def __init__(self, run: Backend, shards: Shards) -> None:
        super().__init__(run)
        self.shards, self.group, self.first_col = shards, shards.process_group, shards.start()

    def owners(self, labels: Tensor, scored: Tensor) -> Tensor:
        """[N]: the rank that has the label's column, -1 where a row is not scored."""
        ends = column_ends(tuple(self.shards.sizes), labels.device)
        return torch.where(scored, torch.searchsorted(ends, labels, right=True), -1)

    def local(self, labels: Tensor, owner: Tensor) -> Tensor:
        """Labels counted from the first column here, 0 for another rank's, -1 where a row is not scored."""
        here = torch.where(owner == self.group.rank(), labels - self.first_col, 0)
        return torch.where(owner < 0, -1, here)

    def gather(self, record: Tensor, tag: Tensor) -> Callable[[], Tensor]:
        """Start to gather the records [fields, N] of all ranks. Returns a function that returns [ranks, fields, N].

        tag: an integer that must be equal on all ranks. It is sent as an extra column.
        """
        record = torch.cat([record, tag.to(record.dtype).expand(len(record), 1)], 1)
        everyone = record.new_empty(self.group.size() * len(record), record.shape[1])
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
        work = all_gather(everyone, record, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return checked(everyone.view(-1, *record.shape))

        return finish

    def begin_score(
        self,
        logits: Tensor,
        labels: Tensor,
        scaling: Scaling,
        ignore_index: int,
        outputs: Outputs,
        basis: Optional[Tensor],
    ) -> Callable[[], RowStats]:
        """Start with this rank's part; the returned function does the rest."""
        owner = self.owners(labels, labels != ignore_index)
        record = self.record(logits, self.local(labels, owner), scaling, outputs)
        gathered = self.gather(record, fingerprint(labels))

        def finish() -> RowStats:
            stats = RowStats(*self.run.merge_scores(gathered(), owner, sum(self.shards.sizes), outputs.bits))
            if basis is not None:
                self.gradient(logits, labels, stats.saved, stats.entropy, Grads(), scaling, basis)
            return stats

        return finish

    def record(self, logits: Tensor, labels: Tensor, scaling: Scaling, outputs: Outputs) -> Tensor:
        """The record of this rank's columns for the other ranks: see the backends' `merge_scores`."""
        n_cols = logits.shape[2]
        if not n_cols:
            n_fields = SavedRow.COUNT + outputs.entropy + sum(outputs.auxiliary)
            return no_columns(logits, labels, n_fields, (SavedRow.SHIFT, SavedRow.NORM))
        asked = outputs._replace(logps=False, lse=False)  # both follow from `saved`
        stats = RowStats(*self.run.statistics(logits, labels, *scaling, -1, asked.bits))
        fields = [stats.saved]
        if outputs.entropy:
            fields.append(stats.entropy[None])
        for row, wanted in enumerate(outputs.auxiliary):
            if wanted:  # the sum of logits, not their mean: ranks differ in the number of columns
                fields.append(stats.aux[row, None] * (n_cols if row == AuxRow.MEAN_LOGITS else 1))
        return torch.cat(fields)

    def begin_kl(
        self, logits: Tensor, ref_logits: Tensor, labels: Tensor, divergence: Divergence
    ) -> Callable[[], Tensor]:
        """The same in two steps. The Jensen-Shannon divergence needs a second gather."""
        owner, tag = self.owners(labels, labels >= 0), fingerprint(labels)
        scaling, ref_scaling, direction, with_labels = divergence.arguments
        is_js = divergence.direction == "js"
        if logits.shape[2]:
            own_labels, of_parts = self.local(labels, owner), "reverse" if is_js else direction
            tokens = self.run.kl(logits, ref_logits, own_labels, scaling, ref_scaling, of_parts, with_labels)
        else:
            tokens = no_columns(logits, labels, KLRow.COUNT, (KLRow.SHIFT, KLRow.NORM, KLRow.REF_SHIFT, KLRow.REF_NORM))
        gathered = self.gather(tokens[KL_RECORD if with_labels else KL_RECORD_WITHOUT_LABELS], tag)

        def finish() -> Tensor:
            merged = self.run.merge_kl(gathered(), owner, direction)
            if is_js:
                own = self.run.mixture(logits, ref_logits, merged, scaling, ref_scaling, direction)
                of_p, of_q = self.gather(own, tag)().sum(0)
                merged[KLRow.CENTER] = of_p
                merged[KLRow.KL] = (direction * of_q + (1 - direction) * of_p).clamp_(min=0)
            return merged

        return finish


def no_columns(logits: Tensor, labels: Tensor, n_fields: int, lowest: tuple[int, ...]) -> Tensor:
    """The record [fields, N] of a rank without columns: shifts and norms of -inf."""
    record = logits.new_zeros(n_fields, labels.numel(), dtype=stats_dtype(logits.dtype))
    record[list(lowest)] = -torch.inf
    return record


def fingerprint(labels: Tensor) -> Tensor:
    """A hash below 2^20 of the labels and their order."""
    return (labels * torch.arange(1, labels.numel() + 1, device=labels.device)).sum() % (1 << 20)


def checked(everyone: Tensor) -> Tensor:
    """Records [ranks, fields, N] without the tag column. Different tags are an error on CPU, and NaN elsewhere."""
    tags = everyone[:, 0, -1]
    agree = (tags == tags[0]).all()
    if checks.values_checked(tags):
        if not bool(agree):
            raise ValueError(
                "process_group: its ranks got different labels; hidden states and labels must be the same on all ranks "
                "over which the vocabulary is sharded: pass them the same batch (and use one seed for dropout)"
            )
        return everyone[:, :, :-1]
    return everyone[:, :, :-1].where(agree, torch.nan)


@functools.cache
def whole_rows(run: Backend) -> WholeRows:
    """Those of all columns, made once."""
    return WholeRows(run)


def row_passes(run: Backend, shards: Shards) -> WholeRows:
    """The row passes of a backend, for all columns or for a rank's."""
    return SplitRows(run, shards) if shards.group else whole_rows(run)
