"""What a head keeps from forward to backward, and the sizes of the tiles of both.

The numbers follow from shapes, dtypes and limits in bytes. The ops use them, and `fused_po.planner` computes costs from
them. A GEMM over all scored tokens counts as 1. For one token, the basis is D = d logp / d raw, a row of V numbers that
does not depend on the loss. For any loss with the derivative g with respect to that log-prob, d hidden = g D W,
d weight = D^T (g hidden), d bias = D^T g.

    keep        forward                        backward
    "nothing"   1: scores                      nothing, or as over the budget
    "product"   2: scores, then u = D W        0: d hidden = g u                      (the head is frozen)
    "basis"     1: scores, D kept              2: D W, D^T (g hidden), or one of them
    over the budget: 1                         3: the tile and D again, then the same

With the exact KL of two heads, D = d KL / d raw, and with labels D' = d logp / d raw as a second basis; the gradient is
g D + g' D'. The reference's projection counts as one more GEMM if it is as wide:

    "nothing"   2: both projections            as over the budget
    "product"   3: and D W (4 with labels)     0
    "basis"     2: D kept, with labels D' too  2: D W, D^T (g hidden)
    over the budget: 2                         4: both projections again, then the same
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

NOTHING, PRODUCT, BASIS = "nothing", "product", "basis"
ROW_BYTES = 64  # rows of logits start at multiples of it: aligned vector loads and leading dimensions of GEMMs
BLOCK_ROWS = 2048  # tokens beyond which a block of the head does not shrink further


class Needs(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool
    low: bool = False  # the second factor of a LoRA on the head


def what_to_keep(hidden: bool, head: bool, entropy: bool) -> str:
    """What the forward keeps for these gradients. entropy: whether the entropy has a gradient too."""
    if not hidden and not head:
        return NOTHING
    return BASIS if head or entropy else PRODUCT


def bytes_of_a_tile(tile_bytes: int, split: bool) -> int:
    """The bytes of one tile. With a sharded vocabulary two tiles exist at once and share tile_bytes."""
    return max(1, tile_bytes // (2 if split else 1))


def padded(n_cols: int, dtype: torch.dtype) -> int:
    """The number of columns of a row of logits with padding."""
    unit = ROW_BYTES // dtype.itemsize
    return (n_cols + unit - 1) // unit * unit


def spans(begin: int, end: int, step: int) -> list[slice]:
    """[begin, end) in pieces of `step`."""
    return [slice(at, min(at + step, end)) for at in range(begin, end, max(1, step))]


class Dtypes(NamedTuple):
    """The dtypes of one head's projection."""

    compute: torch.dtype  # of the factors: the inputs' or autocast's
    logits: torch.dtype

    def gemm(self, device: torch.device) -> torch.dtype:
        """Of the GEMMs' operands and of the basis: a CPU needs operands as wide as the sums, a GPU does not."""
        return self.compute if device.type == "cuda" else self.logits

    @property
    def sums(self) -> torch.dtype:
        """Of statistics, and of sums of gradients."""
        return torch.float64 if self.logits == torch.float64 else torch.float32


