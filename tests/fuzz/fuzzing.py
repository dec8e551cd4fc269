"""Run, check and count fuzzed cases.

A case is a NamedTuple of numbers and names that determine all its tensors, so that the line that Hypothesis prints for
a failure reproduces it. The tensors of a problem have a leading dimension of copies: the first is the problem, the
others differ from it by some per cent. Ours runs on the first copy and plain PyTorch on all of them; its errors over
all copies bound ours, since the error of one problem is random.
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
CASES = int(os.environ.get("FUSED_PO_FUZZ", "300"))  # cases of all tests together
SEED = fresh_seed("tests/fuzz")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLES = 256  # at least this many errors of plain PyTorch
# Errors of float64 cannot be measured against float64. They are taken as fp32's errors times the ratio of the epsilons.
# The exact values, in float64 too, err as plain PyTorch does: 2 x plain + 1 x plain is 1.5 times the bound.
FP64, FP32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
AS_FLOAT64 = 1.5 * FP64 / FP32

SHRUNK = 2000  # shorter runs stop at a failure, and Hypothesis shrinks it; longer runs continue
QUIET = [
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.data_too_large,
    hypothesis.HealthCheck.filter_too_much,
    hypothesis.HealthCheck.large_base_example,
]
RATIOS: dict[str, list[float]] = {}  # by op and case: our error beyond rounding / plain PyTorch's error, at most 2


def fuzz(share: float, *strategies: st.SearchStrategy) -> Callable:
    """Turn a check into a test that runs it on this share of all cases, from the printed seed."""
    count = max(3, round(share * CASES))
    shrunk = [hypothesis.Phase.shrink] if CASES < SHRUNK else []
    how = dict(deadline=None, database=None, print_blob=False, suppress_health_check=QUIET)
    how |= dict(max_examples=count, phases=[hypothesis.Phase.generate, *shrunk])

    def decorate(check: Callable) -> Callable:
        def test() -> None:
            failed, started = [], time.time()
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
            write(check.__name__, failed, time.time() - started)
            assert not failed, "\n".join([f"{len(failed)} cases failed:", *failed])

        return test

    return decorate


def write(name: str, failed: list[str], seconds: float) -> None:
    """Write the counts for fuzz_report.py to the folder FUSED_PO_FUZZ_OUT, if it is set."""
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
    """[n_copies, *base.shape]: base, then copies that differ by up to `spread`, in the dtype's range; -inf stays."""
    noise = torch.randn(n_copies, *base.shape, generator=generator, dtype=torch.float64) * spread
    noise[:1] = 0
    most = torch.finfo(dtype).max
    finite = (base + noise).clamp(-most, most)
    return torch.where(base == -torch.inf, -torch.inf, finite).to(dtype).to(DEVICE)


def scaling_like(scaling: Scaling, n_copies: int, generator: torch.Generator, prefix: str = "") -> Values:
    """The scaling's numbers, [n_copies, 1, 1] each: every copy has its own, since their rounding is random too."""
    found = {}
    for name, value in scaling._asdict().items():
        if value is not None:
            noise = torch.randn(n_copies, 1, 1, generator=generator, dtype=torch.float64).clamp(-4, 4) / 128
            noise[:1] = 0
            found[prefix + name] = (value * (1 + noise)).to(DEVICE)
    return found


def scaling_of(t: Values, prefix: str = "") -> Scaling:
    """A Scaling from the numbers of `scaling_like`."""
    return Scaling(*(t.get(prefix + name) for name in Scaling._fields))


def evaluate(run: Callable[[Values], Values], tensors: Values, leaves: tuple[str, ...], incoming: Values) -> Values:
    """The results of run, and the gradients ("d leaf") of their sum weighted by `incoming`."""
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
    """(plain PyTorch's errors by name, the exact values of the first copy); numbers: from `scaling_like`.

    The errors are [copies, ...], with NaN where nothing is compared. Incoming gradients take all signs in turn, since
    the gradients of two values may cancel with one sign and add up with another.
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


def kept_dtype(dtype: str) -> torch.dtype | None:
    """The dtype of the kept basis behind the entropy's gradient; None where it is as precise as the logits."""
    return DTYPES[dtype] if DTYPES[dtype].itemsize == 2 else None


def judged(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a value is compared with its bound: not where it may overflow the dtype."""
    return ~(exact.isfinite() & (exact.abs() > torch.finfo(dtype).max / 2))


def judge(op: str, ours: Values, errors: Values, exact: Values, units: dict[str, float] | None = None) -> None:
    """Compare every value with its bound, and count the case; units: see `one_nat`.

    The errors of few rows are few independent numbers, however many values they affect, so our RMS is compared with the
    largest RMS of plain PyTorch in one copy.
    """
    worst = 0.0
    for name, value in ours.items():
        where = judged(exact[name], value.dtype)
        # no computation uses a narrower dtype
        unit = (units or {}).get(name, 0.0) * min(1.0, FP32 / torch.finfo(value.dtype).eps)
        both = (torch.where(where, v, 0) for v in (value, exact[name]))
        theirs = errors[name]
        rms = theirs.flatten(1).square().nanmean(1).sqrt().nan_to_num(nan=0.0).max() if theirs.ndim > 1 else None
        beyond, most = assert_within(name, *both, theirs[~theirs.isnan()], unit, rms)
        # infinite only where plain PyTorch's result is
        worst = max(worst, beyond / most if 0 < beyond < torch.inf else 0.0)
    count(op, worst)


def count(op: str, ratio: float) -> None:
    RATIOS.setdefault(op, []).append(ratio)


def one_nat(
    dtype: str, names: tuple[str, ...], g: Values, scaling: Scaling, ref_cap: float = 0.0, **factors: Tensor
) -> dict[str, float]:
    """For each value and each gradient of `factors`: the effect of an error of 1 nat in the log-probs.

    The rounding of a number of this size is allowed beside the bound. A log-prob is the log of a sum: in another order
    it differs by the rounding of 1. Where one token has all the probability, plain PyTorch may be exact, while the
    kernels, which work in base 2, are off by that rounding. In float64 the exact value is such a sum too, of 1 and
    terms too small for fp32: a rounding of 1 per term. Its capped logits are rounded even where fp32 gives the cap
    itself and plain PyTorch is therefore exact.

    scaling: the policy's. ref_cap: the cap of the reference's scaling.
    """
    scale = 8.0 + max(scaling.cap, ref_cap) if dtype == "fp64" else 1.0
    largest = sum(float(w.abs().max()) for w in g.values() if w.numel()) * scaling.steepest
    sizes = {name: float(f.abs().max()) if f.numel() else 0.0 for name, f in factors.items()}
    # A log, and twice a log; one log per side; a log, and a mean of others.
    logs = {"log_sum_sq_probs": 4.0, "kl": 2.0, "entropy": 2.0}
    units = {name: logs.get(name, 1.0) for name in names}
    units |= {"d " + name: largest * size for name, size in sizes.items()}
    return {name: scale * unit for name, unit in units.items()}
