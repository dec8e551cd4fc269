"""The exact KL: `kl_from_logits`, `linear_kl`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fuzzing import (
    DTYPES,
    SAMPLES,
    Values,
    copies_like,
    evaluate,
    fuzz,
    generator_of,
    judge,
    kept_dtype,
    one_nat,
    plain_and_exact,
    scaling_like,
    scaling_of,
)
from hypothesis import strategies as st
from kl_problems import in_torch
from numerics import IGNORE, Scaling, plain
from problems import (
    IGNORED,
    LAYOUTS,
    PLANS,
    SEEDS,
    TOP,
    Incoming,
    Plan,
    Rows,
    apart,
    draw_labels,
    draw_logits,
    dtypes,
    given_labels,
    incoming,
    laid_out,
    on_backend,
    rows,
    scalings,
)

import fused_po

NAMES = ("kl", "logps", "ref_logps", "entropy")
DIFFERENTIABLE = ("kl", "logps", "entropy")
DIRECTIONS = st.sampled_from((("reverse", 0.5), ("forward", 0.5), ("js", 0.5), ("js", 0.1), ("js", 0.97)))


class KLCase(NamedTuple):
    """distance: between the logits of the two sides.

    forbidden: the share of the vocabulary at -inf only on the side where that keeps the KL finite.
    """

    rows: Rows
    distance: float
    forbidden: float
    how: tuple[str, float]
    scalings: tuple[Scaling, Scaling]
    ref_dtype: str
    incoming: Incoming
    labels: str
    layouts: tuple[str, str]
    inplace: bool
    backend: str


@st.composite
def kl_cases(draw) -> KLCase:
    n, v, backend = draw(on_backend(16, 3000))
    found = draw(rows(n, v, draw(dtypes(backend)), backend))
    found = found._replace(
        size=1e3 if found.size == TOP else found.size, ignore_index=draw(st.sampled_from((-100, -1)))
    )
    labels = draw(st.sampled_from(("labels", "labels and mask", "mask")))
    names = DIFFERENTIABLE if labels != "mask" else ("kl",)
    scales = draw(scalings()), draw(scalings())
    forbidden = draw(st.sampled_from((0.0, 0.0, 0.4)))
    if scales[0].softcap or scales[1].softcap:  # a softcap makes -inf finite
        found, forbidden = found._replace(masked=0.0), 0.0
    low = "fp64" if found.dtype == "fp64" else draw(st.sampled_from(("fp32", "bf16", found.dtype)))
    return KLCase(
        found,
        draw(st.sampled_from((0.0, 1e-3, 0.3, 3.0))),
        forbidden,
        draw(DIRECTIONS),
        scales,
        low,
        draw(incoming(names, found.dtype)),
        labels,
        (draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        draw(st.booleans()),
        backend,
    )


def both_sides(case: KLCase, labels: torch.Tensor, generator: torch.Generator) -> Values:
    """Logits [copies, n, v] of policy and reference."""
    slope = max(s.steepest for s in case.scalings)
    logits = draw_logits(case.rows, labels, slope, generator)
    base = logits[0].double().cpu()
    ref = base + case.distance * torch.randn(base.shape, generator=generator, dtype=torch.float64)
    dtype = DTYPES[case.ref_dtype]
    ref = copies_like(
        ref.to(dtype).double(), apart(case.rows.spread, slope, case.ref_dtype), len(logits), generator, dtype
    )
    hidden = torch.rand(case.rows.v, generator=generator)[None] < case.forbidden
    hidden = hidden.expand(case.rows.n, -1).scatter(1, labels.clamp(min=0)[:, None], False).to(logits.device)
    if case.how[0] == "reverse":  # the reference allows every token that the policy allows
        logits = logits.masked_fill(hidden, -torch.inf)
    else:
        ref = ref.masked_fill(hidden, -torch.inf)
    return {"logits": logits, "ref": ref}


def wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def counted(stats, names: tuple[str, ...]) -> Values:
    return {name: value for name, value in zip(NAMES, stats) if name in names}


def check_kl(case: KLCase) -> None:
    generator = generator_of(case.rows.seed)
    labels, safe = given_labels(drawn := draw_labels(case.rows, generator), case.rows.ignore_index)
    tensors = both_sides(case, drawn, generator)
    mask = None if case.labels == "labels" else torch.rand(case.rows.n, generator=generator).to(labels.device) < 0.7
    if mask is not None:
        mask = mask & (safe != IGNORE) if case.labels == "mask" else mask
        safe = torch.where(mask, safe, IGNORE)
    names = NAMES if case.labels != "mask" else ("kl",)
    g = case.incoming.draw((case.rows.n,))

    def in_plain_torch(t: Values) -> Values:
        sides = [wide(t[name]) for name in ("logits", "ref")]
        return counted(in_torch(*sides, safe, *case.how, scaling_of(t), scaling_of(t, "ref_")), names)

    def ours(t: Values) -> Values:
        how = {name: tuple(getattr(s, name) for s in case.scalings) for name in Scaling._fields}
        how |= dict(direction=case.how[0], js_weight=case.how[1], ignore_index=case.rows.ignore_index)
        logits = laid_out(t["logits"] * 1.0, case.layouts[0])
        operands = logits, laid_out(t["ref"], case.layouts[1]), None if case.labels == "mask" else labels, mask
        stats = fused_po.kl_from_logits(*operands, inplace_backward=case.inplace, backend=case.backend, **how)
        assert (stats.kl >= 0).all()
        return counted(stats, names)

    numbers = scaling_like(case.scalings[0], len(tensors["logits"]), generator)
    numbers |= scaling_like(case.scalings[1], len(tensors["logits"]), generator, "ref_")
    errors, exact = plain_and_exact(in_plain_torch, tensors, ("logits",), g, numbers)
    found = evaluate(ours, {name: t[0] for name, t in tensors.items()}, ("logits",), g)
    for name, value in found.items():
        assert (value[safe == IGNORE] == 0).all(), f"{name} of a token that does not count"
    scaling, ref_cap = case.scalings[0], case.scalings[1].cap
    units = one_nat(case.rows.dtype, names, g, scaling, ref_cap, logits=torch.ones(1))
    judge("kl_from_logits", found, errors, exact, units)


test_kl_from_logits = fuzz(0.05, kl_cases())(check_kl)


class HeadsCase(NamedTuple):
    """hidden [n, widths[0]], ref_hidden [n, widths[1]], a vocabulary of v."""

    n: int
    v: int
    widths: tuple[int, int]
    bias: bool
    dtype: str
    size: float
    distance: float
    ignored: str
    how: tuple[str, float]
    scalings: tuple[Scaling, Scaling]
    incoming: Incoming
    labels: bool
    trained: tuple[str, ...]
    plan: Plan
    backend: str
    seed: int


@st.composite
def heads_cases(draw) -> HeadsCase:
    n, v, backend = draw(on_backend(12, 400))
    v, bias, labels = min(v, 600), draw(st.booleans()), draw(st.booleans())
    dtype, names = draw(dtypes(backend)), ("hidden", "weight", *["bias"] * bias)
    widths = draw(st.sampled_from((1, 2, 5, 16))), draw(st.sampled_from((1, 3, 16)))
    return HeadsCase(
        n,
        v,
        widths,
        bias,
        dtype,
        draw(st.sampled_from((0.1, 1.0, 1.0, 8.0))),
        draw(st.sampled_from((1e-2, 0.3, 1.0))),
        draw(st.sampled_from(IGNORED)),
        draw(DIRECTIONS),
        (draw(scalings()), draw(scalings())),
        draw(incoming(DIFFERENTIABLE if labels else ("kl",), dtype)),
        labels,
        draw(st.lists(st.sampled_from(names), min_size=1, unique=True).map(tuple)),
        draw(PLANS),
        backend,
        draw(SEEDS),
    )


def heads_tensors(case: HeadsCase, generator: torch.Generator) -> Values:
    """Tensors [copies, ...]; with equal widths the reference is `distance` away from the policy."""
    dtype, n_copies = DTYPES[case.dtype], max(4, min(SAMPLES // max(1, case.n), 150_000 // ((case.n + 1) * case.v)))
    slope, tensors = max(s.steepest for s in case.scalings), {}
    for prefix, width in zip(("", "ref_"), case.widths):
        shapes = {"hidden": ((case.n, width), case.size), "weight": ((case.v, width), width**-0.5)}
        for name, (shape, spread) in (shapes | ({"bias": ((case.v,), case.size)} if case.bias else {})).items():
            base = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
            if prefix and tensors[name][0].shape == shape:
                base = tensors[name][0].double().cpu() + case.distance * base
            base = base.to(dtype).double()
            tensors[prefix + name] = copies_like(base, apart(spread, slope, case.dtype), n_copies, generator, dtype)
    return tensors


def raw_logits(t: Values, prefix: str = "") -> torch.Tensor:
    raw = t[prefix + "hidden"] @ t[prefix + "weight"].mT
    return wide(raw + t[prefix + "bias"][..., None, :] if prefix + "bias" in t else raw)


def check_linear_kl(case: HeadsCase) -> None:
    generator = generator_of(case.seed)
    as_rows = Rows(case.n, case.v, case.dtype, 1.0, "spread", 0.0, case.ignored, False, -100, 1.0, case.seed)
    labels, safe = given_labels(draw_labels(as_rows, generator), -100)
    tensors = heads_tensors(case, generator)
    names = NAMES if case.labels else ("kl",)
    g = case.incoming.draw((case.n,))
    schedule = case.plan.schedule(2 * case.v, DTYPES[case.dtype], int((safe != IGNORE).sum()), case.n)

    def in_plain_torch(t: Values) -> Values:
        sides = raw_logits(t), raw_logits(t, "ref_")
        found = counted(in_torch(*sides, safe, *case.how, scaling_of(t), scaling_of(t, "ref_")), names)
        if case.plan.kept != 0 and "entropy" in g:
            found["entropy"] = plain(sides[0], safe, scaling_of(t), kept_dtype(case.dtype))["entropy"]
        return found

    def ours(t: Values) -> Values:
        how = {name: tuple(getattr(s, name) for s in case.scalings) for name in Scaling._fields}
        how |= dict(direction=case.how[0], js_weight=case.how[1], schedule=schedule, backend=case.backend)
        how |= dict(bias=t.get("bias"), ref_bias=t.get("ref_bias"))
        of_labels = dict(labels=labels) if case.labels else dict(mask=safe != IGNORE)
        stats = fused_po.linear_kl(t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"], **of_labels, **how)
        assert (stats.kl >= 0).all()
        return counted(stats, names)

    numbers = scaling_like(case.scalings[0], len(tensors["hidden"]), generator)
    numbers |= scaling_like(case.scalings[1], len(tensors["hidden"]), generator, "ref_")
    errors, exact = plain_and_exact(in_plain_torch, tensors, case.trained, g, numbers)
    found = evaluate(ours, {name: t[0] for name, t in tensors.items()}, case.trained, g)
    rows_bias = torch.full((1,), float(max(1, case.n)))
    factors = {"hidden": tensors["weight"], "weight": max(1, case.n) * tensors["hidden"], "bias": rows_bias}
    units = one_nat(case.dtype, names, g, case.scalings[0], case.scalings[1].cap, **factors)
    judge("linear_kl", found, errors, exact, units)


test_linear_kl = fuzz(0.03, heads_cases())(check_linear_kl)
