"""Exact costs of a call: FLOPs of its matrix products, bytes at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch._library.custom_ops import OPDEFS
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# The positions of the two factors among the arguments, in every overload: out=, out_dtype=, in place.
FACTORS = {
    aten.mm: (0, 1),
    aten.addmm: (1, 2),
    aten.addmm_: (1, 2),
    aten._addmm_activation: (1, 2),
    aten.bmm: (0, 1),
    aten.baddbmm: (1, 2),
    aten.baddbmm_: (1, 2),
    aten._scaled_mm: (0, 1),
    aten.matmul: (0, 1),  # not decomposed by autograd inside a custom operator
}


def run_inside(mode: TorchDispatchMode, func, args: tuple, kwargs: dict):
    """Run an operator. The function behind a torch.library.custom_op runs under the mode, which would not see it."""
    inside = OPDEFS.get(func._schema.name)
    if inside is None:
        return func(*args, **kwargs)
    with mode:
        return inside._init_fn(*args, **kwargs)


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of matrix products, also inside custom operators.

    >>> with FlopCounter() as count:
    ...     loss(...).backward()
    >>> count.flops
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        at = FACTORS.get(func.overloadpacket)
        if at is not None:
            a, b = (args[i] for i in at)
            self.flops += 2 * a.numel() * (b.shape[-1] if b.ndim > 1 else 1)
        return run_inside(self, func, args, kwargs)


class Collectives(TorchDispatchMode):
    """The collectives of a rank: a list of (operation, elements of its first tensor), also inside custom operators.

    >>> with Collectives() as said:
    ...     fused_po.linear_logps(..., process_group=group)
    >>> said.calls
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func._schema.name:
            tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a])]
            sizes = [t.numel() for t in tensors if isinstance(t, torch.Tensor)]
            self.calls.append((func._schema.name.split("::")[1].strip("_"), sizes[0] if sizes else 0))
        return run_inside(self, func, args, kwargs or {})


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that an operator returns, except views; also inside custom operators."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = run_inside(self, func, args, kwargs or {})
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, value.numel())
        return result


def flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products of one call."""
    with FlopCounter() as count:
        call()
    return count.flops


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The largest number of bytes that tensors allocated by one call, results included, hold at one time."""
    gc.collect()  # garbage of earlier calls, collected during this one, would count as freed memory
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
