"""Replace NumPy's exact exp2, log2 and division by approximations with the errors that PTX states for the hardware.

ex2.approx.ftz: 2 ulp beside the power of two, and results below 2^-126 are 0. lg2.approx: 2^-22 in the result.
div.full: 2 ulp. (PTX ISA, "Floating Point Instructions"; the errors here are of that size, not the hardware's own.)
"""

from __future__ import annotations

import numpy
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

SMALLEST = 2.0**-126


def wobble(x: numpy.ndarray, size: float) -> numpy.ndarray:
    """A number between -size and size for each x. It depends only on x, like errors of hardware."""
    bits = numpy.ascontiguousarray(x, dtype=numpy.float32).view(numpy.uint32).astype(numpy.uint64)
    return (((bits * 2654435761) >> 7 & 0xFFFF) / 32767.5 - 1) * size


def exp2(self, argument: TensorHandle) -> TensorHandle:
    x = argument.data
    with numpy.errstate(all="ignore"):
        exact = numpy.exp2(x.astype(numpy.float64))
        value = numpy.where(x == numpy.rint(x), exact, exact * (1 + wobble(x, 2.0**-22.5)))
        value = numpy.where(numpy.abs(value) < SMALLEST, 0, value).astype(numpy.float32)
    return TensorHandle(value, argument.dtype.scalar)


def log2(self, argument: TensorHandle) -> TensorHandle:
    x = argument.data
    with numpy.errstate(all="ignore"):
        value = numpy.log2(x.astype(numpy.float64)) + numpy.where(x == 1, 0, wobble(x, 2.0**-22))
    return TensorHandle(value.astype(numpy.float32), argument.dtype.scalar)


def divide(self, numerator: TensorHandle, denominator: TensorHandle) -> TensorHandle:
    a, b = numerator.data, denominator.data
    with numpy.errstate(all="ignore"):
        exact = (a.astype(numpy.float64) / b).astype(numpy.float32)
        value = exact * (1 + wobble(exact, 1.9 * 2.0**-23))
    return TensorHandle(numpy.where(numpy.isfinite(exact), value, exact).astype(numpy.float32), numerator.dtype.scalar)


def install() -> None:
    """Use the approximations for every interpreted kernel of this process."""
    InterpreterBuilder.create_exp2, InterpreterBuilder.create_log2 = exp2, log2
    InterpreterBuilder.create_fdiv = divide