class HeadPlan(NamedTuple):
    """Sizes of the tiles of one head, or of two heads for the exact KL, on one device."""

    keep: str
    tile_bytes: int  # of one tile
    budget: int  # bytes of the basis that may be kept
    dtypes: Dtypes
    gemm: torch.dtype  # of the GEMMs' operands, and of the basis
    ref_logits: Optional[torch.dtype] = None  # of the reference's tile, where there are two heads
    ref_gemm: Optional[torch.dtype] = None  # of its basis
    bases: int = 1  # of each token

    def beside(self, dtypes: Dtypes, device: torch.device, bases: int) -> HeadPlan:
        """With the reference's head beside it, of these dtypes; both bases have the policy's compute dtype."""
        reference = self.dtypes._replace(logits=dtypes.logits)
        return self._replace(ref_logits=dtypes.logits, ref_gemm=reference.gemm(device), bases=bases)

    @staticmethod
    def _rows_of(logits: torch.dtype, gemm: torch.dtype, tile_bytes: int, n_cols: int) -> int:
        """Rows of one head's tile, with its logits, and its basis if that needs a separate buffer."""
        row = padded(n_cols, logits) * logits.itemsize
        if gemm != logits:
            row += padded(n_cols, gemm) * gemm.itemsize
        return max(1, tile_bytes // row)

    def tile_rows(self, n_cols: int) -> int:
        """Rows of a tile of n_cols columns, of all heads within tile_bytes."""
        if self.ref_logits is None:
            return self._rows_of(self.dtypes.logits, self.gemm, self.tile_bytes, n_cols)
        sides, half = ((self.dtypes.logits, self.gemm), (self.ref_logits, self.ref_gemm)), self.tile_bytes // 2
        return min(self._rows_of(*side, half, n_cols) for side in sides)

    def rows_within_budget(self, n_cols: int) -> int:
        """The number of tokens whose bases fit in the budget."""
        return self.budget // self.bases // (padded(n_cols, self.gemm) * self.gemm.itemsize)

    def kept_rows(self, n_scored, n_cols: int):
        """How many of n_scored tokens have their bases kept; n_scored may be symbolic."""
        if self.keep != BASIS:
            return 0
        within = self.rows_within_budget(n_cols)
        return min(n_scored, within) if type(n_scored) is int else torch.sym_min(n_scored, within)

    def tiles_at_once(self, split: bool) -> int:
        """The number of forward tiles in memory. split: the vocabulary is sharded, so two tiles overlap in time.

        Without bases and without a reference, the logits of a tile are not read again after its own scoring.
        """
        return 2 if split and (self.keep != NOTHING or self.ref_logits is not None) else 1

    def in_place(self, n_formed: int, n_rows: int) -> bool:
        """Whether the basis of n_formed rows of a tile of n_rows is formed over the tile's logits."""
        return n_formed == n_rows and self.gemm == self.dtypes.logits and self.ref_logits is None

    def head_block(self, n_rows: int, n_cols: int, width: int) -> int:
        """Rows of the head that are cast, or whose gradient is summed, at once; as fp32 they fit into tile_bytes."""
        block = max(1, min(n_cols, self.tile_bytes // (4 * max(1, width, min(n_rows, BLOCK_ROWS)))))
        return block if block < ROW_BYTES else block // ROW_BYTES * ROW_BYTES

    def backward(self, p: BackwardPass) -> BackwardPlan:
        """The pieces of a backward."""
        in_one = p.one_factor_per_row and p.kept_in_order and p.n_kept == p.n_rows and p.weight_dtype == self.gemm
        written_directly = not p.need_weight or p.grad_dtype == self.dtypes.sums or in_one
        block = self.head_block(p.n_rows, p.n_cols, p.width)
        columns = p.n_cols if written_directly else block
        rows = max(1, min(self.tile_rows(columns), p.n_rows))
        return BackwardPlan(
            written_directly, block, columns, rows, p.n_kept if p.one_factor_per_row and p.kept_in_order else rows
        )


class BackwardPass(NamedTuple):
    """What the pieces of a backward depend on."""

    n_rows: int
    n_kept: int  # the first rows have their bases kept
    n_cols: int  # of the rank that has most: pieces are the same on all ranks
    width: int
    weight_dtype: torch.dtype
    grad_dtype: torch.dtype  # of the head's gradient as it is written
    need_weight: bool
    one_factor_per_row: bool  # each row's gradient is a number times one basis
    kept_in_order: bool = True  # no kept row was dropped


class BackwardPlan(NamedTuple):
    """The tiles of a backward.

    A recomputed tile gets a new lse, because p sums to 1 only with the lse of the same logits. The exception is the
    gradient of a low-precision head that needs fp32 sums: it is computed in blocks of the vocabulary, which use the lse
    of the forward; the rounding of D is larger than the difference.
    """

    written_directly: bool  # the head's gradient needs no fp32 buffer: it is that wide, or a single GEMM computes it
    block: int  # rows of the head that are cast at once
    columns: int  # of a tile
    rows: int  # of a tile
    kept_rows: int  # of a GEMM over kept bases

    def pieces(self, n_kept: int, n_rows: int) -> list[slice]:
        """The rows of each GEMM: kept ones first."""
        return spans(0, n_kept, self.kept_rows) + spans(n_kept, n_rows, self.rows)
