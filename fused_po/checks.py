"""Validation of what users pass in. Every error names the argument, what came, what is allowed."""

from __future__ import annotations

import difflib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Optional, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")  # the arguments and the result of a decorated function, for type checkers
R = TypeVar("R")

LARGEST = sys.float_info.max
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


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


def integer(name: str, value: object, shape: torch.Size, device: torch.device, why: str) -> Tensor:
    """`value` as int64 if it is an integer tensor of this shape and device."""
    if tensor(name, value).dtype not in INTEGERS:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected an integer dtype such as torch.int64")
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(shape)}, {why}")
    same_device(name, value, device)
    return value if value.dtype == torch.int64 else value.long()


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Refuse a tensor on another device."""
    if value.device != device:
        raise ValueError(f"{name}: is on {value.device}, expected {device}, where the others are")


def number(name: str, value: object, allowed: str, ok: Callable, *limits: float | None) -> float:
    """`value` as a float if it is a finite number for which `ok` holds; `limits` fill the braces of `allowed`.

    torch.compile makes a number symbolic once it changes between calls. It can compare such a number, but it cannot
    call math.isfinite on it, nor put it into an f-string.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (-LARGEST <= value <= LARGEST and ok(value)):
        raise ValueError(refusal(name, value, allowed, *limits))
    return float(value)


def refusal(name: str, value: object, allowed: str, *limits: object) -> str:
    """The message of a value that is not allowed. torch.compile cannot trace an f-string of a symbolic number."""
    return "{}: got {}, allowed are {}".format(name, value, allowed.format(*limits) if limits else allowed)  # noqa: UP032


def dimension(name: str, value: int, ndim: int) -> int:
    """`value` as a number from 0 if it names one of `ndim` dimensions."""
    if not -ndim <= value < ndim:
        raise ValueError(f"{name}: got {value}, allowed are {-ndim} to {ndim - 1}")
    return value % ndim


def positive(name: str, value: object) -> float:
    """`value` as a float if it is a finite number above 0."""
    return number(name, value, "finite numbers > 0", lambda v: v > 0)


def whole(name: str, value: object, least: int | None = None) -> int:
    """`value` if it is an int, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if least is not None and value < least:
        raise ValueError(refusal(name, value, "integers >= {}", least))
    return value


def flags(**values: object) -> None:
    """Refuse, by name, what is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {type(value).__name__}, expected True or False")


def several(name: str, value: object, of: str) -> tuple:
    """`value` as a tuple if it is a sequence of that kind, such as "names"; not a string, not a tensor."""
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a list or tuple of {of}")
    return tuple(value)


def choice(name: str, value: object, allowed: Iterable) -> None:
    """Refuse a value that is not among the allowed ones; an unknown name is told the nearest known one."""
    allowed = tuple(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [a for a in allowed if isinstance(a, str)], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: got {value!r}, allowed are {', '.join(map(repr, allowed))}{hint}")


def given(**values: object) -> dict:
    """What is not None, by name: the optional arguments of `alike`."""
    return {name: value for name, value in values.items() if value is not None}


def alike(**values: object) -> None:
    """Refuse floating tensors, by name, that differ in shape or device from the first."""
    first, shape, device = "", torch.Size(), torch.device("cpu")
    for name, value in values.items():
        value = floating(name, value)
        if not first:
            first, shape, device = name, value.shape, value.device
        if value.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(shape)}, that of {first}")
        same_device(name, value, device)


def sequences(**values: object) -> None:
    """`alike`, of numbers of whole sequences: log-probs of tokens would give a loss of every token, which is none."""
    alike(**values)
    name, first = next(iter(values.items()))
    if first.ndim > 1:
        raise ValueError(
            f"{name}: got shape {tuple(first.shape)}, expected [B], one number a sequence; "
            "fused_po.sequence_logps makes them of the log-probs of tokens [B, T]"
        )


def mask_like(name: str, mask: object, like: Tensor, of: str) -> Tensor:
    """`mask` as bool if it is a tensor of like's shape; non-zero means that a position counts."""
    if tensor(name, mask).shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected {tuple(like.shape)}, that of {of}")
    if mask.is_complex():
        raise TypeError(f"{name}: got dtype {mask.dtype}, expected torch.bool, or numbers of which 0 means no")
    same_device(name, mask, like.device)
    return mask.bool()


def has_values(value: Tensor) -> bool:
    """Whether a tensor holds numbers now: not while it is traced, nor on the meta device, nor as a FakeTensor."""
    return not torch.compiler.is_compiling() and not value.is_meta and not hasattr(value, "fake_mode")


def refuse_without_values(name: str, value: Tensor) -> None:
    """Refuse meta and fake tensors where the result depends on numbers in a way that no shape can stand for."""
    if value.is_meta or hasattr(value, "fake_mode"):
        raise ValueError(
            f"{name}: got a tensor without values (on meta, or a FakeTensor), expected one that holds numbers"
        )


def looked_at(value: Tensor) -> bool:
    """Whether a tensor's values are checked: on CPU; elsewhere, for a sync, under FUSED_PO_DEBUG=1."""
    return has_values(value) and (value.device.type == "cpu" or debug())


class InPlaceError(ValueError, RuntimeError):
    """Logits that no gradient can be written over: a bad argument, and what PyTorch's own in-place ops raise for it."""


def inplace(inplace_backward: object, logits: Tensor) -> None:
    """Refuse what is no flag, and a leaf: its gradient would lie where its values are, as `.grad` and as data."""
    flags(inplace_backward=inplace_backward)
    if not inplace_backward or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    base = logits if logits._base is None else logits._base
    if base.requires_grad and base.is_leaf:
        raise InPlaceError(
            "inplace_backward: got logits that are a leaf that requires grad, or a view of one, whose values the "
            "gradient would overwrite; leave it False, or pass what was computed from the leaf"
        )


