"""Parts of the cases of several ops: rows of logits, labels, scalings, layouts in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fuzzing import DTYPES, SAMPLES, Values, copies_like, generator_of
from hypothesis import strategies as st
from numerics import DEVICE, IGNORE, Scaling
from torch import Tensor

from fused_po import Schedule

SEEDS = st.integers(0, 2**32)
TOP = "top"  # the size of logits that fill the dtype's range
SIZES = (0.0, 1e-4, 1.0, 1.0, 4.0, 30.0, 1e3, 1e4, TOP)
COLUMNS = (1, 2, 3, 5, 8, 17, 33, 64, 127, 200, 257, 1000, 1027, 4096, 4099)
LAYOUTS = ("contiguous", "sliced rows", "sliced columns", "every other row", "every other column", "transposed")
IGNORED = ("none", "some", "some", "all")
IGNORE_INDICES = (-100, -100, -1, 0, 2, 10**6)


class Rows(NamedTuple):
    """n rows of v logits and their labels.

    kind: "spread" (normal, times size), "ties" (few distinct values), "confident" (the label far above the rest).
    masked: the share of the vocabulary at -inf; never the label.
    edges: labels are only 0 or v - 1.
    """

    n: int
    v: int
    dtype: str
    size: float | str
    kind: str
    masked: float
    ignored: str
    edges: bool
    ignore_index: int
    top: float
    seed: int

    @property
    def spread(self) -> float:
        return self.top / 4 if self.size == TOP else float(self.size)

    def copies(self) -> int:
        return max(4, min(SAMPLES, -(-SAMPLES // max(1, self.n)), 500_000 // max(1, self.n * self.v)))


def on_backend(n: int, v: int) -> st.SearchStrategy:
    """(rows, columns, backend); interpreted kernels take about 10 ms per row."""
    small = st.tuples(st.integers(0, n), st.sampled_from(COLUMNS[:-2]) | st.integers(1, 300), st.just("reference"))
    wide = st.tuples(st.integers(1, 3), st.sampled_from(COLUMNS), st.sampled_from(("reference", "triton")))
    few = st.tuples(st.integers(0, 3), st.integers(1, v), st.just("triton"))
    return st.one_of(*[small] * 14, wide, few)


def top_of(dtype: str, backend: str) -> float:
    """The largest logit: no scaled logit overflows in fp32, on which the errors of float64 are based too.

    The kernels subtract unrounded products: beyond 2^23 the remainder of the largest logit exceeds its rounding.
    """
    largest = 2.0**23 if backend == "triton" else torch.finfo(torch.float32).max / 16
    return min(torch.finfo(DTYPES[dtype]).max, largest)


@st.composite
def rows(draw, n: int, v: int, dtype: str, backend: str) -> Rows:
    """Rows of this shape; `scalings(rows)` gives scalings for them."""
    return Rows(
        n,
        v,
        dtype,
        draw(st.sampled_from(SIZES)),
        draw(st.sampled_from(("spread", "spread", "ties", "confident"))),
        draw(st.sampled_from((0.0, 0.0, 0.0, 0.3, 0.95))),
        draw(st.sampled_from(IGNORED)),
        draw(st.booleans()),
        draw(st.sampled_from(IGNORE_INDICES)),
        top_of(dtype, backend),
        draw(SEEDS),
    )


def dtypes(backend: str) -> st.SearchStrategy:
    names = tuple(DTYPES)
    return st.sampled_from(names[1:] if backend == "triton" else names)


NUMBERS = st.sampled_from((0.5, 0.7, 1.0, 1.3, 2.0)) | st.floats(0.05, 20)
CAPS = st.none() | st.sampled_from((1.0, 5.0, 30.0, 50.0))


@st.composite
def scalings(draw, size: float | str = 1.0) -> Scaling:
    """Temperature, scale and softcap; temperature and scale are 1 where logits fill the dtype's range."""
    if size == TOP or draw(st.booleans()):
        return Scaling(softcap=draw(CAPS))
    return Scaling(draw(NUMBERS), draw(NUMBERS), draw(CAPS))


def draw_labels(case: Rows, generator: torch.Generator) -> Tensor:
    """Labels [n] in [0, v); ignored ones are IGNORE."""
    labels = torch.randint(0, case.v, (case.n,), generator=generator)
    if case.edges:
        labels = (labels % 2) * (case.v - 1)
    share = {"none": 0.0, "some": 1 / 3, "all": 1.1}[case.ignored]
    return labels.masked_fill(torch.rand(case.n, generator=generator) < share, IGNORE)


