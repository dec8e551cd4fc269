"""How a fuzzed case is run, judged and counted.

A case is a NamedTuple of plain numbers and names; all its tensors follow from them, so that what Hypothesis prints of a
failure is a line that repeats it. A problem's tensors have a leading dimension of
copies: the first is the problem, the others differ from it by some per cent. We are run on the first, plain PyTorch on
all, and its errors over all of them bound ours: one problem's error is luck.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis
import torch
import tqdm
from hypothesis import strategies as st
from numerics import DEVICE, Scaling, assert_within, fresh_seed
from torch import Tensor

Values = dict[str, Tensor]
CASES = int(os.environ.get("FUSED_PO_FUZZ", "300"))  # in all
SEED = fresh_seed("tests/fuzz")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLES = 256  # of plain PyTorch's errors, at least
# float64 can't be seen to err against float64. Its errors are taken to be those of fp32 by the ratio of the epsilons,
# and the truth, computed in float64 too, errs as plain PyTorch does: 2 x plain + 1 x plain is 1.5 times the bound.
FP64, FP32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
AS_FLOAT64 = 1.5 * FP64 / FP32

SHRUNK = 2000  # runs of fewer cases stop at a failure, and Hypothesis looks for the simplest like it; longer ones go on
QUIET = [
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.data_too_large,
    hypothesis.HealthCheck.filter_too_much,
    hypothesis.HealthCheck.large_base_example,
]
RATIOS: dict[str, list[float]] = {}  # by op, a case each: our error beyond rounding / plain PyTorch's, at most 2


def fuzz(share: float, *strategies: st.SearchStrategy) -> Callable:
    """Make a test of a check: run it on this share of all cases, from the printed seed."""
    count = max(3, round(share * CASES))
    shrunk = [hypothesis.Phase.shrink] if CASES < SHRUNK else []
    how = dict(deadline=None, database=None, print_blob=False, suppress_health_check=QUIET)
    how |= dict(max_examples=count, phases=[hypothesis.Phase.generate, *shrunk])

    def decorate(check: Callable) -> Callable:
        def test() -> None:
            failed, begun = [], time.time()
            RATIOS.clear()
            with tqdm.tqdm(total=count, desc=check.__name__, disable=None, file=sys.__stderr__) as bar:

                @hypothesis.seed(SEED)
                @hypothesis.settings(**how)
                @hypothesis.given(st.tuples(*strategies))
                def every(case: tuple) -> None:
                    bar.update()
                    try:
                        check(*case)
                    except Exception as error:
                        if shrunk:
                            raise
                        failed.append(f"{check.__name__}{case}: {type(error).__name__}: {error}")

                every()
            write(check.__name__, failed, time.time() - begun)
            assert not failed, "\n".join([f"{len(failed)} cases failed:", *failed])

        return test

    return decorate


def write(name: str, failed: list[str], seconds: float) -> None:
    """What was counted, for fuzz_report.py, where FUSED_PO_FUZZ_OUT names a folder."""
    if "FUSED_PO_FUZZ_OUT" in os.environ:
        folder = Path(os.environ["FUSED_PO_FUZZ_OUT"])
        folder.mkdir(parents=True, exist_ok=True)
        found = {"seed": SEED, "seconds": round(seconds), "failed": failed, "ratios": RATIOS}
        (folder / f"{name}.json").write_text(json.dumps(found))


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def copies_like(
    base: Tensor, spread: float | Tensor, n_copies: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """[n_copies, *base.shape]: base, then the same give or take `spread`, within the dtype's range; -inf stays."""
    noise = torch.randn(n_copies, *base.shape, generator=generator, dtype=torch.float64) * spread
    noise[:1] = 0
    most = torch.finfo(dtype).max
    finite = (base + noise).clamp(-most, most)
    return torch.where(base == -torch.inf, -torch.inf, finite).to(dtype).to(DEVICE)


def scaling_like(scaling: Scaling, n_copies: int, generator: torch.Generator, prefix: str = "") -> Values:
    """The scaling's numbers, [n_copies, 1, 1] each, that each copy may have its own: their rounding is luck too."""
    found = {}
    for name, value in scaling._asdict().items():
        if value is not None:
            noise = torch.randn(n_copies, 1, 1, generator=generator, dtype=torch.float64).clamp(-4, 4) / 128
            noise[:1] = 0
            found[prefix + name] = (value * (1 + noise)).to(DEVICE)
    return found


def scaling_of(t: Values, prefix: str = "") -> Scaling:
    """A Scaling of what `scaling_like` gave."""
    return Scaling(*(t.get(prefix + name) for name in Scaling._fields))


def evaluate(run: Callable[[Values], Values], tensors: Values, leaves: tuple[str, ...], incoming: Values) -> Values:
    """What run returns, and the gradients ("d leaf") of its values weighed by `incoming`."""
    own = {name: t.detach().clone().requires_grad_() if name in leaves else t for name, t in tensors.items()}
    values = run(own)
    found = {name: value.detach() for name, value in values.items()}
    terms = [(values[name] * g.to(values[name].dtype)).sum() for name, g in incoming.items()]
    if terms and leaves:
        grads = torch.autograd.grad(sum(terms), [own[name] for name in leaves], allow_unused=True)
        for name, grad in zip(leaves, grads):
            found["d " + name] = torch.zeros_like(own[name]) if grad is None else grad
    return found


