"""Logits for evaluation that are computed only when something reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fused_po.ops.outputs import TokenStats

# Methods and property getters that need no values.
KNOWN = {
    Tensor.size,
    Tensor.stride,
    Tensor.storage_offset,
    Tensor.dim,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.__len__,
} | {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_nested", "layout")
}
SAME = {Tensor.detach, Tensor.float}  # stay lazy: Trainer and accelerate call these on every output


class LazyLogits(Tensor):
    """Logits [..., V] that are computed once, before the first operation that reads their values.

    Fields of `token_stats` are attributes: `.logps`, `.entropy`. Before the computation the memory is one expanded NaN.
    """

    make: Callable[[], Tensor]
    token_stats: TokenStats

    @classmethod
    def of(
        cls, make: Callable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, stats: TokenStats
    ) -> LazyLogits:
        """Lazy logits with this shape, dtype and device, which make() computes."""
        made = torch.full((), torch.nan, dtype=dtype, device=device).expand(shape).as_subclass(cls)
        made.make, made.token_stats = _once(make), stats
        return made

    def __getattr__(self, name: str) -> Any:
        if name in TokenStats._fields:
            return getattr(self.token_stats, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in KNOWN:
                return func(*args, **kwargs)
            if func in SAME and len(args) == 1 and not kwargs:
                (lazy,) = args
                dtype = torch.float32 if func is Tensor.float else lazy.dtype
                shape, device = lazy.shape, lazy.device
        if func in SAME and len(args) == 1 and not kwargs:
            return cls.of(lambda: func(lazy.make()), shape, dtype, device, lazy.token_stats)
        return func(*tree_map(_computed, args), **tree_map(_computed, kwargs))


def _computed(value: Any) -> Any:
    if not isinstance(value, LazyLogits):
        return value
    logits = value.make()
    with torch._C.DisableTorchFunctionSubclass():
        value.data = logits  # for code that reads the memory without __torch_function__, such as collectives
    return logits


def _once(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that calls make at most once, without gradients, in the current autocast mode."""
    made: list[Tensor] = []
    modes = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in ("cpu", "cuda")]

    def get() -> Tensor:
        if not made:
            with contextlib.ExitStack() as stack:
                for kind, dtype, enabled in modes:
                    stack.enter_context(torch.autocast(kind, dtype, enabled=enabled))
                with torch.no_grad():
                    made.append(make())
        return made[0]

    return get
