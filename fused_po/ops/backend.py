"""Which backend runs an op."""

from __future__ import annotations

from types import ModuleType

import torch

from fused_po import kernels, reference

NAMES = (*kernels.NAMES, "reference")


def get(name: str) -> ModuleType:
    """The module of a backend that `resolve` has named."""
    return reference if name == "reference" else kernels.load(name)


def unsupported(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot serve tensors of this device and dtype, or None if it can."""
    if name == "reference":
        return reference.unsupported(device, dtype)
    return kernels.unsupported(name, device, dtype)


def resolve(backend: str | None, tensor: torch.Tensor) -> str:
    """The name of the backend for this tensor. A backend asked for by name runs or raises; None takes the best.

    On CPU tensors None means the reference, even where Triton's interpreter could run: that is for tests.
    """
    if backend is None:
        if tensor.device.type != "cpu":
            for name in kernels.NAMES:
                if kernels.unsupported(name, tensor.device, tensor.dtype) is None:
                    return name
        backend = "reference"
    if backend not in NAMES:
        raise ValueError(f"backend: got {backend!r}, allowed are {', '.join(map(repr, NAMES))}, or None to choose")
    reason = unsupported(backend, tensor.device, tensor.dtype)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {reason}; backend=None takes one that can")
    return backend


def backends(device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """What would run on tensors of this device (default: the GPU if there is one) and dtype, and why the rest not.

    >>> fused_po.backends("cpu")
    {'triton': 'no: a cpu tensor (...)', 'reference': 'yes, chosen by backend=None'}
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reasons = {name: unsupported(name, device, dtype) for name in NAMES}
    able = [name for name in NAMES if reasons[name] is None]
    chosen = "reference" if device.type == "cpu" else (able[0] if able else None)
    said = {}
    for name, reason in reasons.items():
        said[name] = f"no: {reason}" if reason else "yes, chosen by backend=None" if name == chosen else "yes, by name"
    return said
