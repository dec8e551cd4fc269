"""Select the tokens to compute: without ignored ones, within `num_scored`, and in the backward with a gradient."""

from __future__ import annotations

from typing import NamedTuple, Optional, TypeVar

import torch
from torch import Tensor

from fused_po import checks
from fused_po.lm_head.tiles import Kept
from fused_po.schedule import Schedule

R = TypeVar("R", bound=tuple)


class ScoredTokens(NamedTuple):
    """The tokens that a forward computes."""

    rows: Optional[Tensor]  # [n] their numbers, None for all
    find: bool  # the op itself looks for them: no shape outside it may depend on the labels
    excess: Optional[Tensor] = None  # NaN if more tokens are scored than num_scored says, else 0

    @staticmethod
    def of(labels: Tensor, ignore_index: int, schedule: Schedule) -> ScoredTokens:
        """By labels [N] and a schedule."""
        if schedule.num_scored is not None:
            rows, excess = bounded_rows(labels, ignore_index, schedule.num_scored)
            return ScoredTokens(rows, False, excess)
        if schedule.compact and checks.has_values(labels) and not torch._C._are_functorch_transforms_active():
            return ScoredTokens(scored_rows(labels, ignore_index), False)
        return ScoredTokens(None, schedule.compact)

    def checked(self, results: R) -> R:
        """The op's results; those for callers are NaN if more tokens are scored than the schedule says."""
        if self.excess is None:
            return results
        return type(results)(*(value + self.excess for value in results[:4]), *results[4:])


class Dropping(NamedTuple):
    """Which tokens an op drops."""

    ignored: bool  # those whose label is ignored: see ScoredTokens.find
    zero_gradients: bool  # in the backward, those whose incoming gradient is 0: see Schedule.skip_zero_rows


def scored_rows(labels: Tensor, ignore_index: int) -> Optional[Tensor]:
    """Indices [n] of the tokens that are not ignored, or None if no token is. The only host sync of a GPU forward."""
    if checks.none_ignored(labels, ignore_index):
        return None
    rows = (labels != ignore_index).nonzero().squeeze(1)
    return None if rows.numel() == labels.numel() else rows


def bounded_rows(labels: Tensor, ignore_index: int, bound: int) -> tuple[Tensor, Tensor]:
    """(indices [bound] of the scored tokens, padded with an ignored one; NaN if there are more of them, else 0)."""
    if bound > labels.numel():
        raise ValueError(f"num_scored: got {bound}, allowed are 0 to {labels.numel()}, the number of labels")
    scored = labels != ignore_index
    count = scored.sum()
    if checks.values_checked(labels) and count > bound:
        raise ValueError(
            f"num_scored: got {bound}, but {int(count)} labels are not ignore_index={ignore_index}; pass at least that"
        )
    rows = torch.nonzero_static(scored, size=bound, fill_value=-1).squeeze(1)
    if bound:  # argmin fails without labels
        rows = torch.where(rows < 0, scored.int().argmin(), rows)
    return rows, torch.where(count > bound, torch.nan, 0.0)


class LiveRows(NamedTuple):
    """The rows of a backward without those that have no gradient."""

    rows: Optional[Tensor]  # numbers among all tokens, None for all
    index: Optional[Tensor]  # numbers among the rows of the forward, None for all
    n_kept: int  # the first of them have their bases kept

    @staticmethod
    def of(live: Tensor, rows: Optional[Tensor], n_kept: int) -> LiveRows:
        """By whether each row of the forward is live; rows: their numbers among all tokens."""
        n_live, n_kept = count_live(live, n_kept)
        if n_live == live.numel():
            return LiveRows(rows, None, n_kept)
        index = torch.nonzero_static(live, size=n_live).squeeze(1)
        return LiveRows(index if rows is None else rows[index], index, n_kept)

    def kept(self, bases: Tensor) -> Kept:
        """Their bases, of those [bases, n, V] that the forward kept."""
        return Kept(bases, self.index, self.n_kept)


def count_live(live: Tensor, n_kept: int) -> tuple[int, int]:
    """(how many rows are live, how many of the first n_kept): one sync on a GPU."""
    if n_kept in (0, live.numel()):
        n_live = int(torch.count_nonzero(live))
        return n_live, n_live if n_kept else 0
    n_live, n_kept = torch.stack([live.sum(), live[:n_kept].sum()]).tolist()
    return n_live, n_kept


def scatter_rows(values: Tensor, rows: Optional[Tensor], like: Tensor) -> Tensor:
    """values [n, H] as rows of a tensor like `like` [N, H], 0 elsewhere; in its dtype."""
    if rows is None:
        return values.to(like.dtype)
    return torch.zeros_like(like, memory_format=torch.contiguous_format).index_copy_(0, rows, values.to(like.dtype))
