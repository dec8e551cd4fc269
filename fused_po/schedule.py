"""How `linear_logps` computes, never what."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from fused_po import checks

CPU_TILE_BYTES = 128 << 20
GPU_TILE_BYTES = 512 << 20
CPU_BUDGET = 1 << 30
BUDGET_VARIABLE = "FUSED_PO_LOGITS_BUDGET"


def device_memory(device: torch.device) -> int:
    """Bytes of memory the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()


@functools.cache
def host_memory() -> int:
    """Bytes of memory the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62


def default_budget(device: torch.device, memory: int) -> int:
    """Bytes for the kept basis on such a device with so much memory, where nobody says."""
    return min(CPU_BUDGET, memory // 4) if device.type == "cpu" else memory // 32


def chosen_budget(device: torch.device) -> int:
    """Bytes for the kept basis on this device where the schedule leaves it open: the variable's, or the default."""
    text = os.environ.get(BUDGET_VARIABLE)
    if text is None:
        return default_budget(device, device_memory(device))
    if not text.isdecimal():
        raise ValueError(f"{BUDGET_VARIABLE}: got {text!r}, allowed are whole numbers >= 0, in bytes")
    return within_memory(BUDGET_VARIABLE, int(text), device)


# torch.compile takes these as constants of the graph. Why not the decorator: see ops/backend.py.
device_memory._dynamo_marked_constant = True
chosen_budget._dynamo_marked_constant = True


def within_memory(name: str, budget: int, device: torch.device) -> int:
    """`budget` if the device has as many bytes."""
    memory = device_memory(device)
    if budget > memory:
        message = "{}: got {} bytes, allowed on {} are 0 to {}, all its memory; what is not needed is not allocated"
        raise ValueError(message.format(name, budget, device, memory))
    return budget


def logits_budget(budget: int | None, device: torch.device) -> int:
    """Bytes for the kept basis on this device: the one asked for, or the variable's, or the default."""
    if device.type == "meta":
        return CPU_BUDGET if budget is None else budget
    return chosen_budget(device) if budget is None else within_memory("logits_budget", budget, device)


@dataclass(frozen=True)
class Schedule:
    """How `linear_logps` computes; the results differ by rounding alone.

    logits_budget: bytes for what a trainable head (or an entropy with gradients) keeps of each token from forward to
        backward: a row of V numbers, which spares the backward one GEMM. Tokens beyond the budget project again: with
        a fraction f kept, (4 - f) GEMMs in all. None: the environment's FUSED_PO_LOGITS_BUDGET, else 1/32 of the
        device's memory, 1 GiB on CPU. 0 keeps nothing. More than the device has is an error.
    logits_dtype: the tile's dtype: torch.float32 (None means it, or float64 for float64 inputs), or the inputs' own
        low precision, which puts about 1e-2 nats of noise on a bf16 log-prob near p = 0.3.
    tile_bytes: the most bytes a tile of logits and its gradient may take, above one row; None: 128 MiB on CPU, 512 MiB
        elsewhere. It decides which rows share a GEMM, so policy and reference must use the same. With a vocabulary cut
        over ranks two tiles are held at once, of half the bytes each.
    entropy_grad: False makes the entropy a constant, which saves its part of the backward under torch.compile.
    skip_zero_rows: on a GPU, drop tokens whose incoming gradient is exactly 0 from the backward's GEMMs, at the price
        of one host sync. On CPU they are always dropped.
    compact: drop ignored tokens before the first GEMM, at the price of one host sync on a GPU. False computes them all.
    num_scored: the number of tokens that are not ignored, or a bound on it, if known: then dropping them takes no
        sync, and the op can be captured in a CUDA graph. Where more are scored, every result is NaN (on CPU and under
        FUSED_PO_DEBUG=1 an error).
    """

    logits_budget: int | None = None
    logits_dtype: torch.dtype | None = None
    tile_bytes: int | None = None
    entropy_grad: bool = True
    skip_zero_rows: bool = False
    compact: bool = True
    num_scored: int | None = None

    def __post_init__(self) -> None:
        least = {"logits_budget": 0, "tile_bytes": 1, "num_scored": 0}
        for name, low in least.items():
            value, unit = getattr(self, name), "tokens" if name == "num_scored" else "bytes"
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: got {type(value).__name__}, expected an int, in {unit}, or None")
            if value < low:
                raise ValueError(checks.not_allowed(name, value, "ints >= {}, in {}, or None", low, unit))
        checks.flags(entropy_grad=self.entropy_grad, skip_zero_rows=self.skip_zero_rows, compact=self.compact)
        if self.num_scored is not None and not self.compact:
            raise ValueError("num_scored: got it with compact=False, which computes every token; leave out one of them")
        if self.logits_dtype is not None:
            checks.choice("logits_dtype", self.logits_dtype, checks.FLOATS)

    @staticmethod
    def of(schedule: Schedule | None) -> Schedule:
        """The one asked for, or the default."""
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: got {type(schedule).__name__}, expected a fused_po.Schedule, or None")
        return DEFAULT if schedule is None else schedule

    def tile_bytes_on(self, device: torch.device) -> int:
        """The tile's bound on this device."""
        return self.tile_bytes or (CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES)

    def logits_dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The tile's dtype for inputs of `dtype`."""
        default = torch.float64 if dtype == torch.float64 else torch.float32
        chosen = self.logits_dtype or default
        if chosen not in (default, dtype):
            allowed = " and ".join(map(str, dict.fromkeys((default, dtype))))
            raise ValueError(f"logits_dtype: got {chosen}, allowed for {dtype} inputs: {allowed}")
        return chosen


DEFAULT = Schedule()
