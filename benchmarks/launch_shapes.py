"""Time the candidates for the table of launch shapes, kernels/triton/launch.py, on a GPU.

    python benchmarks/launch_shapes.py                          # every kernel: a table, and the entries to change
    python benchmarks/launch_shapes.py --kernel statistics kl   # these
    python benchmarks/launch_shapes.py --quick --json shapes.json
    TRITON_INTERPRET=1 python benchmarks/launch_shapes.py --suite tiny --device cpu       # a trial run, in seconds

Every candidate's result is compared with float64 before it is timed. Candidates and a large copy are timed in turns, in
one process; a time is the median over the turns. A candidate wins if it is more than 2% faster than the table's entry
over all problems (geometric mean). Most of the time is spent on compiling: about 90 compilations, or 45 with --quick.
The suite "tiny" has two rows and two shapes per kernel. It tests the results and this program; its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from evidence.timing import seconds_of

from fused_po import kernels

IGNORE = -100
CHECKED = 64  # rows that are compared with float64
MARGIN = 0.02  # how much faster a candidate must be to be proposed
# (rows, columns, dtype): scores of a training step, a large vocabulary, an fp32 tile.
PROBLEMS = ((8192, 32000, torch.bfloat16), (2048, 128256, torch.bfloat16), (2048, 32000, torch.float32))
TINY = ((2, 5003, torch.bfloat16),)  # several blocks per row, and a last one that is not full
# (block, warps, turns) besides the table's own entry. turns: blocks per program, 0 for a whole row.
ROWS = ((2048, 4, 0), (4096, 8, 0), (8192, 8, 0), (8192, 16, 0))
BLOCKS = ((2048, 4, 4), (4096, 8, 1), (4096, 8, 4), (8192, 8, 2))
PAIRS = ((2048, 4, 0), (2048, 8, 0), (4096, 8, 0), (4096, 16, 0))
CANDIDATES = {
    "statistics": ROWS,
    "statistics_all": ((2048, 8, 0), (4096, 16, 0), (4096, 8, 0)),
    "pair_statistics": ROWS,
    "policy": ROWS,
    "gradient": BLOCKS,
    "dpo_gradient": BLOCKS,
    "from_basis": BLOCKS,
    "scale": ((4096, 8, 16), (4096, 8, 4), (2048, 8, 16)),
    "kl": PAIRS,
    "mixture": PAIRS[:3],
    "kl_gradient": ((2048, 8, 4), (4096, 8, 1), (4096, 8, 4), (2048, 4, 8)),
}


class Problem(NamedTuple):
    """call: launches the kernel. results: of the first CHECKED rows; truth: in float64. traffic: bytes moved."""

    call: Callable[[], object]
    results: Callable[[], torch.Tensor]
    truth: torch.Tensor
    traffic: int


def candidates(kernel: str, tiny: bool = False) -> list:
    """Shapes to try: the table's entry first; for a trial run one other."""
    launch = table()
    found = [launch.shape_for(kernel, here()), *(launch.Shape(*shape) for shape in CANDIDATES[kernel])]
    return list(dict.fromkeys(found))[: 2 if tiny else None]


def table():
    return importlib.import_module("fused_po.kernels.triton.launch")


def here() -> str | None:
    return table().architecture(torch.device("cuda", 0)) if torch.cuda.is_available() else None


@contextmanager
def entry(kernel: str, shape) -> Iterator[None]:
    """The table, with this shape for the kernel on every architecture."""
    shapes = table().SHAPES
    kept = shapes[kernel]
    shapes[kernel] = {None: shape}
    try:
        yield
    finally:
        shapes[kernel] = kept


