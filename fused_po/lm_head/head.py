"""`Head` and `Operands`: one projection onto the vocabulary, and the settings of the ops on an LM head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po.backend import choose as backends
from fused_po.backend.interface import Outputs, Scaling
from fused_po.lm_head.gemm import operand, project, take
from fused_po.lm_head.plan import BASIS, NOTHING, PRODUCT, Dtypes, HeadPlan, bytes_of_a_tile, padded, what_to_keep
from fused_po.parallel.vocab import WHOLE, Shards
from fused_po.schedule import Schedule, logits_budget


class Head(NamedTuple):
    """How one head is computed."""

    scaling: Scaling
    dtypes: Dtypes
    ignore_index: int
    outputs: Outputs
    keep: str  # see plan.py
    tile_bytes: int  # of one tile
    budget: int  # bytes of the basis that may be kept
    backend: str
    shards: Shards = WHOLE

    def plan(self, device: torch.device) -> HeadPlan:
        """The sizes of its tiles."""
        return HeadPlan(self.keep, self.tile_bytes, self.budget, self.dtypes, self.dtypes.gemm(device))


class Operands(NamedTuple):
    """The operands of a head: raw = hidden @ weight.T + bias.

    A low-rank addition to the head (LoRA: weight + low A) is `low` [V, r]; hidden is then [N, H + r], and its last
    columns are hidden A^T. weight and low are never concatenated.
    """

    hidden: Tensor  # [N, H], or [N, H + r]
    weight: Tensor  # [V, H]
    bias: Optional[Tensor] = None  # [V]
    low: Optional[Tensor] = None  # [V, r]

    def ready(self, rows: Optional[Tensor], compute: torch.dtype, gemm: torch.dtype) -> Operands:
        """Some rows of hidden, and low, in the GEMMs' dtype; the weight is cast block by block when it is used."""
        hidden = operand(self.hidden if rows is None else self.hidden[rows], compute, gemm)
        low = None if self.low is None else operand(self.low, compute, gemm)
        return Operands(hidden, self.weight, self.bias, low)

    def project(
        self, rows: slice, columns: slice, weight: Tensor, compute_dtype: torch.dtype, out: Tensor, block: int
    ) -> None:
        """Write logits [rows, columns]; weight: those columns' rows of the head, in compute_dtype or to be cast."""
        bias = None if self.bias is None else take(self.bias, columns)
        low = None if self.low is None else take(self.low, columns)
        project(take(self.hidden, rows), weight, bias, compute_dtype, out, block, low)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the projection: autocast's, or that of hidden. A lower-precision head is cast to it in blocks."""
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if weight.dtype != hidden.dtype and torch.promote_types(hidden.dtype, weight.dtype) != hidden.dtype:
        raise TypeError(
            f"weight: got dtype {weight.dtype}, expected {hidden.dtype}, the dtype of hidden, or a lower "
            "precision; cast one of them, or run under torch.autocast"
        )
    return hidden.dtype


def dtypes_of(hidden: Tensor, weight: Tensor, schedule: Schedule) -> Dtypes:
    """The dtypes of a head's projection."""
    compute = compute_dtype(hidden, weight)
    return Dtypes(compute, schedule.logits_dtype_for(compute))


def make_head(
    operands: Operands,
    outputs: Outputs,
    ignore_index: int,
    scaling: Scaling,
    backend: Optional[str],
    schedule: Schedule,
    shards: Shards = WHOLE,
) -> Head:
    """How to compute the projection, and what to keep for the backward, which depends on what requires grad."""
    device, dtypes = operands.hidden.device, dtypes_of(operands.hidden, operands.weight, schedule)
    keep = NOTHING
    if torch.is_grad_enabled():
        trained = [v is not None and v.requires_grad for v in operands]
        keep = what_to_keep(trained[0], True in trained[1:], outputs.entropy and schedule.entropy_grad)
    if keep != NOTHING and not outputs.logps:  # a gradient of entropy or lse from the basis needs the log-prob
        outputs = outputs._replace(logps=True)
    budget = 0 if keep == NOTHING else logits_budget(schedule.logits_budget, device)
    tile_bytes = bytes_of_a_tile(schedule.tile_bytes_on(device), bool(shards.group))
    name = backends.resolve(backend, device, dtypes.logits)
    return Head(scaling, dtypes, ignore_index, outputs, keep, tile_bytes, budget, name, shards)


def empty_kept(plan: HeadPlan, hidden: Tensor, weight: Tensor, n_scored, widest: int) -> Tensor:
    """A buffer for what is kept of n_scored tokens: products [bases, N, H], or bases [bases, rows, padded V]."""
    if plan.keep == PRODUCT:
        return hidden.new_empty(plan.bases, *hidden.shape, dtype=plan.dtypes.sums)
    rows = plan.kept_rows(n_scored, widest)
    return hidden.new_empty(plan.bases, rows, padded(weight.shape[0], plan.gemm), dtype=plan.gemm)


def used_bases(kept: Tensor, n_rows: int, n_cols: int) -> Tensor:
    """kept [bases, rows, padded V] without unused rows and the padding; no op where there is nothing to leave out."""
    if kept.shape[1] != n_rows:
        kept = kept[:, :n_rows]
    return kept if kept.shape[2] == n_cols else kept[:, :, :n_cols]


def zero_unused(plan: HeadPlan, kept: Tensor, n_scored: int, n_cols: int, all_scored: bool) -> None:
    """Zero what no tile will write: the result of an op must not contain uninitialized memory."""
    if plan.keep == BASIS:
        for dim, used in ((-1, n_cols), (-2, n_scored)):
            if kept.shape[dim] > used:
                kept.narrow(dim, used, kept.shape[dim] - used).zero_()
    elif plan.keep == PRODUCT and not all_scored:
        kept.zero_()


def without_autocast(run: Callable) -> Callable:
    """Call run without autocast. If memory runs out, free everything and say which setting to lower.

    The first arguments of run are the head and its operands.
    """

    @functools.wraps(run)
    def guarded(head: Head, operands: Operands, *arguments, **options):
        device = operands.hidden.device.type
        cast = device != "meta" and torch.is_autocast_enabled(device)
        try:
            if not cast:
                return run(head, operands, *arguments, **options)
            with torch.autocast(device, enabled=False):
                return run(head, operands, *arguments, **options)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            message = str(error)
        # Raised outside the handler: the first error refers to frames that hold the tiles.
        raise torch.OutOfMemoryError(
            f"fused_po: out of memory in the LM head. Lower Schedule.logits_budget (now {head.budget} bytes kept from "
            f"forward to backward) or Schedule.tile_bytes (now {head.tile_bytes} bytes per tile). {message}"
        )

    return guarded
