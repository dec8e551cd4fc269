"""What a call costs on the host: microseconds of every public op beside eager code for the same, and counts.

    python benchmarks/overhead.py [--json FILE] [--device cpu|cuda] [--only TEXT] [--counts] [--profile OP]

The values and gradients of all variants are compared first; then they are timed in turns. A ratio is the median of the
ratios of all turns, with its quartiles. The lower bound is the same arithmetic without the package (overhead_floor.py).
Counted in one call: ATen ops dispatched (inside custom ops too), Python functions called, and host syncs (a value or a
size that Python reads from a tensor).
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from counting import run_inside
from overhead_cases import LIMITS, Row, rows
from torch.utils._python_dispatch import TorchDispatchMode

MODES = ("forward", "forward+backward")
SYNCS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class Dispatched(TorchDispatchMode):
    """Counts the ATen ops of a call, also inside custom operators, and those that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fused_po":
            name = func._schema.name
            self.names[name] = self.names.get(name, 0) + 1
        return run_inside(self, func, args, kwargs or {})

    @property
    def ops(self) -> int:
        return sum(self.names.values())

    @property
    def syncs(self) -> int:
        return sum(self.names.get(name, 0) for name in SYNCS)


class Counts(NamedTuple):
    """Of one call."""

    ops: int
    syncs: int
    python: int  # Python functions called


def step(run: Callable, leaves: tuple, mode: str) -> Callable[[], None]:
    """One call: without gradients, or with a backward."""

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        run()[0].backward()

    return forward if mode == "forward" else both


def modes_of(row: Row) -> tuple[str, ...]:
    """There is no backward if nothing requires grad."""
    return MODES if row.leaves else MODES[:1]


def python_calls(call: Callable[[], None]) -> int:
    """The number of Python functions that a call runs in this thread."""
    count = 0

    def seen(frame, event, argument) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def counts(call: Callable[[], None]) -> Counts:
    """Counts of one call, after two that fill caches."""
    call(), call()
    python = python_calls(call)
    with Dispatched() as dispatched:
        call()
    return Counts(dispatched.ops, dispatched.syncs, python)


def results(run: Callable, row: Row, backward: bool) -> list[torch.Tensor]:
    """The loss, the other results that are compared, and the gradients."""
    for leaf in row.leaves:
        leaf.grad = None
    loss, others = run()
    if backward and row.leaves:
        loss.backward()
    grads = [leaf.grad for leaf in row.leaves] if backward else []
    return [loss.detach(), *(v.detach() for v in others), *grads]


def verify(row: Row) -> None:
    """All variants give the same numbers, up to the rounding of fp32."""
    truth = results(row.eager, row, True)
    for side in filter(None, (row.ours, row.floor)):
        for value, eager in zip(results(side, row, True), truth, strict=True):
            torch.testing.assert_close(value, eager, rtol=1e-4, atol=2e-5, msg=lambda text: f"{row.name}: {text}")


def timed(call: Callable[[], None], repeats: int, device: str) -> float:
    """Microseconds per call; on a CPU the time of this process, so that other programs do not count."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - begin) * 1e6 / repeats


def measure(row: Row, mode: str, device: str, turns: int, repeats: int) -> dict:
    """One row and mode: medians of microseconds and of the ratios to eager, ours with quartiles."""
    runs = {"ours": row.ours, "eager": row.eager} | ({"floor": row.floor} if row.floor else {})
    sides = {name: step(run, row.leaves, mode) for name, run in runs.items()}
    for side in sides.values():
        timed(side, repeats, device)
    took: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            for name in sides if turn % 2 else reversed(sides):
                took[name].append(timed(sides[name], repeats, device))
    finally:
        gc.enable()
    ratios = {name: [a / b for a, b in zip(took[name], took["eager"])] for name in sides}
    low, ratio, high = statistics.quantiles(ratios["ours"], n=4)
    found = {f"{name}_us": statistics.median(times) for name, times in took.items()}
    if row.floor:
        found["floor_ratio"] = statistics.median(ratios["floor"])
    return found | {"ratio": ratio, "quartiles": [low, high]}


def report_row(row: Row, device: str, turns: int, repeats: int) -> list[dict]:
    """The results of one row, by mode. Without turns only counts."""
    verify(row)
    found = []
    for mode in modes_of(row):
        ours, eager = (counts(step(run, row.leaves, mode)) for run in (row.ours, row.eager))
        times = measure(row, mode, device, turns, repeats) if turns else {}
        counted = {"counts": ours._asdict(), "eager_counts": eager._asdict()}
        found.append(
            {"name": row.name, "kind": row.kind, "mode": mode, "limit": LIMITS.get(row.kind)} | times | counted
        )
    return found


def line(entry: dict) -> str:
    """One line of the table."""
    ours, eager = entry["counts"], entry["eager_counts"]
    times = ["", "", "", ""]
    if "ratio" in entry:
        low, high = entry["quartiles"]
        over = " *" if entry["limit"] and entry["ratio"] > entry["limit"] else ""
        times = [
            f"{entry['ours_us']:.0f}",
            f"{entry['eager_us']:.0f}",
            f"{entry['ratio']:.2f} ({low:.2f}-{high:.2f}){over}",
            f"{entry['floor_ratio']:.2f}" if "floor_ratio" in entry else "",
        ]
    counted = [f"{ours[k]} / {eager[k]}" for k in ("ops", "python")] + [str(ours["syncs"])]
    mode = "fwd" if entry["mode"] == "forward" else "fwd+bwd"
    return "| " + " | ".join([entry["name"], mode, *times, *counted]) + " |"


HEADER = (
    "| op | | ours, us | eager, us | ratio (quartiles) | lower bound's ratio | ATen ops | Python calls | syncs |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def profile(row: Row, device: str, repeats: int = 300) -> None:
    """Profile forward and backward on the host, with cProfile and with torch's profiler."""
    call = step(row.ours, row.leaves, modes_of(row)[-1])
    timed(call, repeats, device)
    watch = cProfile.Profile()
    watch.runcall(timed, call, repeats, device)
    pstats.Stats(watch).sort_stats("tottime").print_stats(45)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        timed(call, repeats, device)
    print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=40))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="only rows whose names contain this text")
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--repeats", type=int, default=10, help="calls of one turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--counts", action="store_true", help="only counts, no times")
    parser.add_argument("--profile", metavar="OP", help="profile the row of this name instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = rows(options.device)
    if options.profile:
        for row in chosen:
            if row.name == options.profile:
                return profile(row, options.device)
        parser.error(f"--profile: got {options.profile!r}, allowed are {', '.join(repr(r.name) for r in chosen)}")
    entries = []
    print(HEADER)
    for row in chosen:
        if options.only in row.name:
            found = report_row(row, options.device, 0 if options.counts else options.turns, options.repeats)
            entries += found
            print("\n".join(map(line, found)), flush=True)
    over = [e for e in entries if e["limit"] and e.get("ratio", 0) > e["limit"]]
    print(
        f"\n{len(entries)} lines, {len(over)} above their limit (*): "
        f"linear {LIMITS['linear']}, logits {LIMITS['logits']}"
    )
    if options.json:
        about = {"torch": torch.__version__, "device": options.device, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps(about | {"rows": entries}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
