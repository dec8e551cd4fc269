"""`python -m fused_po selfcheck`: compare every op on this machine with float64 and with plain PyTorch.

An op passes if its RMS error is at most twice, and its maximum error at most four times, that of plain PyTorch, plus
the rounding of the result. Inputs are random; the seed is printed, so that --seed and --only repeat a check. If an
error is between one and two times its bound, four more inputs are drawn, and most of the five must pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import torch

from fused_po.selfcheck_cases import PAIRS, Check, Size, Values, checks, problem

__all__ = ["DTYPES", "PAIRS", "Check", "Result", "Size", "checks", "compare", "judge", "problem", "run", "table"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RMS_FACTOR, MAX_FACTOR = 2, 4
DRAWS = 5  # problems in all, if the first one slightly exceeds its bound


class Result(NamedTuple):
    """The output or gradient `what` with the largest error relative to its bound.

    ours, plain: the RMS errors of fused_po and of plain PyTorch. share: our error divided by its bound.
    """

    check: str
    dtype: str
    what: str
    ours: float
    plain: float
    share: float
    passed: bool
    note: str = ""


def evaluate(function: Callable[[Values], Values], t: Values, leaves: tuple[str, ...]) -> Values:
    """The function's outputs, and the gradients of a weighted sum of them."""
    t = t | {name: t[name].detach().clone().requires_grad_() for name in leaves}
    values = function(t)
    results = {name: value.detach() for name, value in values.items()}
    if leaves:
        total = sum(
            (v.double() * torch.linspace(-1, 2, v.numel(), device=v.device).view_as(v)).sum() for v in values.values()
        )
        grads = torch.autograd.grad(total, [t[name] for name in leaves])
        results |= {f"d {name}": grad for name, grad in zip(leaves, grads)}
    return results


def compare(check: Check, t: Values, dtype: str) -> Result:
    """The output or gradient with the largest error relative to its bound."""
    exact = evaluate(check.plain, {k: v.double() if v.is_floating_point() else v for k, v in t.items()}, check.leaves)
    plain, ours = (evaluate(f, t, check.leaves) for f in (check.plain, check.ours))
    worst, largest_share = None, -1.0
    for what, true in exact.items():
        errors = [(results[what].double() - true).flatten() for results in (ours, plain)]
        rounding = true.abs().flatten() * torch.finfo(ours[what].dtype).eps / 2
        rms = [value.square().mean().sqrt().item() for value in (*errors, rounding)]
        most = [value.abs().max().item() for value in (*errors, rounding)]
        shares = [rms[0] / (RMS_FACTOR * rms[1] + rms[2] + 1e-30), most[0] / (MAX_FACTOR * most[1] + most[2] + 1e-30)]
        share = max(shares) if all(value == value for value in shares) else float("inf")
        if share > largest_share:
            worst, largest_share = Result(check.name, dtype, what, rms[0], rms[1], share, share <= 1), share
    return worst


def judge(check: Check, t: Values, draw: Callable[[int], Values], dtype: str) -> Result:
    """`compare`. If the error slightly exceeds its bound, most of DRAWS problems must pass: one error may be bad luck.

    draw(1), draw(2), ... return other problems.
    """
    result = compare(check, t, dtype)
    if result.passed or not result.share <= 2:
        return result
    beyond = 1 + sum(not compare(check, draw(i), dtype).passed for i in range(1, DRAWS))
    return result._replace(passed=2 * beyond < DRAWS, note=f"beyond its bound in {beyond} of {DRAWS} problems")


def run(
    size: Size, dtypes: tuple[str, ...], device: str, seed: int, backend: Optional[str] = None, only: str = ""
) -> Iterator[tuple[int, int, Result]]:
    """Yield (checks done, number of checks, result) per check. An op that raises fails with its error as note."""
    selected = [check for check in checks(backend) if only in check.name]
    total = len(selected) * len(dtypes)
    done = 0
    for dtype in dtypes:
        draw = lambda i, dtype=dtype: problem(size, DTYPES[dtype], device, seed + i)  # noqa: E731
        t = draw(0)
        for check in selected:
            try:
                result = judge(check, t, draw, dtype)
            except Exception as error:  # a driver, a compiler or an op may raise anything; continue with the other ops
                nan = float("nan")
                result = Result(check.name, dtype, "", nan, nan, nan, False, f"{type(error).__name__}: {error}")
            done += 1
            yield done, total, result


def table(results: list[Result]) -> str:
    """RMS errors of fused_po and of plain PyTorch, for the output or gradient nearest to its bound."""
    lines = [f"{'op':32} {'dtype':6} {'output':12} {'fused_po':>9} {'PyTorch':>9}"]
    for r in results:
        note = r.note.splitlines()[0][:120] if r.note else ""
        line = (
            f"{r.check:32} {r.dtype:6} {r.what:12} {r.ours:9.1e} {r.plain:9.1e}   {'' if r.passed else 'FAILED '}{note}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def progress(done: int, total: int, name: str) -> None:
    """Update the progress bar on stderr, if that is a terminal."""
    if sys.stderr and sys.stderr.isatty():
        filled = 30 * done // total
        end = "\n" if done == total else ""
        print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {name:40}", end=end, file=sys.stderr, flush=True)
