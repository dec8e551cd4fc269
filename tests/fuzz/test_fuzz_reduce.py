"""Reductions over tokens: `sequence_logps`, `aggregate`, `gae`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fuzzing import DTYPES, Values, copies_like, evaluate, fuzz, generator_of, judge, plain_and_exact
from hypothesis import strategies as st
from numerics import BACKENDS, DEVICE
from plain_ops import aggregate_in_torch, gae_loop
from problems import SEEDS, laid_out

import fused_po
from fused_po.reduce import MODES

COPIES = 64


class TokensCase(NamedTuple):
    """n sequences of up to `length` tokens, of which the share `counted` is unmasked; packed ones have cu_seqlens."""

    n: int
    length: int
    dtype: str
    size: float
    counted: float
    packed: bool
    layout: str
    int32: bool
    seed: int


TOKENS = st.builds(
    TokensCase,
    st.integers(0, 6),
    st.integers(0, 40),
    st.sampled_from(tuple(DTYPES)),
    st.sampled_from((1e-3, 1.0, 1e4)),
    st.sampled_from((0.0, 0.1, 0.6, 1.0)),
    st.booleans(),
    st.sampled_from(("contiguous", "sliced columns", "every other column", "transposed")),
    st.booleans(),
    SEEDS,
)


def batch(case: TokensCase, pairs: bool = False) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], dict]:
    """(values [copies, tokens], mask [tokens], positions of each sequence's unmasked tokens, cu_seqlens or None)."""
    generator = generator_of(case.seed)
    n = 2 * case.n if pairs else case.n
    lengths = (
        torch.randint(0, case.length + 1, (n,), generator=generator) if case.packed else torch.full((n,), case.length)
    )
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(bounds[-1])
    mask = torch.rand(total, generator=generator) < case.counted
    base = (torch.randn(total, generator=generator, dtype=torch.float64) * case.size).to(DTYPES[case.dtype]).double()
    values = copies_like(base, case.size / 32, COPIES, generator, DTYPES[case.dtype])
    places = [torch.arange(a, b)[mask[a:b]].to(DEVICE) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist())]
    packed = {"cu_seqlens": bounds.to(DEVICE, torch.int32 if case.int32 else torch.int64)} if case.packed else {}
    return values, mask.to(DEVICE), places, packed


