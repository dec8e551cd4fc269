"""Checks while the interpreter runs a kernel: every access is inside an argument, and every alignment hint is true.

A false hint does no harm until the compiler uses it for a wide access. So it is recorded on its value, passed on to
values computed from it, and is a fault where such a pointer or mask is used.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

FALSE = "rehearsal.false_hint"  # an attribute of a TensorHandle


class Fault(BaseException):
    """A GPU would read or write wrong memory, or refuse the launch. Not an Exception, so that nothing handles it."""


class Watch(threading.local):
    """The current launch of this thread."""

    kernel: str | None = None
    ranges: tuple[tuple[int, int], ...] = ()  # ranges of the arguments' memory: [begin, end)


watch = Watch()


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes from a tensor's first element to the end of its last one, including padding between rows."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextlib.contextmanager
def watching(kernel: str, arguments: Iterable[Any]) -> Iterator[None]:
    """Check the accesses and hints of one launch."""
    before = watch.kernel, watch.ranges
    watch.kernel = kernel
    watch.ranges = tuple(extent(a) for a in arguments if isinstance(a, torch.Tensor))
    try:
        yield
    finally:
        watch.kernel, watch.ranges = before


def check_access(kind: str, pointers: TensorHandle, mask: TensorHandle) -> None:
    """Raise a Fault if an unmasked lane is outside all arguments, or if an alignment hint is false."""
    if watch.kernel is None:
        return
    addresses = numpy.asarray(pointers.data).astype(numpy.int64)[numpy.asarray(mask.data).astype(bool)]
    if not addresses.size:
        return
    false_hint = pointers.attr.get(FALSE) or mask.attr.get(FALSE)
    if false_hint is not None and addresses.size > 1:
        raise Fault(f"{watch.kernel}: a {kind} relies on a false {false_hint}")
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = numpy.zeros(addresses.shape, bool)
    for begin, end in watch.ranges:
        inside |= (addresses >= begin) & (addresses + size <= end)
    if not inside.all():
        lanes = f"{(~inside).sum()} of {inside.size} lanes"
        raise Fault(f"{watch.kernel}: a {kind} of {size} bytes outside all arguments in {lanes}")


def carrying(method: Callable) -> Callable:
    """Wrap a method of the interpreter's builder so that its result inherits the false hints of its operands."""

    @functools.wraps(method)
    def run(self, *operands, **options):
        result = method(self, *operands, **options)
        for operand in operands:
            if isinstance(operand, TensorHandle) and FALSE in operand.attr and isinstance(result, TensorHandle):
                result.attr[FALSE] = operand.attr[FALSE]
        return result

    return run


def install() -> None:
    """Install the checks in this process's interpreter."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    set_attr = TensorHandle.set_attr

    def masked_load(self, pointers, mask, *rest):
        check_access("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        check_access("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def note_hint(self, key, value):
        if key == "tt.divisibility":
            factor = int(value[-1] if isinstance(value, (list, tuple)) else value)
            first = numpy.asarray(self.data).astype(numpy.int64).reshape(-1)[:1]
            if (first % factor).any():
                self.attr[FALSE] = f"multiple_of({factor}): the value is {first[0]}"
        return set_attr(self, key, value)

    for name in [name for name in vars(InterpreterBuilder) if name.startswith("create_")]:
        if not name.startswith(("create_load", "create_store", "create_masked", "create_atomic")):
            setattr(InterpreterBuilder, name, carrying(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store
    TensorHandle.set_attr = note_hint
