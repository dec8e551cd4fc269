"""Make Triton's interpreter round like hardware, so that interpreted kernels give the same numbers as a GPU.

The kernels rely on an fma that rounds once: with a large offset common to a row's logits, a rounded product loses the
digits that tell them apart. And the interpreter truncates fp32 to bf16, where hardware rounds to nearest even.
"""

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def create_fma(self, x, y, z):
    """x * y + z, rounded once: the product of two fp32 numbers is exact in float64."""
    exact = x.data.astype("float64") * y.data + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def create_fp_trunc(self, src, dst_type):
    """A narrower float; fp32 to bf16 rounds to nearest even, and NaN stays NaN."""
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return self.cast_impl(src, dst_type)
    bits = src.data.astype("float32", order="C").view("uint32")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    data = (rounded * ~is_nan + 0x7FC0 * is_nan).astype("uint16")
    return TensorHandle(data, dst_type.scalar)


def round_as_hardware() -> None:
    """Replace both in this process; kernels other than ours are then rounded as hardware rounds them, too."""
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_fp_trunc = create_fp_trunc