class Given:
    """Random logits, reference logits, labels and incoming gradients of n rows; the first rows in float64."""

    def __init__(self, n: int, v: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(n + v)

        def normal(*shape, dtype=torch.float32):
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.n, self.v, self.size = n, v, n * v * dtype.itemsize
        self.logits, self.ref = normal(1, n, v, dtype=dtype), normal(1, n, v, dtype=dtype)
        self.labels = torch.randint(0, v, (n,), generator=generator, device=device)
        self.g = normal(n)
        self.zeros = torch.zeros(n, device=device)
        self.log_p, self.log_q = (x[0, :CHECKED].double().log_softmax(-1) for x in (self.logits, self.ref))
        self.p, self.q = self.log_p.exp(), self.log_q.exp()

    def of_label(self, log_p: torch.Tensor) -> torch.Tensor:
        return log_p.gather(1, self.labels[:CHECKED, None])[:, 0]

    def slope(self, g: torch.Tensor) -> torch.Tensor:
        """The gradient of sum g * log-prob in the logits."""
        g = g[:CHECKED, None].double()
        return (-g * self.p).scatter_add(1, self.labels[:CHECKED, None], g)

    def kl(self, log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)


PLAIN = (1.0, None)  # temperature and logit scale 1, no softcap


def row_problem(kernel: str, run, x: Given) -> Problem:
    """The kernels over one row of logits."""
    out = torch.empty_like(x.logits)
    if kernel in ("statistics", "statistics_all"):
        outputs = 3 if kernel == "statistics" else 63
        kept = {}

        def call():
            kept["results"] = run.statistics(x.logits, x.labels, *PLAIN, IGNORE, outputs)

        truth = torch.stack([x.of_label(x.log_p), -(x.p * x.log_p).sum(-1)])
        return Problem(call, lambda: torch.stack(kept["results"][:2])[:, :CHECKED], truth, x.size)
    if kernel == "policy":  # the gradient overwrites the logits: 2 reads, 1 write
        form = types.SimpleNamespace(
            kind="clip", low=0.8, high=1.2, bound=math.inf, kl=None, kl_coef=0.0, kl_times_ratio=False, entropy_coef=0.0
        )
        given, logits = (x.g, torch.ones_like(x.g), None, None), x.logits.clone()
        return Problem(
            lambda: run.policy(logits, x.labels, given, form, 1.0, IGNORE, True),
            lambda: logits[0, :CHECKED],
            x.slope(-x.g),
            3 * x.size,
        )
    if kernel == "scale":
        logits, factor = x.logits.clone(), torch.full_like(x.g[0], -1.0)
        return Problem(
            lambda: run.scale(logits, factor), lambda: logits[0, :CHECKED], -x.logits[0, :CHECKED].double(), 2 * x.size
        )
    stats = run.statistics(x.logits, x.labels, *PLAIN, IGNORE, 1)
    if kernel == "from_basis":
        basis = torch.empty_like(x.logits)
        run.gradient(x.logits, x.labels, stats[4], None, None, None, None, *PLAIN, basis)
        return Problem(
            lambda: run.from_basis(basis[0], x.labels, stats[4], stats[0], None, x.g, None, None, 1.0, out[0]),
            lambda: out[0, :CHECKED],
            x.slope(x.g),
            2 * x.size,
        )
    return Problem(
        lambda: run.gradient(x.logits, x.labels, stats[4], None, x.g, None, None, *PLAIN, out),
        lambda: out[0, :CHECKED],
        x.slope(x.g),
        2 * x.size,
    )


def pair_problem(kernel: str, run, x: Given) -> Problem:
    """The kernels over policy and reference, and of policy_loss_from_logits: two sequences of n / 2 tokens."""
    out, kept = torch.empty_like(x.logits), {}
    if kernel == "pair_statistics":

        def call():
            kept["tokens"] = run.pair_statistics(x.logits, x.ref, x.labels, *PLAIN, IGNORE)

        truth = torch.stack([x.of_label(x.log_p), x.of_label(x.log_q)])
        return Problem(call, lambda: kept["tokens"][2:, :CHECKED], truth, 2 * x.size)
    if kernel == "dpo_gradient":
        tokens = run.pair_statistics(x.logits, None, x.labels, *PLAIN, IGNORE)
        sequences = x.labels.view(2, x.n // 2)
        logits, weights = x.logits.view(2, x.n // 2, x.v), torch.zeros_like(x.g[:2])
        pairs = run.dpo(tokens, sequences, torch.zeros_like(weights), 0.1, 0.0, None, IGNORE)[2]
        g = x.g[:2].clone()
        return Problem(
            lambda: run.dpo_gradient(
                logits, sequences, tokens, pairs, weights, None, None, g, None, *PLAIN, out.view_as(logits)
            ),
            lambda: out[0, :CHECKED],
            x.slope(g.repeat_interleave(x.n // 2)),
            2 * x.size,
        )
    if kernel == "mixture":
        tokens = run.kl(x.logits, x.ref, x.labels, PLAIN, PLAIN, 0.5, True)

        def call():
            kept["sums"] = run.mixture(x.logits, x.ref, tokens, PLAIN, PLAIN, 0.5)

        log_m = (0.5 * (x.p + x.q)).log()
        truth = torch.stack([x.kl(x.log_p, log_m), x.kl(x.log_q, log_m)])
        return Problem(call, lambda: kept["sums"][:, :CHECKED], truth, 2 * x.size)
    if kernel == "kl":

        def call():
            kept["tokens"] = run.kl(x.logits, x.ref, x.labels, PLAIN, PLAIN, "reverse", True)

        return Problem(call, lambda: kept["tokens"][0, :CHECKED], x.kl(x.log_p, x.log_q), 2 * x.size)
    tokens = run.kl(x.logits, x.ref, x.labels, PLAIN, PLAIN, "reverse", True)
    grads = torch.stack([x.g, x.zeros, x.zeros])
    kl = x.kl(x.log_p, x.log_q)[:, None]
    return Problem(
        lambda: run.kl_gradient(x.logits, x.ref, x.labels, tokens, grads, PLAIN, PLAIN, "reverse", True, out),
        lambda: out[0, :CHECKED],
        x.g[:CHECKED, None].double() * x.p * (x.log_p - x.log_q - kl),
        3 * x.size,
    )


PAIR_KERNELS = ("pair_statistics", "dpo_gradient", "kl", "mixture", "kl_gradient")


def problem(kernel: str, n: int, v: int, dtype: torch.dtype, device: str) -> Problem:
    """One kernel's problem of n rows (an even number) and v columns."""
    of = pair_problem if kernel in PAIR_KERNELS else row_problem
    return of(kernel, kernels.load("triton"), Given(n, v, dtype, device))


def wrong(one: Problem) -> str | None:
    """Launch the kernel once; why its results are wrong, or None. Allowed is the rounding of the dtype and of fp32."""
    one.call()
    got, truth = one.results(), one.truth
    error = (got.double() - truth).abs()
    allowed = torch.finfo(got.dtype).eps * truth.abs() + 2e-5 * truth.abs().max()
    if not (error <= allowed).all():  # also for NaN
        return f"off by up to {error.max():.1e}, of values up to {truth.abs().max():.1e}"
    return None


def clock(calls: list[Callable[[], object]], turns: int, device: str) -> list[list[float]]:
    """Milliseconds of every call in each turn; in a turn the calls run one after another."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(turns):
        for call, taken in zip(calls, times):
            taken.append(seconds_of(call, device) * 1e3)
    return times


def measure(
    kernel: str, n: int, v: int, dtype: torch.dtype, turns: int, device: str = "cuda", tiny: bool = False
) -> list[dict]:
    """One row per candidate: median milliseconds, share of the bandwidth of a large copy, or why there is none."""
    one = problem(kernel, n, v, dtype, device)
    source = torch.empty(one.traffic // 2, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    rows, calls = [], []
    for shape in candidates(kernel, tiny):
        with entry(kernel, shape):
            fault = wrong(problem(kernel, n, v, dtype, device) if kernel in ("policy", "scale") else one)
        rows.append({"kernel": kernel, "rows": n, "columns": v, "dtype": str(dtype)[6:], "shape": list(shape)})
        if fault:
            rows[-1]["wrong"] = fault
            continue

        def call(shape=shape):
            with entry(kernel, shape):
                one.call()

        calls.append(call)
    times = clock([lambda: target.copy_(source), *calls], turns, device)
    copy = statistics.median(times[0])
    good = [row for row in rows if "wrong" not in row]
    for row, taken in zip(good, times[1:]):
        ms = statistics.median(taken)
        row |= {"ms": ms, "copy_ms": copy, "share": copy / ms}
    return rows


def winners(rows: list[dict]) -> list[str]:
    """One line per kernel: the fastest shape over all problems, and the table's entry if it should change."""
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        taken: dict[tuple, list[float]] = {}
        for row in rows:
            if row["kernel"] == kernel:
                taken.setdefault(tuple(row["shape"]), []).append(row.get("ms", math.inf))
        means = {shape: math.exp(statistics.fmean(map(math.log, ms))) for shape, ms in taken.items()}
        now, best = next(iter(means)), min(means, key=means.get)
        if math.isinf(means[best]):
            lines.append(f"{kernel}: no shape gives correct results")
        elif means[best] * (1 + MARGIN) >= means[now]:
            lines.append(f"{kernel}: the table's Shape{now} stays")
        else:
            entries = table().SHAPES[kernel] | {here(): table().Shape(*best)}
            text = ", ".join(f"{arch!r}: Shape{tuple(shape)}".replace("'", '"') for arch, shape in entries.items())
            lines.append(f"{kernel}: Shape{best} takes {means[best] / means[now]:.3f} of the time of Shape{now}.")
            lines.append(f'    "{kernel}": {{{text}}},')
    return lines


def show(row: dict) -> str:
    result = row.get("wrong") or f"{row['ms']:8.3f} ms   {row['share']:.2f} of copy"
    problem = f"{row['rows']} x {row['columns']} {row['dtype']}"
    return f"{row['kernel']:16} {problem:24} {row['shape']!s:16} {result}"


def arguments() -> argparse.Namespace:
    """The command line's options; exits if there is no device to run on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="*", default=list(CANDIDATES), choices=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="only the first problem, in fewer turns")
    parser.add_argument("--suite", choices=("gpu", "tiny"), default="gpu", help="tiny: a trial run of two rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file after every kernel")
    args = parser.parse_args()
    if args.quick and args.suite == "tiny":
        parser.error("--quick: got it with --suite tiny, which is quicker; use it with --suite gpu only")
    if args.device == "cpu" and (args.suite != "tiny" or os.environ.get("TRITON_INTERPRET") != "1"):
        parser.error("--device cpu: works only with --suite tiny and TRITON_INTERPRET=1; shapes are timed on a GPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("launch_shapes: torch finds no CUDA GPU, and shapes are timed on one.")
    return args


def main() -> None:
    args = arguments()
    tiny = args.suite == "tiny"
    problems = TINY if tiny else PROBLEMS[:1] if args.quick else PROBLEMS
    turns = 2 if tiny else 5 if args.quick else 20
    compiles = sum(len(candidates(kernel, tiny)) for kernel in args.kernel) * len({dtype for _, _, dtype in problems})
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, interpreted"
    print(f"{device}, {here()}: about {compiles} compilations. Shape(block, warps, turns), the table's own first.")
    rows: list[dict] = []
    failed, began = [], time.monotonic()
    for kernel in args.kernel:
        for n, v, dtype in problems:
            try:
                found = measure(kernel, n, v, dtype, turns, args.device, tiny)
            except Exception as error:  # the other kernels still run if one fails or has too little memory
                failed.append(f"{kernel}, {n} x {v} {dtype}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            failed += [show(row) for row in found if "wrong" in row]
            rows += found
            print("\n".join(map(show, found)), flush=True)
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"device": device, "arch": here(), "torch": torch.__version__, "rows": rows}, file, indent=1)
    proposals = ["a trial run: no shape is proposed"] if tiny else winners(rows)
    print("\n".join(["", *proposals, f"{time.monotonic() - began:.0f} s"]))
    if failed:
        sys.exit("launch_shapes: failed\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
