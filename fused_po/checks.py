"""Validation of what users pass in. Every error names the argument, what came, what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensor(name: str, value: object) -> Tensor:
    """`value` if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    return value


def floating(name: str, value: object) -> Tensor:
    """`value` if it is a floating-point tensor of a supported dtype."""
    if tensor(name, value).dtype not in FLOATS:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{name}: got dtype {value.dtype}, allowed are {allowed}")
    return value


def integer(name: str, value: object, shape: Iterable[int], device: torch.device, why: str) -> Tensor:
    """`value` as int64 if it is an integer tensor of this shape and device."""
    if tensor(name, value).dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"{name}: got dtype {value.dtype}, expected an integer dtype such as torch.int64")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(shape)}, {why}")
    same_device(name, value, device)
    return value.long()


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Refuse a tensor on another device."""
    if value.device != device:
        raise ValueError(f"{name}: is on {value.device}, expected {device}, where the others are")


def number(name: str, value: object, allowed: str, ok) -> float:
    """`value` as a float if it is a finite number for which `ok` holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not math.isfinite(value) or not ok(value):
        raise ValueError(f"{name}: got {value}, allowed are {allowed}")
    return float(value)


def positive(name: str, value: object) -> float:
    """`value` as a float if it is a finite number above 0."""
    return number(name, value, "finite numbers > 0", lambda v: v > 0)


def choice(name: str, value: object, allowed: Iterable) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in tuple(allowed):
        raise ValueError(f"{name}: got {value!r}, allowed are {', '.join(map(repr, allowed))}")


def scaling(temperature: float, logit_scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(outer, inner) of z = outer * tanh(inner * raw), or z = outer * raw where inner is None."""
    temperature, logit_scale = positive("temperature", temperature), positive("logit_scale", logit_scale)
    if softcap is None:
        return logit_scale / temperature, None
    softcap = positive("softcap", softcap)
    return softcap / temperature, logit_scale / softcap


def debug() -> bool:
    """Whether FUSED_PO_DEBUG=1 asks for the checks that cost a sync."""
    return os.environ.get("FUSED_PO_DEBUG") == "1"


def label_range(labels: Tensor, n_cols: int, ignore_index: int) -> None:
    """Refuse labels outside [0, n_cols). On a GPU the check costs a sync, so there FUSED_PO_DEBUG=1 switches it on."""
    if labels.device.type != "cpu" and not debug():
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= n_cols))
    if bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"labels: got {int(labels.flatten()[at])} at flat position {at}, allowed are 0 to {n_cols - 1}, "
            f"or ignore_index={ignore_index} for positions that do not count"
        )
