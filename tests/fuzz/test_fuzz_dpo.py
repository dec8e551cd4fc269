"""DPO with its KL penalty: `dpo_from_logits`, `linear_dpo`."""

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
    one_nat,
    plain_and_exact,
    scaling_like,
    scaling_of,
)
from hypothesis import strategies as st
from kl_problems import in_torch
from numerics import IGNORE, Scaling
from plain_ops import dpo_in_torch
from problems import (
    IGNORED,
    PLANS,
    SEEDS,
    Incoming,
    Plan,
    Rows,
    apart,
    draw_labels,
    dtypes,
    given_labels,
    incoming,
    laid_out,
)

import fused_po

FIELDS = ("loss", "losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "margins")
WEIGHED = ("loss", "losses", "chosen_logps", "rejected_logps")


class DPOCase(NamedTuple):
    """From logits if width is 0, else from hidden states and heads of that width.

    reference: "model" (logits, or hidden states and a head), "tokens" or "sums" (log-probs).
    """

    pairs: int
    length: int
    v: int
    width: int
    dtype: str
    size: float
    distance: float
    ignored: str
    reference: str
    beta: float
    smoothing: float
    kl: str | None
    coef: float
    scaling: Scaling
    incoming: Incoming
    layout: str
    inplace: bool
    plan: Plan
    backend: str
    seed: int


SCALINGS = st.builds(Scaling, st.floats(0.5, 2), st.floats(0.5, 2), st.sampled_from((None, 20.0)))


@st.composite
def dpo_cases(draw) -> DPOCase:
    backend = draw(st.sampled_from(("reference", "reference", "reference", "triton")))
    pairs, length = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    if backend == "triton":
        pairs, length = min(pairs, 1), min(length, 2)
    dtype, reference = draw(dtypes(backend)), draw(st.sampled_from(("model", "tokens", "sums")))
    kls = {"model": (None, "k1", "k2", "k3", "full"), "tokens": (None, "k1", "k2", "k3"), "sums": (None,)}[reference]
    kl = draw(st.sampled_from(kls))
    return DPOCase(
        pairs,
        length,
        draw(st.integers(1, 40) | st.sampled_from((64, 127, 300))),
        draw(st.sampled_from((0, 0, 1, 8))),
        dtype,
        draw(st.sampled_from((0.1, 1.0, 4.0))),
        draw(st.sampled_from((1e-2, 0.3, 1.0))),
        draw(st.sampled_from(IGNORED)),
        reference,
        draw(st.sampled_from((0.01, 0.1, 1.0))),
        draw(st.sampled_from((0.0, 0.0, 0.2))),
        kl,
        draw(st.sampled_from((0.0, 0.4))) if kl else 0.0,
        draw(st.just(Scaling()) | SCALINGS),
        draw(incoming(WEIGHED, dtype)),
        draw(st.sampled_from(("contiguous", "sliced rows", "every other column"))),
        draw(st.booleans()),
        draw(PLANS),
        backend,
        draw(SEEDS),
    )


def dpo_tensors(case: DPOCase, generator: torch.Generator) -> Values:
    """The inputs [copies, ...]: logits, or hidden states and weight, and those of the reference."""
    dtype, tokens = DTYPES[case.dtype], (2 * case.pairs, case.length)
    n_copies = max(8, min(SAMPLES, 500_000 // max(1, tokens[0] * tokens[1] * case.v)))
    shapes = {"logits": ((*tokens, case.v), case.size)}
    if case.width:
        shapes = {"hidden": ((*tokens, case.width), case.size), "weight": ((case.v, case.width), case.width**-0.5)}
    found = {}
    for name, (shape, spread) in shapes.items():
        base = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        ref = base + case.distance * spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        for key, value in ((name, base), ("ref_" + name, ref)):
            step = apart(spread, case.scaling.steepest, case.dtype)
            found[key] = copies_like(value.to(dtype).double(), step, n_copies, generator, dtype)
    if case.reference != "model":
        shape = tokens if case.reference == "tokens" else tokens[:1]
        ref = -2 * torch.rand(shape, generator=generator, dtype=torch.float64) * (1 if len(shape) == 2 else case.length)
        wide = torch.float64 if case.dtype == "fp64" else torch.float32
        found = {name: t for name, t in found.items() if not name.startswith("ref_")}
        found["ref_logps"] = copies_like(ref.to(wide).double(), 0.05, n_copies, generator, wide)
    return found


def logits_of(t: Values, prefix: str = "") -> torch.Tensor:
    """Logits [copies, 2B, T, V] in at least fp32."""
    raw = t[prefix + "logits"] if prefix + "logits" in t else t[prefix + "hidden"] @ t[prefix + "weight"].mT[:, None]
    return raw if raw.dtype == torch.float64 else raw.float()


def in_steps(case: DPOCase, t: Values, labels: torch.Tensor) -> Values:
    """DPO in plain PyTorch; in float64 it gives the exact values."""
    scaling = scaling_of({name: value[..., None] for name, value in t.items() if name in Scaling._fields})
    z, ref = scaling.apply(logits_of(t)), t.get("ref_logps")
    kl, coef = (None, 0.0) if case.kl == "full" else (case.kl, case.coef)
    if ref is None:
        q = scaling.apply(logits_of(t, "ref_").detach())
        at = labels.clamp(min=0).expand(q.shape[:-1])[..., None]
        ref = q.log_softmax(-1).gather(-1, at).squeeze(-1)
    out = dpo_in_torch(z, labels, ref, case.beta, case.smoothing, kl, coef, z.dtype)
    if case.kl == "full":
        out["kl_per_token"] = in_torch(z, q, labels, "reverse", 0.5)[0]
        out["kl"] = out["kl_per_token"].sum((-1, -2)) / (labels != IGNORE).sum().clamp(min=1)
        out["loss"] = out["loss"] + case.coef * out["kl"]
    return out


def check_dpo(case: DPOCase) -> None:
    generator = generator_of(case.seed)
    n = 2 * case.pairs * case.length
    as_rows = Rows(n, case.v, case.dtype, 1.0, "spread", 0.0, case.ignored, False, -100, 1.0, case.seed)
    labels, safe = given_labels(draw_labels(as_rows, generator), -100)
    labels, safe = (y.view(2 * case.pairs, case.length) for y in (labels, safe))
    tensors = dpo_tensors(case, generator)
    signs = case.incoming.draw((case.pairs,))
    g = {name: w.sum() + case.incoming.scale if name == "loss" else w for name, w in signs.items()}
    leaves = ("hidden", "weight") if case.width else ("logits",)
    names = (*FIELDS, *(("kl", "kl_per_token") if case.kl else ()))

    def ours(t: Values) -> Values:
        how = dict(case.scaling._asdict(), beta=case.beta, label_smoothing=case.smoothing, kl=case.kl)
        how |= dict(kl_coef=case.coef, ref_logps=t.get("ref_logps"), backend=case.backend)
        if case.width:
            schedule = case.plan.schedule(2 * case.v, DTYPES[case.dtype], int((safe != IGNORE).sum()), n)
            reference = t.get("ref_hidden"), t.get("ref_weight")
            out = fused_po.linear_dpo(t["hidden"], t["weight"], labels, *reference, schedule=schedule, **how)
        else:
            rows = laid_out((t["logits"] * 1.0).reshape(n, case.v), case.layout)
            logits = rows.view(2 * case.pairs, case.length, case.v) if n else t["logits"] * 1.0
            reference = t.get("ref_logits")
            out = fused_po.dpo_from_logits(logits, labels, reference, inplace_backward=case.inplace, **how)
        assert torch.equal(out.accuracy, (out.margins > 0).to(out.accuracy.dtype))
        return {name: getattr(out, name) for name in names}

    numbers = scaling_like(case.scaling, len(next(iter(tensors.values()))), generator)
    errors, exact = plain_and_exact(lambda t: in_steps(case, t, safe), tensors, leaves, g, numbers)
    found = evaluate(ours, {name: t[0] for name, t in tensors.items()}, leaves, g)
    judge("linear_dpo" if case.width else "dpo_from_logits", found, errors, exact, dpo_units(case, tensors, names, g))


def dpo_units(case: DPOCase, t: Values, names: tuple[str, ...], g: Values) -> dict[str, float]:
    """`one_nat` per token; sums over an answer, k2 and k3 multiply it by their number of tokens and their slope."""
    steep = max(1.0, case.length) * 8
    factors = {"logits": torch.ones(1)}
    if case.width:
        factors = {"hidden": t["weight"], "weight": 2 * max(1, case.pairs) * steep * t["hidden"]}
    return {name: steep * unit for name, unit in one_nat(case.dtype, names, g, case.scaling, **factors).items()}


test_dpo = fuzz(0.08, dpo_cases())(check_dpo)
