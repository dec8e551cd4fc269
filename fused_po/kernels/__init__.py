"""The kernel backends by name. All device code is imported through this module, on first use.

Device code is in the top-level folder `kernels/`, one folder per backend, installed as `fused_po.kernels.<backend>`.
"""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from types import ModuleType

import torch

NAMES = ("triton", "cuda")
BY_NAME = ("cuda",)  # used only if requested by name: no measurement on a GPU shows that it is faster


def how_to_get_triton() -> str:
    """What to do where triton is missing. `pip install triton` would overwrite the one that PyTorch for ROCm brings."""
    if sys.platform in ("darwin", "win32"):
        return "PyTorch has no triton for this system; the reference backend runs"
    if torch.version.hip is not None:
        return "reinstall PyTorch for ROCm, which brings its own triton"
    return "run `pip install triton`"


@lru_cache
def _load(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported."""
    try:
        return importlib.import_module(f"fused_po.kernels.{name}")
    except ImportError as error:
        installed = getattr(error, "name", "") != "triton"
        return f"{error}; " + ("run `pip install -e .` in the clone" if installed else how_to_get_triton())
    except Exception as error:  # a broken installation may raise anything; other backends must still work
        return f"importing it raises {type(error).__name__}: {error}"


def load(name: str) -> ModuleType:
    """The backend's module. If it is not installed, the ImportError says how to install it."""
    module = _load(name)
    if isinstance(module, str):
        raise ImportError(f"backend {name!r} is not available: {module}")
    return module


def missing(name: str) -> str | None:
    """Why the backend cannot be imported, or None if it can."""
    module = _load(name)
    return module if isinstance(module, str) else None


def unsupported(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend does not support tensors of this device and dtype, or None if it does."""
    return missing(name) or load(name).unsupported(device, dtype)
