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

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.ops import backend as backends
from fused_po.ops.gemm import back_project, gemm_dtype, head_block, operand, padded, project, room, spans, take
from fused_po.ops.logps import fake_stats
from fused_po.parallel import Shards, row_passes
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
    group: str = ""  # where the vocabulary is cut over ranks: see Shards
    sizes: Sequence[int] = ()
    partial: bool = False

    @property
    def shards(self) -> Shards:
        """Where the vocabulary lies."""
        return Shards(self.group, tuple(self.sizes), self.partial)

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

    def kept_like(self, hidden: Tensor, n_rows, weight: Tensor) -> tuple[tuple, torch.dtype]:
        """Shape and dtype of what is kept of n_rows scored tokens among hidden [N, H]."""
        if self.keep == "product":
            return hidden.shape, stats_dtype(self.logits_dtype)
        n_cols, gemm, rows = weight.shape[0], self.gemm(hidden.device), 0
        if self.keep == "basis":
            within = self.rows_within_budget(self.shards.widest(n_cols), hidden.device)
            rows = min(n_rows, within) if type(n_rows) is int else torch.sym_min(n_rows, within)
        return (rows, padded(n_cols, gemm)), gemm

    def empty_kept(self, hidden: Tensor, n_rows, weight: Tensor) -> Tensor:
        """Room for it."""
        shape, dtype = self.kept_like(hidden, n_rows, weight)
        return hidden.new_empty(shape, dtype=dtype)


class Saved(NamedTuple):
    """What a backward gets of its forward."""

    hidden: Tensor  # [N, H], or [N, H + r]
    weight: Tensor
    bias: Optional[Tensor]
    labels: Tensor  # [N]
    rows: Optional[Tensor]  # [n]
    stats: Tensor  # [SAVED_FIELDS, N]
    entropy: Tensor
    kept: Tensor
    low: Optional[Tensor] = None  # [V, r]


def guarded(run: Callable) -> Callable:
    """Run without autocast; if memory ends, say what to lower, and leave nothing that was allocated behind."""

    @functools.wraps(run)
    def guard(head: Head, tensors: Tensor | Saved, *arguments, **options):
        device = (tensors if isinstance(tensors, Tensor) else tensors.hidden).device.type
        cast = device != "meta" and torch.is_autocast_enabled(device)
        try:
            with torch.autocast(device, enabled=False) if cast else contextlib.nullcontext():
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
    if checks.none_ignored(labels, ignore_index):
        return None
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
        made = self.made[dtype]
        return made if made.shape == (n_rows, n_cols) else made[:n_rows, :n_cols]

    def logits(self, n_rows: int, n_cols: int) -> Tensor:
        return self._tile(self.head.logits_dtype, n_rows, n_cols)

    def basis(self, n_rows: int, n_cols: int) -> Tensor:
        return self._tile(self.like.dtype, n_rows, n_cols)


class Tile(NamedTuple):
    """A tile that has been projected, and whose scoring has begun."""

    some: slice  # its rows
    logits: Tensor
    d: Tensor  # room for the basis of its first rows, of all or of none
    stats: Callable[[], tuple[Tensor, ...]]


def in_turns(run, pieces: list[slice], rooms: list) -> None:
    """run.begin(rows, room) for each piece, and run.finish of what it returned, `run.in_flight` pieces later."""
    begun = []
    for number, some in enumerate(pieces):
        begun.append(run.begin(some, rooms[number % len(rooms)]))
        if len(begun) > run.in_flight:
            run.finish(begun.pop(0))
    for tile in begun:
        run.finish(tile)


