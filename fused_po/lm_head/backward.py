"""The backward of an LM head: GEMMs from the gradients of tiles of logits to the gradients of the operands.

logp_tiles.py and kl_tiles.py compute the gradient of a tile. plan.py decides what is kept and the sizes of tiles.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po.lm_head.gemm import add_product, back_project, mm, operand, take
from fused_po.lm_head.head import Operands
from fused_po.lm_head.plan import BackwardPass, HeadPlan, Needs, spans
from fused_po.lm_head.tiles import BackwardTiles
from fused_po.parallel.vocab import Shards


class Gradients(NamedTuple):
    """Gradients of a head's operands; without elements where not needed."""

    hidden: Tensor  # [N, H], or [N, H + r]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    low: Tensor  # [V, r]

    @staticmethod
    def empty(operands: Operands, needs: Needs, hidden: Tensor) -> Gradients:
        """Uninitialised, with hidden's as given; where not needed, no elements, of that dtype and device."""
        weight = operands.weight
        head = [
            torch.empty_like(v, memory_format=torch.contiguous_format)
            if need and v is not None
            else (weight if v is None else v).new_empty(0)
            for v, need in zip(operands[1:], needs[1:])
        ]
        return Gradients(hidden, *head)

    @staticmethod
    def fake(operands: Operands, needs: Needs) -> Gradients:
        """Shapes and dtypes of an op's results."""
        hidden = operands.hidden
        return Gradients.empty(operands, needs, hidden.new_empty(hidden.shape if needs.hidden else 0))


class ThinSums:
    """The gradients of a bias and of `low`: products with few columns, summed more exactly than by a GEMM."""

    def __init__(self, operands: Operands, needs: Needs, g: Tensor, scaled: Tensor, sums: torch.dtype) -> None:
        """g [N, 1]: factors of the rows. scaled [N, H + r]: hidden times g."""
        n_cols, width = operands.weight.shape
        first = width if needs.low else scaled.shape[1]
        self.thin = torch.cat([g.to(scaled.dtype)[:, : needs.bias], scaled[:, first:]], 1)
        wide = torch.float64 if scaled.device.type == "cpu" else sums
        self.total = scaled.new_zeros(n_cols, self.thin.shape[1], dtype=wide)

    def add(self, d: Tensor, rows: slice, columns: slice) -> None:
        """The part of some rows and columns."""
        add_product(d, self.thin[rows], self.total[columns])

    def write(self, grads: Gradients, needs: Needs, accumulate: bool) -> None:
        """Into the gradients."""
        if needs.bias:
            grads.bias.copy_(self.total[:, 0] + grads.bias if accumulate else self.total[:, 0])
        if needs.low:
            grads.low.copy_(self.total[:, needs.bias :])


class Backward:
    """One backward. The bases of the first rows are kept; the other rows are projected again."""

    def __init__(
        self,
        plan: HeadPlan,
        shards: Shards,
        tiles: BackwardTiles,
        operands: Operands,
        grads: Gradients,
        needs: Needs,
        accumulate: bool,
    ) -> None:
        """operands: hidden and low in the GEMMs' dtype, of the rows of the backward.

        grads: hidden's as wide as the sums. accumulate: weight's and bias's are added to what is there.
        """
        self.dtypes, self.shards, self.tiles, self.operands = plan.dtypes, shards, tiles, operands
        self.grads, self.needs, self.accumulate = grads, needs, accumulate
        hidden, weight = operands.hidden, operands.weight
        n_rows, (self.n_cols, self.width) = hidden.shape[0], weight.shape
        kept, widest = tiles.kept, shards.widest(self.n_cols)
        self.sizes = plan.backward(
            BackwardPass(
                n_rows=n_rows,
                n_kept=kept.n_rows,
                n_cols=widest,
                width=self.width,
                weight_dtype=weight.dtype,
                grad_dtype=grads.weight.dtype,
                need_weight=needs.weight,
                one_factor_per_row=tiles.factors is not None,
                kept_in_order=kept.in_order,
            )
        )
        self.pieces = self.sizes.pieces(kept.n_rows, n_rows)
        tiles.allocate(self.sizes.rows, min(self.sizes.columns, self.n_cols))
        self.prepare(plan)

    def prepare(self, plan: HeadPlan) -> None:
        """Prepare what all tiles use: factors, scaled hidden states, buffers for sums."""
        hidden, needs, factors = self.operands.hidden, self.needs, self.tiles.factors
        some_head = needs.weight or needs.low
        self.factors = None if factors is None else factors[:, None]
        scaled = (hidden * self.factors).to(hidden.dtype) if some_head and factors is not None else hidden
        self.thin: Optional[ThinSums] = None
        if needs.bias or needs.low:
            g = hidden.new_ones(len(hidden), 1, dtype=plan.dtypes.sums) if factors is None else self.factors
            self.thin = ThinSums(self.operands, needs, g, scaled, plan.dtypes.sums)
        self.scaled_hidden = take_columns(scaled, self.width)
        self.block_sum: Optional[Tensor] = None
        if not self.sizes.written_directly:
            rows = min(self.sizes.columns, self.n_cols)
            self.block_sum = hidden.new_empty(rows, self.width, dtype=plan.dtypes.sums)

    def run(self) -> None:
        """Write all gradients."""
        if not self.pieces and self.needs.weight and not self.accumulate:
            self.grads.weight.zero_()
        waiting = []
        for columns in spans(0, self.n_cols, self.sizes.columns) or [slice(0, 0)]:
            waiting += self.block(columns)
        for work in waiting:
            work.wait()
        if self.needs.hidden and self.factors is not None:
            self.grads.hidden.mul_(self.factors)
        if self.thin is not None:
            self.thin.write(self.grads, self.needs, self.accumulate)

    def block(self, columns: slice) -> list:
        """Add the tiles of some columns to each gradient. Returns the all-reduces that were started."""
        weight, written_directly = self.operands.weight, self.sizes.written_directly
        gemm = self.operands.hidden.dtype
        part = weight if written_directly else operand(take(weight, columns), self.dtypes.compute, gemm)
        total = self.grads.weight if written_directly else self.block_sum[: part.shape[0]]
        waiting = []
        for rows in self.pieces:
            d = self.tiles.tile(rows, columns, part)
            if self.needs.hidden:
                waiting += self.add_hidden(d, rows, columns, part)
            if self.needs.weight:
                mm(d.t(), take(self.scaled_hidden, rows), total, add=rows.start > 0 or self.accumulate)
            if self.thin is not None:
                self.thin.add(d, rows, columns)
        if self.needs.weight and not written_directly and self.pieces:
            self.grads.weight[columns] = total
        return waiting

    def add_hidden(self, d: Tensor, rows: slice, columns: slice, part: Tensor) -> list:
        """Add the part of these columns to the gradient of hidden. After the last one, start the all-reduce."""
        low = None if self.operands.low is None else self.operands.low[columns]
        compute = self.dtypes.compute if part is self.operands.weight else part.dtype
        out = take(self.grads.hidden, rows)
        back_project(d, part, compute, out, self.sizes.block, low, add=columns.start > 0)
        if self.shards.adds_up and columns.stop == self.n_cols:
            return [self.shards.add_up(out)]
        return []


def take_columns(value: Tensor, width: int) -> Tensor:
    """value[:, :width]; the tensor itself if that is all of it."""
    return value if value.shape[1] == width else value[:, :width]
