"""Device arithmetic shared by the row kernels: the scaled logit, its logarithms, where a row begins.

Below, `x` is a raw logit as stored; `y = x` or, with a softcap, `y = tanh(x * inner)`; `z = y * outer` is the
logit that goes into the softmax:

    z = softcap * tanh(x * logit_scale / softcap) / temperature
    inner = logit_scale / softcap,  outer = softcap / temperature       (with a softcap)
    inner = None,                   outer = logit_scale / temperature   (without)

The kernels exponentiate in base 2, `2 ** (y * scale - shift)` with `scale = outer * log2(e)`, so that logit scale,
temperature and the change of base cost nothing per element.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where running maxima start: finite, so that -inf minus it stays -inf
FLOOR = tl.constexpr(-1e4)  # stands for log2(0) beside a probability of 0: their product must be 0, not NaN


@triton.jit
def tanh(u):
    """tanh to about 2 ulp: below 0.55, where 1 - 2/(e^2u + 1) cancels, an odd polynomial (minimax fit)."""
    s = u * u
    p = -0.006207425506136509
    p = p * s + 0.021027215472032894
    p = p * s - 0.053842277365509665
    p = p * s + 0.13332498865320724
    p = p * s - 0.33333315271071173
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(u) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(u) < 0.55, u + u * s * p, tl.where(u < 0.0, -large, large))


@triton.jit
def log2(d):
    """log2 of a sum of probabilities' numerators, to about 1 ulp (the hardware's own is good to 2^-22 only)."""
    bits = d.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # leaves a mantissa in [sqrt(1/2), sqrt(2))
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    q = s * s
    series = q * (0.3333333333 + q * (0.2 + q * (0.1428571429 + q * 0.1111111111)))
    value = exponent.to(tl.float32) + (2.0 * LOG2E) * (s + s * series)
    return tl.where((d > 1e-37) & (d < float("inf")), value, tl.log2(d))


@triton.jit
def log1p(e):
    """log(1 + e) for 0 <= e <= 1, exact for tiny e: 2 atanh(e / (2 + e))."""
    s = e / (2.0 + e)
    q = s * s
    p = 0.05882352941  # 1/17
    p = p * q + 0.06666666667
    p = p * q + 0.07692307692
    p = p * q + 0.09090909091
    p = p * q + 0.1111111111
    p = p * q + 0.1428571429
    p = p * q + 0.2
    p = p * q + 0.3333333333
    return 2.0 * (s + s * q * p)


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation near 0: the Taylor series to x^9 there."""
    p = 2.7557319e-6
    p = p * x + 2.4801587e-5
    p = p * x + 1.9841270e-4
    p = p * x + 1.3888889e-3
    p = p * x + 8.3333333e-3
    p = p * x + 4.1666667e-2
    p = p * x + 0.1666666667
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.6, x + x * x * p, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def exp(x):
    """e^x of finite x to about 2 ulp: what rounding x log2(e) loses is made up for."""
    t = x * LOG2E
    rest = tl.fma(x, LOG2E, -t) + x * 1.925963e-8  # log2(e) less its nearest fp32
    return tl.exp2(t) * (1.0 + rest * LN2)


@triton.jit
def times(weight, value):
    """weight * value, 0 where the weight is 0, also for infinities."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def load_scaled(pointers, mask, inner):
    """y of the logits behind `pointers`, fp32; masked-off lanes read -inf."""
    if mask is None:
        x = tl.load(pointers).to(tl.float32)
    else:
        x = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
    if inner is not None:
        x = tanh(x * inner)
        if mask is not None:
            x = tl.where(mask, x, float("-inf"))
    return x


@triton.jit
def row_start(base_ptr, row, inner_rows, stride_outer, stride_inner):
    """Pointer to row `row` of base[outer, inner, V]; int64, since rows times columns pass 2^31."""
    outer_offset = (row // inner_rows).to(tl.int64) * stride_outer
    return base_ptr + outer_offset + (row % inner_rows).to(tl.int64) * stride_inner


@triton.jit
def before_row(row_ptr, GROUP: tl.constexpr):
    """How many columns lie between the 16-byte boundary before a row and its start: 0 to GROUP - 1.

    GROUP columns are 16 bytes; GROUP = 1 asks for no alignment.
    """
    itemsize: tl.constexpr = 16 // GROUP
    return ((row_ptr.to(tl.int64) & 15) // itemsize).to(tl.int32)


@triton.jit
def whole_groups(row_ptr, n_cols, GROUP: tl.constexpr):
    """(lead, body): columns before a row's first 16-byte boundary, and columns in whole groups from there on."""
    lead = tl.minimum((GROUP - before_row(row_ptr, GROUP)) % GROUP, n_cols)
    return lead, tl.multiple_of((n_cols - lead) // GROUP * GROUP, GROUP)


@triton.jit
def edge_columns(lead, body, n_cols, GROUP: tl.constexpr):
    """([2, GROUP] columns, mask) of [0, lead) and [lead + body, n_cols): at most one group each."""
    left = tl.arange(0, 2) * (lead + body)
    right = tl.where(tl.arange(0, 2) == 0, lead, n_cols)
    columns = left[:, None] + tl.arange(0, GROUP)[None, :]
    return columns, columns < right[:, None]


@triton.jit
def group_offsets(BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """0 to BLOCK - 1 as [BLOCK / GROUP, GROUP]."""
    return (tl.arange(0, BLOCK // GROUP) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
