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


def resolve(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend for such tensors. A backend asked for by name runs or raises; None takes the best.

    On CPU tensors None means the reference, even where Triton's interpreter could run: that is for tests.
    """
    if backend is None:
        backend = "reference"
        if device.type != "cpu":
            able = (name for name in kernels.NAMES if kernels.unsupported(name, device, dtype) is None)
            backend = next(able, backend)
    if backend not in NAMES:
        raise ValueError(f"backend: got {backend!r}, allowed are {', '.join(map(repr, NAMES))}, or None to choose")
    reason = unsupported(backend, device, dtype)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {reason}; backend=None takes one that can")
    return backend


# What torch.compiler.assume_constant_result sets: torch.compile takes the name as a constant and does not trace the
# import of a backend. The decorator itself would import the compiler, a second, with every `import fused_po`.
resolve._dynamo_marked_constant = True


def _device(device: object) -> torch.device:
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: got {type(device).__name__}, expected a str, a torch.device or None")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected one such as 'cpu', 'cuda' or 'cuda:1'") from error


def backends(device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """What would run on tensors of this device (default: the GPU if there is one) and dtype, and why the rest not.

    >>> fused_po.backends("cpu")
    {'triton': 'no: a cpu tensor (...)', 'reference': 'yes, chosen by backend=None'}
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = _device(device)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {type(dtype).__name__}, expected a torch.dtype such as torch.bfloat16")
    chosen = resolve(None, device, dtype)
    said = {}
    for name in NAMES:
        reason = unsupported(name, device, dtype)
        said[name] = f"no: {reason}" if reason else "yes, chosen by backend=None" if name == chosen else "yes, by name"
    return said
