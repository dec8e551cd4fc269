"""One case with every provider: errors, counted GEMMs, peak memory, times.

A provider is checked first: the error of its log-probs (or KLs) may be 4 times that of plain PyTorch on the same rows
in the same dtype, and so may that of its gradients (relative, in norm). Otherwise it is reported as wrong, not timed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import counting
import torch
from cases import Case, Exact, Problem, exact, kl_of_rows, problem
from kl_providers import eager_kl
from peers import first_line
from providers import PROVIDERS, Provider, eager
from torch import Tensor

FACTOR = 4
MODES = ("forward", "forward+backward")
ROUNDS = {"cpu": 4, "cuda": 9}


def rounds_of(suite: str | None, device: str) -> int:
    """The number of timed turns per case. The tiny suite only shows that everything runs: one turn."""
    return 1 if suite == "tiny" else ROUNDS[device]


class Errors(NamedTuple):
    """Against float64: log-probs or KLs in nats (largest, RMS; None without any), gradients relative in norm."""

    value_max: float | None
    value_rms: float | None
    d_hidden: float
    d_weight: float | None


def run(provider: Provider, p: Problem, mode: str) -> None:
    """One forward, or one forward and backward, until the device has finished."""
    for tensor in p.trained:
        tensor.grad = None
    if mode == "forward":
        with torch.no_grad():
            provider.loss(p)
    else:
        provider.loss(p).backward()
    if p.hidden.is_cuda:
        torch.cuda.synchronize()


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def errors_of(provider: Provider, p: Problem, truth: Exact) -> tuple[Errors, int]:
    """(errors of the provider's results, FLOPs of its forward and backward). Leaves its gradients in place."""
    off = [None, None]
    if provider.values is not None:
        with torch.no_grad():
            difference = provider.values(p)[truth.rows].double() - truth.values
        off = [difference.abs().max().item(), difference.square().mean().sqrt().item()]
    with counting.FlopCounter() as count:
        run(provider, p, "forward+backward")
    d_hidden = relative(p.hidden.grad.flatten(0, -2)[truth.rows], truth.d_hidden)
    d_weight = relative(p.weight.grad[truth.columns], truth.d_weight) if p.weight.requires_grad else None
    return Errors(*off, d_hidden, d_weight), count.flops


def plain_errors(p: Problem, truth: Exact) -> Errors:
    """Errors of plain PyTorch on the same rows, without all other rows."""
    hidden = p.hidden.detach().flatten(0, -2)[truth.rows].requires_grad_()
    labels, weight = p.labels.flatten()[truth.rows], p.weight.detach()
    if p.case.task == "kl":
        weight.requires_grad_()
        values = eager_kl(hidden, weight, p.ref_hidden[truth.rows], p.ref_weight, labels, p.case.direction)
        grads = torch.autograd.grad(values.sum(), (hidden, weight))
        d_logits = kl_of_rows(p, truth.rows, weight.detach().double(), p.ref_weight.double())[1]
        exact_weight = d_logits[:, truth.columns].T @ hidden.detach().double()
        off = relative(grads[0], truth.d_hidden * p.scored), relative(grads[1][truth.columns], exact_weight)
    else:
        values = eager(hidden, weight, labels)
        (grad,) = torch.autograd.grad(values.sum(), hidden)
        h, w = hidden.detach().double(), weight.double()
        off = (relative(grad, w[labels] - (h @ w.T).softmax(-1) @ w),) * 2  # the head's gradient like hidden's
    difference = values.detach().double() - truth.values
    return Errors(difference.abs().max().item(), difference.square().mean().sqrt().item(), *off)


def wrong(errors: Errors, plain: Errors, eps: float) -> str | None:
    """Which error exceeds its bound, or None. eps: one rounding of a result."""
    for name, error, theirs in zip(Errors._fields, errors, plain):
        bound = FACTOR * theirs + (eps if name.startswith("d_") else 1e-6)
        if error is not None and not error <= bound:
            return f"{name} {error:.1e}, allowed {bound:.1e}"
    return None


class Ceilings:
    """The bare GEMMs of a case, one for each product over all scored rows, into existing buffers."""

    def __init__(self, p: Problem) -> None:
        self.hidden = p.hidden.detach().flatten(0, -2)[: p.scored].contiguous()
        self.weight = p.weight.detach()
        self.live = p.ref_hidden is not None
        n, (v, h) = p.scored, self.weight.shape
        self.logits, self.d_hidden, self.d_weight = (self.hidden.new_empty(s) for s in ((n, v), (n, h), (v, h)))

    def __call__(self, count: int) -> None:
        """The first `count` of: scores, gradient of hidden, gradient of the head."""
        torch.mm(self.hidden, self.weight.T, out=self.logits)
        if count > 1:
            torch.mm(self.logits, self.weight, out=self.d_hidden)
        if count > 2:
            torch.mm(self.logits.T, self.hidden, out=self.d_weight)
        if self.live:  # the reference's scores
            torch.mm(self.hidden, self.weight.T, out=self.logits)
        if self.hidden.is_cuda:
            torch.cuda.synchronize()


def examine(provider: Provider, p: Problem, truth: Exact, plain: Errors, device: str) -> dict:
    """A provider without times: why it is not run, or its errors, GEMMs, peak, and whether it is wrong."""
    reason = provider.absent() or provider.refuses(p.case, device)
    if reason is not None:
        return {"not run": reason}
    unit = 2 * p.scored * p.case.width * p.case.vocabulary
    try:
        errors, both = errors_of(provider, p, truth)
        gemms = {"forward": counting.flops(lambda: run(provider, p, "forward")) / unit, "forward+backward": both / unit}
        for tensor in p.trained:
            tensor.grad = None
        peak = counting.peak_bytes(lambda: run(provider, p, "forward+backward"), device)
    except Exception as error:  # the others still run if one peer fails
        return {"not run": f"failed: {first_line(error)}"}
    report = {"errors": errors._asdict(), "GEMMs": gemms, "peak bytes": peak}
    if provider.uncounted and device == "cuda":
        del report["GEMMs"]
    fault = wrong(errors, plain, torch.finfo(p.hidden.dtype).eps)
    return report | ({} if fault is None else {"wrong": fault})


def prepare(
    case: Case, device: str, providers: list[Provider] = PROVIDERS
) -> tuple[Problem, dict[str, dict], list[Provider]]:
    """(the problem, a report on each provider without times, the providers to be timed)."""
    torch.compiler.reset()  # otherwise torch.compile runs eagerly after a few shapes
    p = problem(case, device)
    truth = exact(p)
    plain = plain_errors(p, truth)
    reports = {provider.name: examine(provider, p, truth, plain, device) for provider in providers}
    able = [q for q in providers if not {"not run", "wrong"} & reports[q.name].keys()]
    return p, reports | {"eager on the sampled rows": {"errors": plain._asdict()}}, able


class Turns:
    """The calls that are timed on one case. In each turn every provider runs once, so that drift affects all equally.

    The order changes: a provider that runs after one that has just freed gigabytes pays for the page faults.
    """

    def __init__(self, p: Problem, able: list[Provider]) -> None:
        count = 3 if p.weight.requires_grad else 2
        ceilings = Ceilings(p)
        self.calls: dict[tuple[str, str], Callable[[], None]] = {
            ("bare GEMMs", "forward"): lambda: ceilings(1),
            ("bare GEMMs", "forward+backward"): lambda: ceilings(count),
        }
        for provider in able:
            for mode in MODES:
                self.calls[provider.name, mode] = lambda q=provider, m=mode: run(q, p, m)
        self.times: dict[tuple[str, str], list[float]] = {key: [] for key in self.calls}
        self.shuffle = random.Random(0).shuffle

    def __call__(self) -> None:
        order = list(self.calls)
        self.shuffle(order)
        for key in order:
            begin = time.perf_counter()
            self.calls[key]()
            self.times[key].append(time.perf_counter() - begin)

    def medians(self, warm_up: int = 1) -> dict[str, dict[str, float]]:
        """Seconds by provider and mode, without the first turns."""
        found: dict[str, dict[str, float]] = {}
        for (name, mode), values in self.times.items():
            found.setdefault(name, {})[mode] = statistics.median(values[warm_up:])
        return found


def compare(
    case: Case, device: str, providers: list[Provider], benchmark, circumstances: dict, rounds: int
) -> dict[str, dict]:
    """One benchmark of pytest-benchmark, in whose rounds every provider runs once. Returns the reports."""
    p, reports, able = prepare(case, device, providers)
    turns = Turns(p, able)
    benchmark.pedantic(turns, rounds=rounds, warmup_rounds=1)
    reports = finish(reports, turns.medians())
    benchmark.extra_info |= {"case": case._asdict(), "providers": reports, "circumstances": circumstances}
    return reports


def finish(reports: dict[str, dict], seconds: dict[str, dict[str, float]]) -> dict[str, dict]:
    """The reports with times, and their ratios to the bare GEMMs and to fused_po."""
    floor = seconds["bare GEMMs"]
    for name, times in seconds.items():
        report = reports.setdefault(name, {})
        report["seconds"] = times
        report["times the bare GEMMs"] = {mode: times[mode] / floor[mode] for mode in MODES}
        report["times as long as fused_po"] = {
            mode: times[mode] / seconds["fused_po"][mode] for mode in MODES if "fused_po" in seconds
        }
    return reports
