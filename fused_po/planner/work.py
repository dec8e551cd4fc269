"""What is planned: the tokens, the head and the loss of one rank, and in what a cost is counted."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_po.ops.head import Head
from fused_po.ops.kl_head import Other

LOSSES = {  # loss -> whether the reference's head runs apart, without gradients; bases of the exact KL
    "logps": (False, 0),
    "dpo": (True, 0),
    "kl": (False, 1),
    "dpo-kl": (False, 2),
}


class Work(NamedTuple):
    """One step of one data-parallel rank, and how it is computed."""

    tokens: int  # rows of hidden: prompts and padding too
    scored: int  # those that are not ignored
    vocab: int  # of the whole head
    hidden: int
    ref_hidden: int
    dtype: torch.dtype  # of hidden and head
    bias: bool
    loss: str  # of LOSSES
    needs: tuple[bool, bool]  # gradients of hidden, of the head
    entropy: bool  # a gradient flows through the entropy too
    tile_bytes: int
    budget: int
    device: torch.device
    sequences: int = 2
    tp: int = 1
    dp: int = 1
    dp_mode: str = "ddp"  # or "fsdp", or "zero3"

    @property
    def columns(self) -> int:
        """Rows of the head on the rank that has most of them."""
        return -(-self.vocab // self.tp)

    @property
    def live_reference(self) -> bool:
        """Whether the reference's head runs in a pass of its own."""
        return LOSSES[self.loss][0]

    @property
    def reference(self) -> Work:
        """The reference's pass of its own."""
        return self._replace(hidden=self.ref_hidden, needs=(False, False), entropy=False, loss="logps")

    @property
    def kl_bases(self) -> int:
        """How many bases a token of `linear_kl` has; 0 where `linear_logps` runs."""
        return LOSSES[self.loss][1]

    @property
    def keep(self) -> str:
        """What make_head of ops/linear_logps.py lets the forward keep."""
        if not any(self.needs):
            return "nothing"
        return "basis" if self.needs[1] or self.entropy else "product"

    @property
    def head(self) -> Head:
        """The policy's head as the ops have it; vocab-parallel, two tiles of half the size are in flight."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        tile, outputs = self.tile_bytes // (1 + (self.tp > 1)), 1 + 2 * self.entropy
        return Head(1.0, None, -100, outputs, self.dtype, wide, tile, self.budget, self.keep, "reference")

    @property
    def other(self) -> Other:
        """The reference's side of `linear_kl`."""
        return Other(1.0, None, self.dtype, self.head.logits_dtype, "reverse", 0.5, self.kl_bases == 2)

    @property
    def kept_rows(self) -> int:
        """Scored tokens whose basis the budget keeps."""
        if self.keep != "basis":
            return 0
        head = self.head._replace(budget=self.budget // max(1, self.kl_bases))
        return min(self.scored, head.rows_within_budget(self.columns, self.device))


class Step(NamedTuple):
    """A part of the work: products, passes over rows of logits, or collectives."""

    name: str
    kind: str  # "gemm", "pass"; "tp" or "dp": collectives among these ranks
    flops: int = 0
    moved: int = 0  # bytes of memory read and written
    sent: int = 0  # bytes this rank sends
    count: int = 1  # of launches
    rounds: int = 1  # round the ring, of a collective
    hidden_by: str = ""  # the step under which a collective runs


class Cost(NamedTuple):
    """What somebody's schedule takes of one rank: its steps, what it holds throughout, and while at its peak."""

    name: str
    steps: list[Step]
    held: dict[str, int]  # bytes of the head, the inputs and the results
    moments: dict[str, dict[str, int]]  # bytes allocated by each moment, results included
    note: str = ""

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def peak(self) -> int:
        """The most bytes allocated at once, results included."""
        return max(sum(moment.values()) for moment in self.moments.values())

    @property
    def at_peak(self) -> tuple[str, dict[str, int]]:
        """(the moment, what is allocated then)."""
        return max(self.moments.items(), key=lambda pair: sum(pair[1].values()))

    @property
    def total(self) -> int:
        """Bytes of inputs, head and everything allocated, at the peak."""
        return sum(self.held.values()) + self.peak