class HeadForward:
    """One forward: tiles are begun, then finished, where other ranks have a part in it one tile later."""

    def __init__(self, head: Head, operands: tuple, labels: Tensor, rows: Optional[Tensor], kept: Tensor,
                 n_all: int) -> None:  # fmt: skip
        """operands: (hidden, weight, bias, low) and labels of the scored rows; kept: of n_all rows."""
        self.head, self.labels, self.rows, self.kept, self.n_all = head, labels, rows, kept, n_all
        self.hidden, self.weight, self.bias, self.low = operands
        self.made: Optional[tuple[Tensor, ...]] = None
        shards = head.shards
        self.run = row_passes(backends.get(head.backend), shards)
        n_rows, n_cols, device = self.hidden.shape[0], self.weight.shape[0], self.hidden.device
        self.step = head.tile_rows(shards.widest(n_cols), device)
        self.block = head_block(n_rows, *self.weight.shape, head.tile_bytes)
        shape = min(self.step, n_rows), n_cols
        # A tile whose basis is formed when other ranks have answered lies beside the next one.
        self.in_flight = 1 if head.group else 0
        turns = 2 if head.group and head.keep != "nothing" else 1
        self.buffers = [Buffers(head, self.hidden, *shape) for _ in range(turns)]

    def results(self) -> tuple[Tensor, ...]:
        """(logps, entropy, lse, aux, saved) of all rows, once every tile is in them."""
        in_turns(self, spans(0, self.hidden.shape[0], self.step), self.buffers)
        return self.made or self.unscored()

    def unscored(self) -> tuple[Tensor, ...]:
        """Results of all rows before any tile is in them."""
        made = fake_stats(self.hidden.new_empty(0, dtype=self.head.logits_dtype), self.n_all, self.head.outputs)
        if self.rows is not None:
            for result in made:
                result.zero_()
            made[4][1] = torch.inf
        return made

    def begin(self, some: slice, buffers: Buffers) -> Tile:
        """Project some rows, and begin to score them."""
        head, count, n_cols = self.head, some.stop - some.start, self.weight.shape[0]
        d = self.kept  # of no rows where nothing is kept
        if head.keep != "nothing":
            d = buffers.basis(count, n_cols) if head.keep == "product" else d[some, :n_cols]
        n_kept = d.shape[0]
        logits = d if d.dtype == head.logits_dtype and n_kept == count else buffers.logits(count, n_cols)
        states = take(self.hidden, some)
        project(states, self.weight, self.bias, head.compute_dtype, logits, self.block, self.low)
        scored = logits[None]
        basis = None if n_kept != count else scored if d is logits else d[None]
        how = head.outer, head.inner, head.ignore_index, head.outputs, basis
        return Tile(some, logits, d, self.run.begin_score(scored, take(self.labels, some), *how))

    def finish(self, tile: Tile) -> None:
        """Store a tile's statistics, and what is kept of it."""
        head, (some, logits, d, stats) = self.head, tile
        stats, count = stats(), some.stop - some.start
        if 0 < d.shape[0] < count:  # the budget ends within this tile
            part, saved = slice(some.start, some.start + len(d)), stats[4][:, : len(d)].contiguous()
            grads, scaling = (None, None, None), (head.outer, head.inner)
            self.run.gradient(logits[None, : len(d)], self.labels[part], saved, stats[1], *grads, *scaling, d[None])
        where = some if self.rows is None else take(self.rows, some)
        if self.rows is None and count == self.n_all:
            self.made = stats
        else:
            self.made = self.made or self.unscored()
            for result, value in zip(self.made, stats):
                if result.numel():
                    result[..., where] = value
        if head.keep == "product":
            product = take(self.kept, some) if self.rows is None else self.kept.new_empty(count, self.kept.shape[1])
            back_project(d, self.weight, head.compute_dtype, product, self.block, self.low)
            if self.rows is not None:
                self.kept[where] = product


def clear_unused(kept: Tensor, n_rows: int, n_cols: int) -> None:
    """Zero what lies beyond kept[..., n_rows, n_cols]: an op's result must not hold what was in memory before."""
    for dim, used in ((-1, n_cols), (-2, n_rows)):
        if kept.shape[dim] > used:
            kept.narrow(dim, used, kept.shape[dim] - used).zero_()


@guarded
def forward(
    head: Head, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, rows: Optional[Tensor],
    n_room: int, low: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, entropy, lse, aux, saved, kept) of hidden [N, H], labels [N]; with low [V, r], hidden is [N, H + r].

    rows [n]: numbers of the rows that are scored, None for all. n_room: at least n, rows to hold room for in `kept`.
    """
    n_all, kept = labels.numel(), head.empty_kept(hidden, n_room, weight)
    if head.keep == "basis":
        clear_unused(kept, n_all if rows is None else rows.numel(), weight.shape[0])
    elif head.keep == "product" and rows is not None:
        kept.zero_()
    factor = head.gemm(hidden.device)
    hidden = operand(take_rows(hidden, rows), head.compute_dtype, factor)
    low = None if low is None else operand(low, head.compute_dtype, factor)
    run = HeadForward(head, (hidden, weight, bias, low), take_rows(labels, rows), rows, kept, n_all)
    return *run.results(), kept
