"""The plan beside measurements on this machine: `python benchmarks/planned.py`.

A GEMM and a copy are timed first; the plan knows nothing else of the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import counting
import torch
from cases import Case, Problem, problem
from measure import run
from providers import PROVIDERS, Provider, ours

from fused_po.lm_head.plan import Dtypes
from fused_po.planner import cost, peers
from fused_po.planner.command import GEMM_COLUMNS, GEMM_ROWS, human, seconds
from fused_po.planner.devices import STATED, Device, best_seconds, measured
from fused_po.planner.report import times_of
from fused_po.planner.work import Cost, Work
from fused_po.schedule import Schedule, logits_budget

EAGER = next(p for p in PROVIDERS if p.name == "eager")
ROUNDS = 3
NONE = ours("fused_po, none kept", logits_budget=0)


def work_of(case: Case, p: Problem, device: torch.device, budget: int | None) -> Work:
    """The plan's description of a case."""
    sizes = case.tokens, p.scored, case.vocabulary, case.width, case.width
    loss = "dpo" if p.ref_hidden is not None else "logps"
    needs, tile = (True, case.head == "trainable"), Schedule().tile_bytes_on(device)
    budget = logits_budget(budget, device)
    return Work(*sizes, p.hidden.dtype, False, loss, needs, False, tile, budget, device, sequences=p.labels.shape[0])


def contenders(p: Problem) -> list[tuple[Provider, Callable[[Work], Cost], int | None]]:
    """The provider, its name in the planner, and the budget."""
    found = [(ours("fused_po"), cost.ours, None), (EAGER, peers.eager, None)]
    return [*found, (NONE, cost.ours, 0)] if p.weight.requires_grad else found


def better(one: Device, other: Device) -> Device:
    """The higher limits of two measurements of one machine: other programs lower them."""
    rates = {name: max(rate, other.flops[name]) for name, rate in one.flops.items()}
    return one._replace(flops=rates, bandwidth=max(one.bandwidth, other.bandwidth))


def line(case: Case, p: Problem, who: Provider, plan: Callable[[Work], Cost], work: Work) -> str:
    """One row of the table. The machine's limits and the step are measured in turns, and the best of each counts."""
    shape = min(GEMM_ROWS, p.scored), case.width, min(case.vocabulary, GEMM_COLUMNS)
    factor = Dtypes(p.hidden.dtype, torch.float32).gemm(work.device)

    def step() -> None:
        run(who, p, "forward+backward")

    times, device = [], None
    for _ in range(ROUNDS):
        now = measured(shape, factor, work.device, STATED["h100"])
        device = now if device is None else better(device, now)
        times.append(best_seconds(step, p.hidden.is_cuda, 2))
    for tensor in p.trained:
        tensor.grad = None
    peak, flops = counting.peak_bytes(step, work.device.type), counting.flops(step)
    planned, time = plan(work), min(times)
    expected = times_of(planned, work, device).total
    figures = seconds(expected), seconds(time), f"{time / expected:.2f}", human(planned.peak), human(peak)
    same = "equal" if flops == planned.flops else f"{flops / planned.flops:.3f}"
    return f"| {case.name} | {who.name} | {' | '.join(figures)} | {same} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    kind = torch.device(parser.parse_args().device)
    shapes = [(512, 32000, 896), (256, 32000, 2048), (128, 128256, 1024)]
    if kind.type == "cuda":
        shapes = [(8192, 128256, 4096), (16384, 151936, 4096), (8192, 262144, 2560)]
    dtype = "bf16" if kind.type == "cuda" else "fp32"
    cases = [Case(*shape, dtype, head) for shape in shapes for head in ("trainable", "frozen")]
    cases.append(Case(*shapes[0], dtype, prompt=0.5, task="dpo", reference="live"))
    print(
        "| case | who | planned | measured | measured / planned | planned peak | measured peak | FLOPs |\n"
        + "|---" * 8
        + "|"
    )
    for case in cases:
        p = problem(case, kind.type)
        for who, plan, budget in contenders(p):
            work = work_of(case, p, kind, budget)
            print(line(case, p, who, plan, work), flush=True)


if __name__ == "__main__":
    main()
