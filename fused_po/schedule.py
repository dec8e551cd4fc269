"""`Schedule`: how the linear ops use memory and compute. It does not change what they compute."""

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
    """The default for logits_budget in bytes, for a device with this much memory."""
    return min(CPU_BUDGET, memory // 4) if device.type == "cpu" else memory // 32


def chosen_budget(device: torch.device) -> int:
    """The logits_budget in bytes where the schedule has None: FUSED_PO_LOGITS_BUDGET, or the default."""
    text = os.environ.get(BUDGET_VARIABLE)
    if text is None:
        return default_budget(device, device_memory(device))
    if not text.isdecimal():
        raise ValueError(f"{BUDGET_VARIABLE}: got {text!r}, allowed are integers >= 0, in bytes")
    return within_memory(BUDGET_VARIABLE, int(text), device)


# torch.compile treats their results as constants of the graph. backend/choose.py says why not by the decorator.
device_memory._dynamo_marked_constant = True
chosen_budget._dynamo_marked_constant = True


def within_memory(name: str, budget: int, device: torch.device) -> int:
    """Return `budget` if it does not exceed the memory of the device."""
    memory = device_memory(device)
    if budget > memory:
        message = "{0}: got {1} bytes, allowed are 0 to {3}, the memory of {2}; unused budget is not allocated"
        raise ValueError(message.format(name, budget, device, memory))
    return budget


def logits_budget(budget: int | None, device: torch.device) -> int:
    """The logits_budget in bytes on this device: `budget`, or FUSED_PO_LOGITS_BUDGET, or the default."""
    if device.type == "meta":
        return CPU_BUDGET if budget is None else budget
    return chosen_budget(device) if budget is None else within_memory("logits_budget", budget, device)


@dataclass(frozen=True)
class Schedule:
    """How the linear ops (`linear_logps`, `linear_kl`, `linear_dpo`, `chunked_loss`) use memory and compute.

    Results for different schedules differ only by rounding. `Schedule(logits_budget=0)` uses the least memory.

    logits_budget: with a trainable head (or an entropy with gradients), the bytes that may be kept from forward to
        backward. Each token that fits keeps a row of V numbers (`linear_kl`: two with labels), which saves the backward
        one GEMM (`linear_kl`: two); all tokens together keep a [tokens, vocab] matrix. Tokens beyond the budget are
        projected again: `linear_logps` takes 4 - f GEMMs in all if a fraction f is kept. None: the environment variable
        FUSED_PO_LOGITS_BUDGET, else 1/32 of the device's memory (on CPU 1 GiB, at most a quarter of the memory). 0
        keeps nothing. More than the device's memory is an error.
    logits_dtype: the dtype of a tile of logits. None: torch.float32, or float64 for float64 inputs. It may also be the
        inputs' own low-precision dtype, which adds about 1e-2 nats of noise to a bf16 log-prob near p = 0.3.
    tile_bytes: the largest size of a tile of logits and its gradient in bytes; a tile has at least one row. None: 128
        MiB on CPU, 512 MiB elsewhere. It decides which rows share a GEMM, so use the same value for policy and
        reference. With a vocabulary sharded over ranks, two tiles of half this size are held at once.
    entropy_grad: False: the entropy has no gradient, which saves its part of the backward under torch.compile.
    skip_zero_rows: on a GPU, leave tokens whose incoming gradient is exactly 0 out of the backward's GEMMs. This costs
        one host sync. On CPU they are always left out.
    compact: leave ignored tokens out of all GEMMs. This costs one host sync on a GPU. False: compute them too.
    num_scored: the number of tokens that are not ignored, or an upper bound, if you know it. Then leaving ignored
        tokens out needs no sync, and the op can be captured in a CUDA graph. If more tokens are scored, every result is
        NaN (an error on CPU and with FUSED_PO_DEBUG=1).
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
            raise ValueError("num_scored: not allowed with compact=False, which computes every token; leave out one")
        if self.logits_dtype is not None:
            checks.choice("logits_dtype", self.logits_dtype, checks.FLOATS)

    @staticmethod
    def of(schedule: Schedule | None) -> Schedule:
        """Return the schedule, or the default one for None."""
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: got {type(schedule).__name__}, expected a fused_po.Schedule, or None")
        return DEFAULT if schedule is None else schedule

    def tile_bytes_on(self, device: torch.device) -> int:
        """The largest size of a tile on this device."""
        return self.tile_bytes or (CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES)

    def logits_dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a tile for inputs of `dtype`."""
        default = torch.float64 if dtype == torch.float64 else torch.float32
        chosen = self.logits_dtype or default
        if chosen not in (default, dtype):
            allowed = " and ".join(map(str, dict.fromkeys((default, dtype))))
            raise ValueError(f"logits_dtype: got {chosen}, allowed for {dtype} inputs: {allowed}")
        return chosen


DEFAULT = Schedule()
