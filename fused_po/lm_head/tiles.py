"""Tiles of logits: their memory, and who scores them and forms the basis D.

Forward tiles are rows x the whole vocabulary. logp_tiles.py and kl_tiles.py have the two kinds; forward.py and
backward.py do the GEMMs around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional, Protocol

import torch
from torch import Tensor

from fused_po.lm_head.gemm import padded_tile


class Buffers:
    """Memory for one tile of logits and one of its basis, allocated when first asked for; one buffer a dtype."""

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
        """A tile of the basis, in the GEMMs' dtype; over the logits if they have it too."""
        return self._tile(self.like.dtype, n_rows, n_cols)


class Scored(NamedTuple):
    """A forward tile that has been scored."""

    results: tuple[Tensor, ...]  # of its rows, the last dimension of each
    bases: list[Tensor]  # [rows, V] each; of the first rows alone where only they are kept


class ForwardTiles(Protocol):
    """Scores tiles of rows, and forms their bases."""

    def allocate(self, n_rows: int) -> object:
        """Memory for a tile."""

    def begin(self, rows: slice, memory: object, kept: Optional[Tensor]) -> Callable[[], Scored]:
        """Project some rows and begin to score them; the function returned ends it.

        kept: [bases, n, V], where the bases of the first n rows belong; None: all bases are formed in the tile.
        """

    def unscored(self, n_rows: int) -> tuple[Tensor, ...]:
        """The results of rows that are not scored."""


class Kept(NamedTuple):
    """Bases kept by the forward, and which of them the rows of a backward have."""

    bases: Tensor  # [bases, n, V]
    index: Optional[Tensor]  # numbers of the backward's rows among the forward's; None: they are the same
    n_rows: int  # the backward's first rows have theirs here

    @property
    def in_order(self) -> bool:
        """Whether no kept row was dropped."""
        return self.index is None or self.n_rows == self.bases.shape[1]

    def tile(self, which: int, rows: slice, columns: slice, memory: Callable[[int, int], Tensor]) -> Tensor:
        """A basis [rows, columns]; in `memory` where its rows do not lie side by side."""
        basis = self.bases[which]
        if not self.in_order:
            n_cols = columns.stop - columns.start
            return torch.index_select(
                basis[:, columns], 0, self.index[rows], out=memory(rows.stop - rows.start, n_cols)
            )
        whole = rows.start == 0 and rows.stop == len(basis) and columns.stop - columns.start == basis.shape[1]
        return basis if whole else basis[rows, columns]


class BackwardTiles(Protocol):
    """Forms the gradient in the logits of a tile, from kept bases or from a projection done again."""

    kept: Kept
    factors: Optional[Tensor]  # [N]: a row's gradient is this many times the tile's, if one number does for a row

    def allocate(self, n_rows: int, n_cols: int) -> None:
        """Memory for a tile."""

    def tile(self, rows: slice, columns: slice, weight: Tensor) -> Tensor:
        """The gradient [rows, columns] in the raw logits, up to `factors`.

        weight: the columns' rows of the policy's head; a block of them has been cast already.
        """
