"""Heads and KLs of cases.py with all providers, and upper bounds of the machine: copies and bare GEMMs."""

from __future__ import annotations

import argparse
import statistics

import cases
import kl_providers
import measure
import providers
import torch

from evidence.timing import turns
from fused_po.planner.devices import copy_bandwidth


def fp32_inputs(case: cases.Case, device: str) -> str | None:
    return "its tiles are of the inputs' dtype or fp32" if case.dtype == "fp32" else None


def named(provider: str, who: str) -> bool:
    """Whether cases.WHO names a provider: by its whole name or, except for ours, by the beginning of its name."""
    names = cases.WHO[who]
    return provider in names or any(provider.startswith(name) for name in names if name != "fused_po")


def chosen(case: cases.Case, who: str) -> list[providers.Provider]:
    """The providers of the case that `who` names; "rest" has all others. A head is also measured with bf16 tiles."""
    found = list(kl_providers.KL_PROVIDERS if case.task == "kl" else providers.PROVIDERS)
    if case.task != "kl" and not any("bf16 tiles" in p.name for p in found):
        tiles = providers.ours("fused_po, bf16 tiles", logits_dtype=torch.bfloat16)
        found.insert(1, tiles._replace(refuses=fp32_inputs))
    others = [name for name in cases.WHO if name not in ("rest", "dpo")]
    rest = [p.name for p in found if not any(named(p.name, name) for name in others)]
    return [p for p in found if named(p.name, who) or (who == "rest" and p.name in rest)]


def case(args: argparse.Namespace) -> dict:
    """One case, checked against float64 and timed in turns: `measure.compare` without pytest-benchmark."""
    wanted = next(c for c, _ in cases.evidence(args.suite) if c.name == args.words[0])
    p, reports, able = measure.prepare(wanted, args.device, chosen(wanted, args.who))
    timed = measure.Turns(p, able)
    rounds = measure.rounds_of(args.suite, args.device)
    for _ in range(rounds + 1):
        timed()
    reports = measure.finish(reports, timed.medians())
    found = {"case": wanted._asdict(), "providers": reports, "rounds": rounds}
    for name, report in reports.items():
        said = report.get("wrong") or report.get("not run") or f"{report.get('seconds', {})}"
        print(f"{name}: {said}", flush=True)
    ours = reports["fused_po"]
    return found if "seconds" in ours else found | {"reason": f"fused_po: {ours.get('wrong') or ours.get('not run')}"}


def products(shape: tuple[int, int, int], device: str, out_dtype: torch.dtype) -> dict:
    """The three GEMMs of a head of this shape, into buffers: scores, gradient of hidden, gradient of the head."""
    n, h, v = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden, weight = (torch.randn(k, h, device=device).to(dtype) for k in (n, v))
    logits = torch.randn(n, v, device=device).to(dtype)
    more = {"out_dtype": out_dtype} if out_dtype != dtype else {}
    sizes = {"scores": (hidden, weight.T), "d hidden": (logits, weight), "d weight": (logits.T, hidden)}
    outs = {name: torch.empty(a.shape[0], b.shape[1], device=device, dtype=out_dtype) for name, (a, b) in sizes.items()}
    return {name: lambda a=a, b=b, n=name: torch.mm(a, b, out=outs[n], **more) for name, (a, b) in sizes.items()}


def ceilings(args: argparse.Namespace) -> dict:
    """A large copy, and FLOPs per second of bare GEMMs in the cases' shapes, into the factors' dtype and fp32."""
    found = {"copy GB/s": copy_bandwidth(torch.device(args.device)) / 1e9, "products": {}}
    for shape in cases.PRODUCTS[args.suite]:
        for out in (torch.bfloat16, torch.float32) if args.device == "cuda" else (torch.float32,):
            calls = products(shape, args.device, out)
            times = turns(calls, args.device)
            flops = 2 * shape[0] * shape[1] * shape[2]
            label = f"{shape[0]}x{shape[1]}x{shape[2]} into {str(out).removeprefix('torch.')}"
            rates = {name: flops / statistics.median(taken) / 1e12 for name, taken in times.items()}
            found["products"][label] = {"TFLOP/s": rates}
            print(label, {name: round(rate, 1) for name, rate in rates.items()}, flush=True)
    print(f"copy {found['copy GB/s']:.0f} GB/s")
    return found
