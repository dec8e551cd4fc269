"""How `linear_logps` computes, never what."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_po import checks

CPU_TILE_BYTES = 64 << 20
GPU_TILE_BYTES = 512 << 20


@dataclass(frozen=True)
class Schedule:
    """How `linear_logps` computes; the results differ by rounding alone.

    tile_bytes: the most bytes a tile of logits may take, above one row; None: 64 MiB on CPU, 512 MiB elsewhere.
        It decides which rows share a GEMM, so policy and reference must use the same.
    logits_dtype: the tile's dtype: torch.float32 (None means it, or float64 for float64 inputs), or the inputs' own
        low precision, which puts about 1e-2 nats of noise on a bf16 log-prob near p = 0.3.
    entropy_grad: False makes the entropy a constant, which saves its part of the backward under torch.compile.
    compact: drop ignored rows before the first GEMM, at the price of one host sync on a GPU. False computes them all.
    """

    tile_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    entropy_grad: bool = True
    compact: bool = True

    def __post_init__(self) -> None:
        if self.tile_bytes is not None:
            if isinstance(self.tile_bytes, bool) or not isinstance(self.tile_bytes, int):
                raise TypeError(f"tile_bytes: got {type(self.tile_bytes).__name__}, expected an int, in bytes")
            if self.tile_bytes <= 0:
                raise ValueError(f"tile_bytes: got {self.tile_bytes}, allowed are ints > 0, in bytes")
        if self.logits_dtype is not None:
            checks.choice("logits_dtype", self.logits_dtype, checks.FLOATS)

    def tile_bytes_on(self, device: torch.device) -> int:
        """The tile's bound on this device."""
        return self.tile_bytes or (CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES)

    def logits_dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The tile's dtype for inputs of `dtype`."""
        default = torch.float64 if dtype == torch.float64 else torch.float32
        chosen = self.logits_dtype or default
        if chosen not in (default, dtype):
            raise ValueError(f"logits_dtype: got {chosen}, allowed for {dtype} inputs are {default} and {dtype}")
        return chosen