def given_labels(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(labels for ours, labels for plain PyTorch); both ignore labels that equal the ignore_index."""
    ours = labels.masked_fill(labels == IGNORE, ignore_index)
    return ours.to(DEVICE), ours.masked_fill(ours == ignore_index, IGNORE).to(DEVICE)


def apart(size: float, slope: float, dtype: str) -> float:
    """The distance between copies of numbers of this size: a few per cent, but at most a tenth of a nat."""
    size = size or 1.0  # copies must not be 0 where all numbers are 0
    least = size / 128 if dtype in ("bf16", "fp16") else 0.0
    return max(least, min(size / 32, 0.1 / slope))


def draw_logits(case: Rows, labels: Tensor, slope: float, generator: torch.Generator) -> Tensor:
    """Logits [copies, n, v], for a scaling with the slope `slope`."""
    base = torch.randn(case.n, case.v, generator=generator, dtype=torch.float64)
    if case.kind == "ties":
        base = base.round()
    base = base * case.spread
    at = labels.clamp(min=0)[:, None]
    if case.kind == "confident" and base.numel():
        base.scatter_(1, at, base.amax(1, keepdim=True) + 2 * case.spread)
    base = base.clamp(-case.top, case.top)
    if case.masked:
        hidden = torch.rand(case.v, generator=generator)[None] < case.masked
        hidden = hidden.expand(case.n, -1).scatter(1, at, False)
        base = base.masked_fill(hidden, -torch.inf)
    base = base.to(DTYPES[case.dtype]).double()
    # One copy in four differs by a nat: where all logits are equal, the other copies give the same few results.
    spread = torch.full((case.copies(), 1, 1), apart(case.spread, slope, case.dtype), dtype=torch.float64)
    spread[3::4] = spread[3::4].clamp(min=1 / slope)
    if case.kind == "ties":  # ties stay equal
        rows = copies_like(torch.ones(case.n, 1, dtype=torch.float64), 1 / 64, case.copies(), generator, torch.float64)
        copies = base * rows.cpu()
        return copies.clamp(-case.top, case.top).where(base > -torch.inf, -torch.inf).to(DTYPES[case.dtype]).to(DEVICE)
    return copies_like(base, spread, case.copies(), generator, DTYPES[case.dtype]).clamp(max=case.top)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same numbers [n, v] as a view of a larger tensor, which is NaN elsewhere."""
    n, v = value.shape
    if layout == "contiguous":
        return value.contiguous()
    shape = {
        "sliced rows": (n + 2, v),
        "sliced columns": (n, v + 5),
        "every other row": (2 * n, v),
        "every other column": (n, 2 * v),
        "transposed": (v, n),
    }[layout]
    room = value.new_full(shape, torch.nan)
    view = {
        "sliced rows": room[1 : n + 1],
        "sliced columns": room[:, 3 : v + 3],
        "every other row": room[::2],
        "every other column": room[:, ::2],
        "transposed": room.t(),
    }[layout]
    return view.copy_(value)


SCALES = (1.0, 1.0, 2.0**-20, 2.0**20, 1e-3, 3.0)


class Incoming(NamedTuple):
    """Incoming gradients of the named outputs: +-scale, and 0 in a share of the rows."""

    names: tuple[str, ...]
    scale: float
    zeros: float
    seed: int

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Values:
        generator = generator_of(self.seed)
        dead = torch.rand(shape, generator=generator) < self.zeros
        signs = {name: torch.randint(0, 2, shape, generator=generator) * 2.0 - 1 for name in self.names}
        return {name: (g * self.scale).masked_fill(dead, 0).to(dtype).to(DEVICE) for name, g in signs.items()}


def incoming(names: tuple[str, ...], dtype: str) -> st.SearchStrategy:
    """Gradients of at least one of these outputs. fp16 gets no scales of 2^20 and 2^-20: its range is too small."""
    some = st.lists(st.sampled_from(names), min_size=1, unique=True).map(tuple)
    scales = [scale for scale in SCALES if dtype != "fp16" or 1e-3 <= scale <= 8]
    return st.builds(Incoming, some, st.sampled_from(scales), st.sampled_from((0.0, 0.0, 0.3, 1.0)), SEEDS)


class Plan(NamedTuple):
    """A Schedule in rows; `schedule` converts them to bytes."""

    kept: int | None
    tile: int | None
    logits_dtype: bool
    compact: bool
    excess: int | None
    skip_zero_rows: bool

    def schedule(self, v: int, dtype: torch.dtype, scored: int, n: int) -> Schedule:
        row = 8 * (v + 64) if dtype == torch.float64 else 4 * (v + 64)
        excess = None if self.excess is None or not self.compact else min(n, scored + self.excess)
        return Schedule(
            logits_budget=None if self.kept is None else self.kept * row,
            logits_dtype=dtype if self.logits_dtype else None,
            tile_bytes=None if self.tile is None else max(1, self.tile * row),
            compact=self.compact,
            num_scored=excess,
            skip_zero_rows=self.skip_zero_rows,
        )


PLANS = st.builds(
    Plan,
    st.none() | st.integers(0, 12),
    st.none() | st.integers(0, 5),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 3),
    st.booleans(),
)
