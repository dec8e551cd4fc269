"""Validation of arguments. Every error names the argument, the value it got and the values that are allowed."""

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
    """Return `value` if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    return value


def floating(name: str, value: object) -> Tensor:
    """Return `value` if it is a floating-point tensor of a supported dtype."""
    if tensor(name, value).dtype not in FLOATS:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{name}: got dtype {value.dtype}, allowed are {allowed}")
    return value


def integer(name: str, value: object, shape: torch.Size, device: torch.device, why: str) -> Tensor:
    """Return `value` as int64 if it is an integer tensor of this shape on this device. `why` explains the shape."""
    if tensor(name, value).dtype not in INTEGERS:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected an integer dtype such as torch.int64")
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(shape)}, {why}")
    same_device(name, value, device)
    return value if value.dtype == torch.int64 else value.long()


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise ValueError for a tensor on another device."""
    if value.device != device:
        expected = f"{device}, the device of the other arguments"
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {expected}")


def number(name: str, value: object, allowed: str, ok: Callable, *limits: float | None) -> float:
    """Return `value` as a float if it is a finite number and `ok(value)`. `limits` fill the braces of `allowed`.

    torch.compile makes a number symbolic once it changes between calls. It can compare a symbolic number, but it cannot
    call math.isfinite on it or format it with an f-string.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (-LARGEST <= value <= LARGEST and ok(value)):
        raise ValueError(not_allowed(name, value, allowed, *limits))
    return float(value)


def not_allowed(name: str, value: object, allowed: str, *limits: object) -> str:
    """The error message for a value that is not allowed. No f-string: torch.compile cannot trace symbolic numbers."""
    return "{}: got {}, allowed are {}".format(name, value, allowed.format(*limits) if limits else allowed)  # noqa: UP032


def dimension(name: str, value: int, ndim: int) -> int:
    """Return `value` as a non-negative index if it is a dimension of a tensor with `ndim` dimensions."""
    if not -ndim <= value < ndim:
        raise ValueError(f"{name}: got {value}, allowed are {-ndim} to {ndim - 1}")
    return value % ndim


def positive(name: str, value: object) -> float:
    """Return `value` as a float if it is a finite number > 0."""
    if type(value) is float and 0 < value <= LARGEST:  # nearly every call, on every op
        return value
    return number(name, value, "finite numbers > 0", lambda v: v > 0)


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """Return `value` if it is an int (and at least `least`)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if least is not None and value < least:
        raise ValueError(not_allowed(name, value, "integers >= {}", least))
    return value


def flags(**values: object) -> None:
    """Raise TypeError for a value, passed by name, that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {type(value).__name__}, expected True or False")


def as_tuple(name: str, value: object, of: str) -> tuple:
    """Return `value` as a tuple if it is iterable and not a string or a tensor. `of`: its items, such as "names"."""
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a list or tuple of {of}")
    return tuple(value)


def choice(name: str, value: object, allowed: Iterable) -> None:
    """Raise ValueError for a value that is not among the allowed ones. The error suggests the closest name."""
    allowed = tuple(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [a for a in allowed if isinstance(a, str)], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: got {value!r}, allowed are {', '.join(map(repr, allowed))}{hint}")


def not_none(**values: object) -> dict:
    """The arguments that are not None, by name. For optional arguments of `same_shape`."""
    return {name: value for name, value in values.items() if value is not None}


def same_shape(**values: object) -> None:
    """Raise for values that are not floating tensors with the shape and device of the first one."""
    first, shape, device = "", torch.Size(), torch.device("cpu")
    for name, value in values.items():
        value = floating(name, value)
        if not first:
            first, shape, device = name, value.shape, value.device
        if value.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(shape)}, the shape of {first}")
        same_device(name, value, device)


def per_sequence(**values: object) -> None:
    """`same_shape` for one number per sequence. Log-probs per token are refused: their loss would be meaningless."""
    same_shape(**values)
    name, first = next(iter(values.items()))
    if first.ndim > 1:
        raise ValueError(
            f"{name}: got shape {tuple(first.shape)}, expected [B], one number per sequence; "
            "fused_po.sequence_logps sums log-probs per token, [B, T], to [B]"
        )


def mask_like(name: str, mask: object, like: Tensor, of: str) -> Tensor:
    """Return `mask` as bool if it is a tensor with the shape of `like`; non-zero means that a position counts."""
    if tensor(name, mask).shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected {tuple(like.shape)}, the shape of {of}")
    if mask.is_complex():
        raise TypeError(f"{name}: got dtype {mask.dtype}, expected torch.bool, or real numbers where 0 means masked")
    same_device(name, mask, like.device)
    return mask.bool()


def has_values(value: Tensor) -> bool:
    """Whether the tensor's values can be read: not while it is traced, on the meta device, or as a FakeTensor."""
    return not torch.compiler.is_compiling() and not value.is_meta and not hasattr(value, "fake_mode")