def cast(tensors: Values, dtype: torch.dtype) -> Values:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def plain_and_exact(
    run: Callable, tensors: Values, leaves: tuple[str, ...], incoming: Values, numbers: Values
) -> tuple[Values, Values]:
    """(plain PyTorch's errors by name, the exact values of the first copy); numbers: of `scaling_like`.

    The errors are [copies, ...], NaN where there is nothing to judge. Incoming gradients have all signs in turn: of a
    sum of two values' gradients one sign may cancel what another adds up.
    """
    copies = torch.arange(len(next(iter(tensors.values()))), device=DEVICE)
    signs = {name: 1 - 2 * (copies >> i & 1) for i, name in enumerate(incoming)}
    incoming = {name: signs[name].view(-1, *[1] * g.ndim) * g for name, g in incoming.items()}
    wide = any(t.dtype == torch.float64 for t in tensors.values())
    narrow = cast(tensors, torch.float32) if wide else tensors
    theirs = evaluate(run, narrow | cast(numbers, torch.float32), leaves, incoming)
    exact = evaluate(run, cast(narrow, torch.float64) | numbers, leaves, incoming)
    errors = {}
    for name, value in exact.items():
        finite = value.isfinite() & judged(value, theirs[name].dtype)
        error = (theirs[name].double() - value).abs().nan_to_num(nan=0.0) * (AS_FLOAT64 if wide else 1)
        errors[name] = error.where(finite, torch.nan)
    if wide:
        first = {name: t[:1] if t.is_floating_point() else t for name, t in (tensors | numbers).items()}
        exact = evaluate(run, first, leaves, {name: g[:1] for name, g in incoming.items()})
    return errors, {name: value[0] for name, value in exact.items()}


def kept_as(dtype: str) -> torch.dtype | None:
    """In what the entropy's gradient comes back from a kept basis: None where that is as good as the logits."""
    return DTYPES[dtype] if DTYPES[dtype].itemsize == 2 else None


def judged(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a value is held against its bound: not where it may overflow the dtype."""
    return ~(exact.isfinite() & (exact.abs() > torch.finfo(dtype).max / 2))


def judge(op: str, ours: Values, errors: Values, exact: Values, units: dict[str, float] | None = None) -> None:
    """Hold every value against its bound, and count the case; units: see `one_nat`.

    Few rows' errors are a few numbers, however many values they are spread over: our RMS is held against the largest
    of plain PyTorch's in one copy.
    """
    worst = 0.0
    for name, value in ours.items():
        where = judged(exact[name], value.dtype)
        unit = (units or {}).get(name, 0.0) * min(
            1.0, FP32 / torch.finfo(value.dtype).eps
        )  # nothing is computed in less
        both = (torch.where(where, v, 0) for v in (value, exact[name]))
        theirs = errors[name]
        rms = theirs.flatten(1).square().nanmean(1).sqrt().nan_to_num(nan=0.0).max() if theirs.ndim > 1 else None
        beyond, most = assert_within(name, *both, theirs[~theirs.isnan()], unit, rms)
        worst = max(worst, beyond / most if 0 < beyond < torch.inf else 0.0)  # infinite only where plain PyTorch's is
    count(op, worst)


def count(op: str, ratio: float) -> None:
    RATIOS.setdefault(op, []).append(ratio)


def one_nat(
    dtype: str, names: tuple[str, ...], g: Values, scaling: Scaling, ref_cap: float = 0.0, **factors: Tensor
) -> dict[str, float]:
    """Of each value, what an error of 1 nat in the log-probs makes of it: itself, and of the gradients of `factors`.

    The rounding of a number of this size is let pass where the bound would be less than what it is made of. A log-prob
    is the log of a sum: in another order it is off by the rounding of 1, and where one token has all of the probability
    plain PyTorch may be exact, while the kernels, which work in base 2, are off by that. In float64 the truth is such a
    sum too, of 1 and what fp32 does not see beside it: a rounding of 1 a term. And its capped logits are rounded, also
    where fp32 sees the cap itself, so that plain PyTorch is exact there.

    scaling: of the policy. ref_cap: of the reference's scaling.
    """
    scale = 8.0 + max(scaling.cap, ref_cap) if dtype == "fp64" else 1.0
    largest = sum(float(w.abs().max()) for w in g.values() if w.numel()) * scaling.steepest
    sizes = {name: float(f.abs().max()) if f.numel() else 0.0 for name, f in factors.items()}
    # A log, and twice a log; a log of either side; a log, and a mean of others.
    logs = {"log_sum_sq_probs": 4.0, "kl": 2.0, "entropy": 2.0}
    units = {name: logs.get(name, 1.0) for name in names}
    units |= {"d " + name: largest * size for name, size in sizes.items()}
    return {name: scale * unit for name, unit in units.items()}