def _overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of such a layout may share memory; never for a slice, transpose or stride of a dense tensor.

    Exact where the dimensions nest: from the smallest stride up, each steps over all that lies within.
    """
    within = 0  # the largest offset of the dimensions so far
    for stride, size in sorted(zip(strides, shape)):
        if size > 1:
            if stride <= within:
                return 0 not in shape
            within += stride * (size - 1)
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory, other than as one and the same view."""
    itemsize, shift = a.element_size(), abs(a.data_ptr() - b.data_ptr())
    if (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) and shift % itemsize == 0:
        return shift > 0 and _overlap((2, *a.shape), (shift // itemsize, *a.stride()))
    begins = a.data_ptr(), b.data_ptr()
    ends = (v.data_ptr() + v.element_size() * (1 + _last_offset(v)) for v in (a, b))
    return bool(a.numel() and b.numel()) and max(begins) < min(ends)


def _last_offset(value: Tensor) -> int:
    """How many elements behind the first the last one lies."""
    return sum(stride * (size - 1) for stride, size in zip(value.stride(), value.shape))


def overwritable(logits: Tensor, inplace_backward: bool, ref_logits: Optional[Tensor] = None) -> None:
    """Refuse logits in whose place no gradient can be written. For the ops, which see the memory that is written.

    The same view as both logits and ref_logits is allowed: each element is read before it is overwritten.
    """
    if inplace_backward and _overlap(logits.shape, logits.stride()):
        raise InPlaceError(
            f"inplace_backward: got logits of shape {tuple(logits.shape)} and strides {tuple(logits.stride())}, whose "
            "elements share memory (expand, unfold, as_strided), so that no gradient can be written over them; leave "
            "it False, or pass logits.contiguous()"
        )
    if inplace_backward and ref_logits is not None and _share_memory(logits, ref_logits):
        raise InPlaceError(
            "inplace_backward: got ref_logits that share memory with logits, which the gradient would overwrite; leave "
            "it False, or pass ref_logits.clone()"
        )


def positive_like(name: str, value: object, like: Tensor, of: str) -> float | Tensor:
    """`value` if it is a number > 0, or a tensor of such in the shape of `like`."""
    if not isinstance(value, Tensor):
        return positive(name, value)
    alike(**{of: like, name: value})
    if looked_at(value) and not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError(f"{name}: holds {float(value.min())}, allowed are finite numbers > 0")
    return value.detach()


def finite(name: str, value: Tensor, where: Tensor | None = None) -> None:
    """Refuse NaN and infinities (where it counts), as far as values are looked at."""
    # A sum is finite only if every element is; one that is not may have overflowed.
    if looked_at(value) and not math.isfinite(value.detach().sum().item()):
        bad = ~value.isfinite() if where is None else ~value.isfinite() & where
        if bool(bad.any()):
            at = int(bad.flatten().nonzero()[0])
            got = float(value.flatten()[at])
            raise ValueError(f"{name}: got {got} at flat position {at}, allowed are finite numbers")


def only_with(name: str, value: object, default: object, used: bool, where: str) -> None:
    """Refuse an argument that was set although nothing would read it."""
    plain = isinstance(value, (bool, int, float, str, type(None)))  # other values' == may be no bool
    if not used and not (plain and value == default):
        message = "{}: got {}, which only {} reads; leave it at {}"  # see `refusal`
        raise ValueError(message.format(name, value, where, default))


def scaling(temperature: float, logit_scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(outer, inner) of z = outer * tanh(inner * raw), or z = outer * raw where inner is None."""
    temperature, logit_scale = positive("temperature", temperature), positive("logit_scale", logit_scale)
    if softcap is None:
        return logit_scale / temperature, None
    softcap = positive("softcap", softcap)
    return softcap / temperature, logit_scale / softcap


def called(**theirs: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose errors name its own arguments: ours, of the functions it calls, to theirs."""

    def renamed(error: Exception) -> Exception:
        names, colon, rest = str(error).partition(": ")
        return type(error)(", ".join(theirs.get(name, name) for name in names.split(", ")) + colon + rest)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*arguments: P.args, **options: P.kwargs) -> R:
            try:
                return function(*arguments, **options)
            except (TypeError, ValueError) as error:
                raise renamed(error) from None

        return run

    return decorate


def debug() -> bool:
    """Whether FUSED_PO_DEBUG=1 asks for the checks that cost a sync."""
    return os.environ.get("FUSED_PO_DEBUG") == "1"


def none_ignored(labels: Tensor, ignore_index: int) -> bool:
    """Whether it is known, without a sync on a GPU, that no label is ignore_index. Labels but that one are >= 0."""
    return ignore_index < 0 and labels.device.type == "cpu" and labels.numel() > 0 and int(labels.min()) >= 0


def within(labels: Tensor, n_cols: int) -> bool:
    """Whether all labels are in [0, n_cols)."""
    least, most = torch.aminmax(labels)
    return int(least) >= 0 and int(most) < n_cols


def label_range(labels: Tensor, n_cols: int, ignore_index: int) -> None:
    """Refuse labels outside [0, n_cols). On a GPU the check costs a sync, so there FUSED_PO_DEBUG=1 switches it on."""
    if not looked_at(labels) or not labels.numel():
        return
    if within(labels, n_cols) or within(labels.where(labels != ignore_index, 0), n_cols):
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= n_cols))
    if bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"labels: got {int(labels.flatten()[at])} at flat position {at}, allowed are 0 to {n_cols - 1}, "
            f"or ignore_index={ignore_index} for positions that do not count"
        )