def refuse_without_values(name: str, value: Tensor) -> None:
    """Raise ValueError for meta and fake tensors, where the result cannot be described by a shape."""
    if value.is_meta or hasattr(value, "fake_mode"):
        raise ValueError(f"{name}: got a tensor without values (meta device or FakeTensor), expected one with values")


def values_checked(value: Tensor) -> bool:
    """Whether a tensor's values are checked: always on CPU; elsewhere, where it costs a sync, with FUSED_PO_DEBUG=1."""
    return has_values(value) and (value.device.type == "cpu" or debug())


class InPlaceError(ValueError, RuntimeError):
    """Logits that cannot be overwritten by their gradient. A RuntimeError too, as PyTorch's in-place ops raise it."""


def inplace(inplace_backward: object, logits: Tensor) -> None:
    """Check the flag, and refuse a leaf: its gradient would overwrite its values, so `.grad` and data were the same."""
    flags(inplace_backward=inplace_backward)
    if not inplace_backward or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    base = logits if logits._base is None else logits._base
    if base.requires_grad and base.is_leaf:
        raise InPlaceError(
            "inplace_backward: got logits that are a leaf that requires grad, or a view of one; the gradient would "
            "overwrite the leaf's values; pass False, or logits that were computed from the leaf"
        )


def _overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of this layout may share memory. False for slices, transposes and strides of a dense tensor.

    Exact where the dimensions nest: in order of stride, each stride exceeds the extent of the smaller dimensions.
    """
    extent = 0  # the largest offset of the dimensions so far
    for stride, size in sorted(zip(strides, shape)):
        if size > 1:
            if stride <= extent:
                return 0 not in shape
            extent += stride * (size - 1)
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory without being the same view."""
    itemsize, shift = a.element_size(), abs(a.data_ptr() - b.data_ptr())
    if (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) and shift % itemsize == 0:
        return shift > 0 and _overlap((2, *a.shape), (shift // itemsize, *a.stride()))
    begins = a.data_ptr(), b.data_ptr()
    ends = (v.data_ptr() + v.element_size() * (1 + _last_offset(v)) for v in (a, b))
    return bool(a.numel() and b.numel()) and max(begins) < min(ends)


def _last_offset(value: Tensor) -> int:
    """The offset of the last element from the first, in elements."""
    return sum(stride * (size - 1) for stride, size in zip(value.stride(), value.shape))


def overwritable(logits: Tensor, inplace_backward: bool, ref_logits: Optional[Tensor] = None) -> None:
    """Raise for logits whose memory cannot hold their gradient. Called in the ops, which see the memory they write.

    logits and ref_logits may be the same view: each element is read before it is overwritten.
    """
    if inplace_backward and _overlap(logits.shape, logits.stride()):
        raise InPlaceError(
            f"inplace_backward: got logits of shape {tuple(logits.shape)} and strides {tuple(logits.stride())}, whose "
            "elements share memory (expand, unfold, as_strided), so the gradient cannot overwrite them; pass False, or "
            "logits.contiguous()"
        )
    if inplace_backward and ref_logits is not None and _share_memory(logits, ref_logits):
        raise InPlaceError(
            "inplace_backward: got ref_logits that share memory with logits, which the gradient overwrites; pass "
            "False, or ref_logits.clone()"
        )


def positive_like(name: str, value: object, like: Tensor, of: str) -> float | Tensor:
    """Return `value` if it is a number > 0, or a tensor of numbers > 0 with the shape of `like`."""
    if not isinstance(value, Tensor):
        return positive(name, value)
    same_shape(**{of: like, name: value})
    if values_checked(value) and not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError(f"{name}: got a tensor with {float(value.min())}, allowed are finite numbers > 0")
    return value.detach()


def finite(name: str, value: Tensor, where: Tensor | None = None) -> None:
    """Raise ValueError for NaN and infinities (where the mask `where` is True), if values are checked at all."""
    # A finite sum means that every element is finite. A sum that is not finite may have overflowed: look closer.
    if values_checked(value) and not math.isfinite(value.detach().sum().item()):
        bad = ~value.isfinite() if where is None else ~value.isfinite() & where
        if bool(bad.any()):
            at = int(bad.flatten().nonzero()[0])
            got = float(value.flatten()[at])
            raise ValueError(f"{name}: got {got} at flat position {at}, allowed are finite numbers")


def only_with(name: str, value: object, default: object, used: bool, where: str) -> None:
    """Raise ValueError for an argument that is not at its default although nothing would use it."""
    plain = isinstance(value, (bool, int, float, str, type(None)))  # == of other values may not return a bool
    if not used and not (plain and value == default):
        message = "{}: got {}, used only with {}; leave it at {}"  # formatted as in `not_allowed`
        raise ValueError(message.format(name, value, where, default))


def scaling(temperature: float, logit_scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(outer, inner) of z = outer * tanh(inner * raw), or z = outer * raw where inner is None."""
    temperature, logit_scale = positive("temperature", temperature), positive("logit_scale", logit_scale)
    if softcap is None:
        return logit_scale / temperature, None
    softcap = positive("softcap", softcap)
    return softcap / temperature, logit_scale / softcap


def rename_in_errors(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: errors of the functions that are called inside name the arguments of the decorated function.

    names: inner argument name -> name of the same argument in the decorated function.
    """

    def renamed(error: Exception) -> Exception:
        arguments, colon, rest = str(error).partition(": ")
        return type(error)(", ".join(names.get(name, name) for name in arguments.split(", ")) + colon + rest)

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
    """Whether FUSED_PO_DEBUG=1 enables the checks that cost a sync."""
    return os.environ.get("FUSED_PO_DEBUG") == "1"


def none_ignored(labels: Tensor, ignore_index: int) -> bool:
    """Whether it is known without a GPU sync that no label is ignore_index. All other labels are >= 0."""
    return ignore_index < 0 and labels.device.type == "cpu" and labels.numel() > 0 and int(labels.min()) >= 0


def all_in_range(labels: Tensor, n_cols: int) -> bool:
    """Whether all labels are in [0, n_cols)."""
    least, most = torch.aminmax(labels)
    return int(least) >= 0 and int(most) < n_cols


def label_range(labels: Tensor, n_cols: int, ignore_index: int) -> None:
    """Raise ValueError for labels outside [0, n_cols). On a GPU only with FUSED_PO_DEBUG=1: the check costs a sync."""
    if not values_checked(labels) or not labels.numel():
        return
    if all_in_range(labels, n_cols) or all_in_range(labels.where(labels != ignore_index, 0), n_cols):
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= n_cols))
    if bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"labels: got {int(labels.flatten()[at])} at flat position {at}, allowed are 0 to {n_cols - 1}, "
            f"or ignore_index={ignore_index} for positions that do not count"
        )