def as_given(case: TokensCase, n: int, values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One copy and its mask in the form of the case, with NaN at masked positions."""
    values = torch.where(mask, values, torch.nan)
    if case.packed:
        return values, mask
    shape = n, case.length
    return laid_out(values.view(shape), case.layout), mask.view(shape)


def wide(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()


def check(op: str, case: TokensCase, in_plain_torch, ours, values: torch.Tensor, shape: tuple[int, ...]) -> None:
    g = {op: torch.randint(0, 2, shape, generator=generator_of(case.seed)).to(DEVICE).double() * 2 - 1}
    errors, exact = plain_and_exact(lambda t: {op: in_plain_torch(wide(t["x"]))}, {"x": values}, ("x",), g, {})
    found = evaluate(lambda t: {op: ours(t["x"])}, {"x": values[0]}, ("x",), g)
    # The order in which a few numbers are summed is not fixed, so the rounding of their partial sums, at most the sum
    # of sizes, is allowed. In float64 the exact value is such a sum too. The gradient consists of one or two quotients
    # of three numbers, whose roundings are the same in every copy.
    sizes = in_plain_torch(values[:1].double().abs())
    partial = (8 if case.dtype == "fp64" else 1) * float(sizes.max()) if sizes.numel() else 0.0
    quotient = 2 * float(exact["d x"].abs().max()) if values.numel() else 0.0
    judge(op, found, errors, exact, {op: partial, "d x": quotient})


def check_sequences(case: TokensCase, average: bool, alpha: float | None) -> None:
    values, mask, places, packed = batch(case, pairs=alpha is not None)
    half = len(places) // 2

    def in_plain_torch(x: torch.Tensor) -> torch.Tensor:
        sums = []
        for i, place in enumerate(places):
            shared = len(place) if alpha is None else min(len(place), len(places[(i + half) % len(places)]))
            row = x[:, place]
            total = row[:, :shared].sum(-1) + (0 if alpha is None else alpha * row[:, shared:].sum(-1))
            sums.append(total / max(1, len(place)) if average else total)
        return torch.stack(sums, 1) if sums else x[:, :0]

    def ours(x: torch.Tensor) -> torch.Tensor:
        logps, where = as_given(case, len(places), x, mask)
        return fused_po.sequence_logps(logps, where, **packed, average=average, ld_alpha=alpha)

    check("sequence_logps", case, in_plain_torch, ours, values, (len(places),))


test_sequence_logps = fuzz(0.14, TOKENS, st.booleans(), st.none() | st.sampled_from((0.0, 0.3, 1.0)))(check_sequences)


def check_aggregate(case: TokensCase, mode: str, counts: tuple[int, int] | None, ranks: int) -> None:
    values, mask, places, packed = batch(case)
    how = {"max_length": 17} if mode == "seq-mean-token-sum-norm" else {}
    numbers = {} if counts is None else dict(zip(("num_tokens", "num_sequences"), counts))
    ranks = 1 if counts is None else ranks

    def in_plain_torch(x: torch.Tensor) -> torch.Tensor:
        if not any(map(len, places)):
            return x.sum(-1) * 0
        return aggregate_in_torch([x[:, place] for place in places], mode, **how, **numbers) * ranks

    def ours(x: torch.Tensor) -> torch.Tensor:
        loss, where = as_given(case, len(places), x, mask)
        return fused_po.aggregate(loss, where, mode, **packed, **how, **numbers, world_size=ranks)

    check("aggregate", case, in_plain_torch, ours, values, ())


COUNTS = st.none() | st.tuples(st.integers(1, 1000), st.integers(1, 100))


test_aggregate = fuzz(0.14, TOKENS, st.sampled_from(MODES), COUNTS, st.integers(1, 8))(check_aggregate)


class StepsCase(NamedTuple):
    n: int
    length: int
    dtype: str
    size: float
    counted: float
    masked: bool
    cut_off: bool
    gamma: float
    lam: float
    layout: str
    backend: str
    seed: int


STEPS = st.builds(
    StepsCase,
    st.integers(0, 3),
    st.integers(0, 70) | st.sampled_from((33, 1025)),
    st.sampled_from(tuple(DTYPES)[1:]),
    st.sampled_from((1e-3, 1.0, 1e4)),
    st.sampled_from((0.0, 0.1, 0.6, 0.95)),
    st.booleans(),
    st.booleans(),
    st.sampled_from((0.0, 1.0)) | st.floats(0, 1),
    st.sampled_from((0.0, 0.95, 1.0)) | st.floats(0, 1),
    st.sampled_from(("contiguous", "sliced columns", "every other column", "transposed")),
    st.sampled_from(("reference", "reference", *BACKENDS)),
    SEEDS,
)


def check_gae(case: StepsCase) -> None:
    generator = generator_of(case.seed)
    shape, dtype = (case.n, case.length), DTYPES[case.dtype]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) * case.size for s in (shape, shape, shape[:1])]
    copies = max(8, min(COPIES, 40_000 // max(1, case.n * case.length)))
    steps = [copies_like(v.to(dtype).double(), case.size / 8, copies, generator, dtype) for v in drawn]
    tensors = dict(zip(("rewards", "values", "last"), steps))
    mask = (torch.rand(shape, generator=generator) < case.counted).to(DEVICE) if case.masked else None
    if not case.cut_off:
        tensors["last"] = torch.zeros_like(tensors["last"])

    def in_plain_torch(t: Values) -> Values:
        many = None if mask is None else mask.expand(len(t["last"]), *shape).flatten(0, 1)
        flat = [wide(t[name]).flatten(0, 1) for name in ("rewards", "values", "last")]
        found = gae_loop(*flat[:2], many, flat[2], case.gamma, case.lam) if case.n and case.length else flat[:2]
        return {name: value.view(copies, *shape) for name, value in zip(("advantages", "returns"), found)}

    def ours(t: Values) -> Values:
        steps = [t[name] if mask is None else torch.where(mask, t[name], torch.nan) for name in ("rewards", "values")]
        steps = [laid_out(value, case.layout) for value in steps]
        how = dict(gamma=case.gamma, lam=case.lam, backend=case.backend)
        found = fused_po.gae(*steps, mask, t["last"] if case.cut_off else None, **how)
        return dict(zip(("advantages", "returns"), found))

    errors, exact = plain_and_exact(in_plain_torch, tensors, (), {}, {})
    judge("gae", ours({name: t[0] for name, t in tensors.items()}), errors, exact)


test_gae = fuzz(0.06, STEPS)(check_gae)
