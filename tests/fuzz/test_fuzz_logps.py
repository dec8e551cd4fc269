"""Log-probs and the other statistics: `logps_from_logits`, `linear_logps`, `chunked_loss`."""

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
from numerics import IGNORE, Scaling, plain
from problems import (
    IGNORE_INDICES,
    IGNORED,
    LAYOUTS,
    PLANS,
    SEEDS,
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

OUTPUTS = ("logps", "entropy", "lse", "mean_logits", "log_sum_sq_probs")
DIFFERENTIABLE = OUTPUTS[:3]


class LogitsCase(NamedTuple):
    rows: Rows
    scaling: Scaling
    outputs: tuple[str, ...]
    incoming: Incoming
    layout: str
    inplace: bool
    backend: str


@st.composite
def logits_cases(draw) -> LogitsCase:
    n, v, backend = draw(on_backend(24, 5000))
    found = draw(rows(n, v, draw(dtypes(backend)), backend))
    outputs = draw(st.lists(st.sampled_from((*OUTPUTS, "is_top1")), min_size=1, unique=True).map(tuple))
    weighed = tuple(name for name in outputs if name in DIFFERENTIABLE)
    g = draw(incoming(weighed, found.dtype)) if weighed else Incoming((), 1.0, 0.0, 0)
    layout, inplace = draw(st.sampled_from(LAYOUTS)), draw(st.booleans())
    return LogitsCase(found, draw(scalings(found.size)), outputs, g, layout, inplace, backend)


def top1_is_right(top1: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, scaling: Scaling) -> None:
    """is_top1 is False for a label below the largest logit and True for one above all others, apart from rounding."""
    scored = labels != IGNORE
    z = scaling.apply(logits.double())[scored]
    at = labels[scored][:, None]
    label, others = z.gather(1, at).squeeze(1), z.scatter(1, at, -torch.inf).amax(1) if z.numel() else z[:, 0]
    slack = 4 * torch.finfo(torch.float32).eps * z.masked_fill(z == -torch.inf, 0).abs().amax(1) if z.numel() else 0
    assert not top1[~scored].any()
    assert top1[scored][label > others + slack].all() and not top1[scored][label < others - slack].any()


def check_logits(case: LogitsCase) -> None:
    generator = generator_of(case.rows.seed)
    labels, safe = given_labels(drawn := draw_labels(case.rows, generator), case.rows.ignore_index)
    logits = draw_logits(case.rows, drawn, case.scaling.steepest, generator)
    g = case.incoming.draw((case.rows.n,))
    names = tuple(name for name in case.outputs if name != "is_top1")
    leaves = ("logits",) if g else ()

    def in_torch(t: Values) -> Values:
        stats = plain(t["logits"], safe, scaling_of(t))
        return {name: stats[name] for name in names}

    def ours(t: Values) -> Values:
        how = dict(case.scaling._asdict(), outputs=case.outputs, inplace_backward=case.inplace, backend=case.backend)
        logits = t["logits"] * 1.0 if case.inplace else t["logits"]  # a leaf cannot be overwritten
        stats = fused_po.logps_from_logits(logits, labels, ignore_index=case.rows.ignore_index, **how)
        if stats.is_top1 is not None:
            top1_is_right(stats.is_top1, t["logits"].detach(), safe, case.scaling)
        assert all((value is None) == (name not in case.outputs) for name, value in stats._asdict().items())
        return {name: getattr(stats, name) for name in names}

    numbers = scaling_like(case.scaling, len(logits), generator)
    errors, exact = plain_and_exact(in_torch, {"logits": logits}, leaves, g, numbers)
    found = evaluate_view(ours, laid_out(logits[0], case.layout), leaves, g)
    for name, value in found.items():
        assert (value[safe == IGNORE] == 0).all(), f"{name} of an ignored row"
    units = one_nat(case.rows.dtype, names, g, case.scaling, logits=torch.ones(1))
    judge("logps_from_logits", found, errors, exact, units)


def evaluate_view(run, logits: torch.Tensor, leaves: tuple[str, ...], g: Values) -> Values:
    """Like `evaluate`, but the logits keep their strides."""
    values = run({"logits": (leaf := logits.detach().requires_grad_(bool(leaves)))})
    found = {name: value.detach() for name, value in values.items()}
    if leaves:
        total = sum((values[name] * w.to(values[name].dtype)).sum() for name, w in g.items())
        found["d logits"] = torch.autograd.grad(total, leaf)[0]
    return found


test_logps_from_logits = fuzz(0.15, logits_cases())(check_logits)


class HeadCase(NamedTuple):
    """hidden [n, width], weight [v, width]; `trained` names what requires grad."""

    n: int
    v: int
    width: int
    rank: int
    bias: bool
    dtype: str
    size: float
    ignored: str
    ignore_index: int
    scaling: Scaling
    outputs: tuple[str, ...]
    incoming: Incoming
    trained: tuple[str, ...]
    plan: Plan
    backend: str
    seed: int

    @property
    def kept(self) -> torch.dtype | None:
        """The dtype of the kept probabilities behind the entropy's gradient."""
        return kept_dtype(self.dtype) if "entropy" in self.incoming.names else None

    @property
    def as_rows(self) -> Rows:
        """The rows of its logits, to draw labels for."""
        masks = 0.0, self.ignored, False, self.ignore_index
        return Rows(self.n, self.v, self.dtype, 1.0, "spread", *masks, 1.0, self.seed)


@st.composite
def head_cases(draw) -> HeadCase:
    n, v, backend = draw(on_backend(16, 600))
    v, width = min(v, 1100), draw(st.sampled_from((1, 2, 5, 16, 24)))
    rank, bias = draw(st.sampled_from((0, 0, 1, 3))), draw(st.booleans())
    names = ("hidden", "weight", *["bias"] * bias, *["u", "low"] * (rank > 0))
    trained = draw(st.lists(st.sampled_from(names), unique=True).map(tuple) | st.just(names))
    outputs = draw(st.lists(st.sampled_from(OUTPUTS), min_size=1, unique=True).map(tuple))
    weighed = tuple(name for name in outputs if name in DIFFERENTIABLE)
    dtype = draw(dtypes(backend))
    g = draw(incoming(weighed, dtype)) if weighed and trained else Incoming((), 1.0, 0.0, 0)
    return HeadCase(
        n,
        v,
        width,
        rank,
        bias,
        dtype,
        draw(st.sampled_from((0.1, 1.0, 1.0, 8.0, 100.0))),
        draw(st.sampled_from(IGNORED)),
        draw(st.sampled_from(IGNORE_INDICES)),
        draw(scalings()),
        outputs,
        g,
        trained,
        draw(PLANS),
        backend,
        draw(SEEDS),
    )


def head_tensors(case: HeadCase, generator: torch.Generator) -> Values:
    """Tensors [copies, ...]; raw logits have about the size `size`."""
    dtype, n_copies = DTYPES[case.dtype], max(4, min(SAMPLES // max(1, case.n), 200_000 // ((case.n + 1) * case.v)))
    shapes = {"hidden": ((case.n, case.width), case.size), "weight": ((case.v, case.width), case.width**-0.5)}
    if case.bias:
        shapes["bias"] = (case.v,), case.size
    if case.rank:
        shapes |= {"u": ((case.n, case.rank), case.size), "low": ((case.v, case.rank), case.rank**-0.5)}
    tensors = {}
    for name, (shape, spread) in shapes.items():
        base = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype).double()
        tensors[name] = copies_like(base, apart(spread, case.scaling.steepest, case.dtype), n_copies, generator, dtype)
    return tensors


def raw_logits(t: Values) -> torch.Tensor:
    """Raw logits [copies, n, v] in plain PyTorch."""
    raw = t["hidden"] @ t["weight"].mT
    if "u" in t:
        raw = raw + t["u"] @ t["low"].mT
    return raw + t["bias"][..., None, :] if "bias" in t else raw


def head_units(case: HeadCase, t: Values, names: tuple[str, ...], g: Values) -> dict[str, float]:
    """`one_nat` for a head: hidden's gradient is multiplied by the weight, and the weight's gradient sums over rows."""
    n = max(1, case.n)
    factors = {"hidden": t["weight"], "weight": n * t["hidden"], "bias": torch.full((1,), float(n))}
    if case.rank:
        factors |= {"u": t["low"], "low": n * t["u"]}
    return one_nat(case.dtype, names, g, case.scaling, **factors)


def check_linear(case: HeadCase) -> None:
    generator = generator_of(case.seed)
    as_rows = case.as_rows
    labels, safe = given_labels(draw_labels(as_rows, generator), case.ignore_index)
    tensors = head_tensors(case, generator)
    g = case.incoming.draw((case.n,))
    schedule = case.plan.schedule(case.v, DTYPES[case.dtype], int((safe != IGNORE).sum()), case.n)

    def in_torch(t: Values) -> Values:
        stats = plain(raw_logits(t), safe, scaling_of(t), None if case.plan.kept == 0 else case.kept)
        return {name: stats[name] for name in case.outputs}

    def ours(t: Values) -> Values:
        how = dict(case.scaling._asdict(), ignore_index=case.ignore_index, schedule=schedule, backend=case.backend)
        low_rank = (t["u"], t["low"]) if case.rank else None
        operands = t["hidden"], t["weight"], labels, t.get("bias")
        stats = fused_po.linear_logps(*operands, outputs=case.outputs, low_rank=low_rank, **how)
        return {name: getattr(stats, name) for name in case.outputs}

    numbers = scaling_like(case.scaling, len(tensors["hidden"]), generator)
    errors, exact = plain_and_exact(in_torch, tensors, case.trained if g else (), g, numbers)
    found = evaluate(ours, {name: t[0] for name, t in tensors.items()}, case.trained if g else (), g)
    judge("linear_logps", found, errors, exact, head_units(case, tensors, case.outputs, g))


test_linear_logps = fuzz(0.08, head_cases())(check_linear)


def check_chunked(case: HeadCase, n_groups: int) -> None:
    """A weighted sum of the outputs and their squares, in chunks of groups whose tokens are not adjacent."""
    generator = generator_of(case.seed)
    as_rows = case.as_rows
    labels, safe = given_labels(draw_labels(as_rows, generator), case.ignore_index)
    tensors = head_tensors(case, generator)
    g = case.incoming.draw((case.n,))
    plan = case.plan._replace(compact=True, excess=None)
    schedule = plan.schedule(case.v, DTYPES[case.dtype], 0, case.n)
    groups = torch.randint(0, n_groups, (case.n,), generator=generator).to(labels.device)
    seen = []

    def weighed(stats, rows=slice(None)) -> torch.Tensor:
        terms = [(stats[name] * w[rows].to(stats[name].dtype)).sum(-1) for name, w in g.items()]
        return sum(terms)

    def ours(t: Values) -> Values:
        def share(stats, rows):
            seen.append(rows)
            return weighed(stats._asdict(), rows)

        how = dict(case.scaling._asdict(), ignore_index=case.ignore_index, outputs=case.outputs, backend=case.backend)
        operands = t["hidden"], t["weight"], labels, groups, t.get("bias")
        return {"loss": fused_po.chunked_loss(share, *operands, schedule=schedule, **how)}

    def in_torch(t: Values) -> Values:
        return {"loss": weighed(plain(raw_logits(t), safe, scaling_of(t), case.kept))}

    one = {"loss": torch.ones((), dtype=torch.float64, device=labels.device)}
    numbers = scaling_like(case.scaling, len(tensors["hidden"]), generator)
    errors, exact = plain_and_exact(in_torch, tensors, case.trained, one, numbers)
    found = evaluate(ours, {name: t[0] for name, t in tensors.items()}, case.trained, one)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(case.n, device=labels.device))
    units, slope = head_units(case, tensors, (), g), case.scaling.steepest
    judge("chunked_loss", found, errors, exact, units | {"loss": units["d bias"] / slope})


@st.composite
def chunked_cases(draw) -> HeadCase:
    case = draw(head_cases().filter(lambda c: c.incoming.names))
    trained = tuple(name for name in case.trained if name in ("hidden", "weight", "bias"))
    return case._replace(rank=0, trained=trained)


test_chunked_loss = fuzz(0.03, chunked_cases(), st.integers(1, 6))(check_chunked)
