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
            names = [name for name in kernels.NAMES if name not in kernels.BY_NAME]
            backend = next((n for n in names if kernels.unsupported(n, device, dtype) is None), backend)
    if backend not in NAMES:
        raise ValueError(f"backend: got {backend!r}, allowed are {', '.join(map(repr, NAMES))}, or None to choose")
    reason = unsupported(backend, device, dtype)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {reason}; backend=None takes one that can")
    return backend


# What torch.compiler.assume_constant_result sets: torch.compile takes the name as a constant and does not trace the
# import of a backend. The decorator itself would import the compiler, a second, with every `import fused_po`.
resolve._dynamo_marked_constant = True


def backends(device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """What would run on tensors of this device (default: the GPU if there is one) and dtype, and why the rest not.

    >>> fused_po.backends("cpu")
    {'triton': 'no: a cpu tensor (...)', 'cuda': 'no: a cpu tensor (...)', 'reference': 'yes, chosen by backend=None'}
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = resolve(None, device, dtype)
    said = {}
    for name in NAMES:
        reason = unsupported(name, device, dtype)
        alone = ", and by name alone: it has not been measured on a GPU" if name in kernels.BY_NAME else ", by name"
        said[name] = f"no: {reason}" if reason else "yes, chosen by backend=None" if name == chosen else f"yes{alone}"
    return said
