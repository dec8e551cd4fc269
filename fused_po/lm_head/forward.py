"""The forward of an LM head: it projects and scores one tile of rows after another, and keeps what plan.py decides.

The tiles depend only on shapes, dtypes and tile_bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from torch import Tensor

from fused_po.lm_head.gemm import back_project, take
from fused_po.lm_head.head import Operands
from fused_po.lm_head.plan import BASIS, PRODUCT, HeadPlan, spans
from fused_po.lm_head.tiles import ForwardTiles, Scored


class Forward:
    """One forward over scored rows."""

    def __init__(
        self,
        plan: HeadPlan,
        tiles: ForwardTiles,
        operands: Operands,
        rows: Optional[Tensor],
        kept: Tensor,
        n_all: int,
        split: bool,
    ) -> None:
        """operands: of the scored rows. rows: their indices among all n_all rows, None if all are scored.

        split: the vocabulary is sharded. Each tile is then started while the records of the previous one are gathered.
        """
        self.plan, self.tiles, self.operands, self.rows, self.kept = plan, tiles, operands, rows, kept
        self.n_all, self.split = n_all, split
        self.collected: Optional[tuple[Tensor, ...]] = None

    def run(self, tile_rows: int) -> tuple[Tensor, ...]:
        """The results of all rows."""
        n_rows = self.operands.hidden.shape[0]
        memory = [self.tiles.allocate(min(tile_rows, n_rows)) for _ in range(self.plan.tiles_at_once(self.split))]
        begun: list[tuple[slice, Callable[[], Scored]]] = []
        for number, rows in enumerate(spans(0, n_rows, tile_rows)):
            begun.append((rows, self.tiles.begin(rows, memory[number % len(memory)], self.kept_part(rows))))
            if len(begun) > self.split:
                self.finish(*begun.pop(0))
        for tile in begun:
            self.finish(*tile)
        return self.collected or self.tiles.unscored(self.n_all)

    def kept_part(self, rows: slice) -> Optional[Tensor]:
        """The part of the kept bases for these rows; None if their bases are computed in the tile."""
        if self.plan.keep == PRODUCT:
            return None
        return self.kept[:, rows, : self.operands.weight.shape[0]] if self.plan.keep == BASIS else self.kept

    def finish(self, rows: slice, scored: Callable[[], Scored]) -> None:
        """Collect a tile's results, and keep its product."""
        results, bases = scored()
        where = rows if self.rows is None else take(self.rows, rows)
        if self.rows is None and rows.stop - rows.start == self.n_all:
            self.collected = results
        else:
            self.collected = self.collected or self.tiles.unscored(self.n_all)
            for whole, part in zip(self.collected, results):
                if whole.numel():
                    whole[..., where] = part
        if self.plan.keep == PRODUCT:
            for kept, d in zip(self.kept, bases):
                self.keep_product(kept, d, rows, where)

    def keep_product(self, kept: Tensor, d: Tensor, rows: slice, where: slice | Tensor) -> None:
        """kept[where] = d @ weight."""
        weight, low = self.operands.weight, self.operands.low
        out = take(kept, rows) if self.rows is None else kept.new_empty(len(d), kept.shape[1])
        block = self.plan.head_block(self.operands.hidden.shape[0], *weight.shape)
        back_project(d, weight, self.plan.dtypes.compute, out, block, low)
        if self.rows is not None:
            kept[where] = out
