"""Tiles of logits: their buffers, and the interfaces that score them and compute the basis D. Sizes: see plan.py.

Forward tiles have some rows and the whole vocabulary. logp_tiles.py and kl_tiles.py implement the two kinds; forward.py
and backward.py do the GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional, Protocol

import torch
from torch import Tensor

from fused_po.lm_head.gemm import padded_tile


class Buffers:
    """Buffers for one tile of logits and its basis, allocated on first use, one per dtype."""

    def __init__(self, like: Tensor, logits_dtype: torch.dtype, n_rows: int, n_cols: int) -> None:
        self.like, self.logits_dtype, self.shape = like, logits_dtype, (n_rows, n_cols)
        self.made: dict[torch.dtype, Tensor] = {}

    def _tile(self, dtype: torch.dtype, n_rows: int, n_cols: int) -> Tensor:
        if dtype not in self.made:
            self.made[dtype] = padded_tile(self.like, *self.shape, dtype)
        made = self.made[dtype]
        return made if made.shape == (n_rows, n_cols) else made[:n_rows, :n_cols]

    def logits(self, n_rows: int, n_cols: int) -> Tensor:
        """A tile of logits."""
        return self._tile(self.logits_dtype, n_rows, n_cols)

    def basis(self, n_rows: int, n_cols: int) -> Tensor:
        """A tile of the basis in the dtype of the GEMMs. It overwrites the logits if they have the same dtype."""
        return self._tile(self.like.dtype, n_rows, n_cols)


class Scored(NamedTuple):
    """A forward tile that has been scored."""

    results: tuple[Tensor, ...]  # of its rows, the last dimension of each
    bases: list[Tensor]  # [rows, V] each; of the first rows alone where only they are kept


class ForwardTiles(Protocol):
    """Scores tiles of rows and computes their bases."""

    def allocate(self, n_rows: int) -> object:
        """Memory for a tile."""

    def begin(self, rows: slice, memory: object, kept: Optional[Tensor]) -> Callable[[], Scored]:
        """Project some rows and start to score them. The returned function finishes it.

        kept: [bases, n, V], the buffer for the bases of the first n rows. None: all bases are computed in the tile.
        """

    def unscored(self, n_rows: int) -> tuple[Tensor, ...]:
        """The results of rows that are not scored."""


class Kept(NamedTuple):
    """The bases kept by the forward, and which of them belong to the rows of a backward."""

    bases: Tensor  # [bases, n, V]
    index: Optional[Tensor]  # numbers of the backward's rows among the forward's; None: they are the same
    n_rows: int  # the backward's first rows have theirs here

    @property
    def in_order(self) -> bool:
        """Whether no kept row was dropped."""
        return self.index is None or self.n_rows == self.bases.shape[1]

    def tile(self, which: int, rows: slice, columns: slice, memory: Callable[[int, int], Tensor]) -> Tensor:
        """A basis [rows, columns], copied into `memory` if its rows are not consecutive."""
        basis = self.bases[which]
        if not self.in_order:
            out = memory(rows.stop - rows.start, columns.stop - columns.start)
            return torch.index_select(basis[:, columns], 0, self.index[rows], out=out)
        whole = rows.start == 0 and rows.stop == len(basis) and columns.stop - columns.start == basis.shape[1]
        return basis if whole else basis[rows, columns]


class BackwardTiles(Protocol):
    """Computes the gradient of a tile of logits, from kept bases or from a new projection."""

    kept: Kept
    factors: Optional[Tensor]  # [N]: a row's gradient is this many times the tile's, if one number does for a row

    def allocate(self, n_rows: int, n_cols: int) -> None:
        """Memory for a tile."""

    def tile(self, rows: slice, columns: slice, weight: Tensor) -> Tensor:
        """The gradient [rows, columns] in the raw logits, up to `factors`.

        weight: the columns' rows of the policy's head; a block of them has been cast already.
        """
