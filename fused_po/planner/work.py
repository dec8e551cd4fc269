"""What is planned: the tokens, the head and the loss of one rank, and in what a cost is counted."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_po.lm_head.plan import Dtypes, HeadPlan, bytes_of_a_tile, what_to_keep

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
        """Whether the head of the reference runs in a separate pass."""
        return LOSSES[self.loss][0]

    @property
    def reference(self) -> Work:
        """The separate pass of the reference."""
        return self._replace(hidden=self.ref_hidden, needs=(False, False), entropy=False, loss="logps")

    @property
    def kl_bases(self) -> int:
        """How many bases a token of `linear_kl` has; 0 where `linear_logps` runs."""
        return LOSSES[self.loss][1]

    @property
    def keep(self) -> str:
        """What the forward keeps."""
        return what_to_keep(*self.needs, self.entropy)

    @property
    def dtypes(self) -> Dtypes:
        """Of the policy's head."""
        return Dtypes(self.dtype, torch.float64 if self.dtype == torch.float64 else torch.float32)

    @property
    def plan(self) -> HeadPlan:
        """The sizes of tiles by which the ops run."""
        tile_bytes, bases = bytes_of_a_tile(self.tile_bytes, self.tp > 1), max(1, self.kl_bases)
        plan = HeadPlan(self.keep, tile_bytes, self.budget, self.dtypes, self.dtypes.gemm(self.device))
        return plan.beside(self.dtypes, self.device, bases) if self.kl_bases else plan

    @property
    def kept_rows(self) -> int:
        """Scored tokens whose basis the budget keeps."""
        return self.plan.kept_rows(self.scored, self.columns)


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
    """The cost of an implementation on one rank: its steps, and the memory that it holds throughout and at its peak."""

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
