"""Single kernels: row passes over large logits beside a copy, for ncu, and over small ones for the sanitizers."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from evidence.stages import LOGITS
from evidence.timing import turns
from fused_po.backend import choose as backends
from fused_po.backend.interface import Form, TokenInputs

IGNORE = -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = {"gpu": 1 << 26, "tiny": 1 << 12}  # size of the logits under ncu


class Row(NamedTuple):
    """A launch. bytes: what it must move. group: one of NCU_GROUPS. restore: it overwrites the logits."""

    run: Callable[[], object]
    bytes: float
    group: str
    restore: bool = False


class Logits:
    """Random logits [1, N, V] with a copy, labels, and the results of the forward that the backward needs."""

    def __init__(self, n: int, v: int, dtype: torch.dtype, device: str, backend: str) -> None:
        torch.manual_seed(0)
        self.of = backends.get(backend)
        self.x = torch.empty(1, n, v, dtype=dtype, device=device).normal_(0, 3)
        self.out, self.kept = torch.empty_like(self.x), self.x.clone()
        self.labels = torch.randint(0, v, (n,), device=device)
        self.stats = self.of.statistics(self.x, self.labels, 1.0, None, IGNORE, 7 if backend == "cuda" else 3)
        self.ones = torch.randn(n, device=device)

    @property
    def nbytes(self) -> int:
        return self.x.nbytes

    def on(self, backend: str) -> Logits:
        """The same tensors, for launches of another backend."""
        other = copy.copy(self)
        other.of = backends.get(backend)
        return other

    def restore(self) -> None:
        self.x.copy_(self.kept)

    def policy(self, overwrite: bool) -> None:
        logps = self.stats[0]
        given = TokenInputs(self.ones, torch.full_like(self.ones, 1 / len(self.ones)), logps - 0.1, logps - 0.2)
        form = Form("clip", 0.8, 1.2, kl="k3", kl_coef=0.1)
        self.of.policy(self.x, self.labels, given, form, 1.0, IGNORE, overwrite)

    def gradient(self, source: torch.Tensor, entropy: bool) -> None:
        g = self.ones
        more = (g, g) if entropy else (None, None)
        self.of.gradient(source, self.labels, self.stats[4], self.stats[1], g, *more, 1.0, None, self.out)


def single(t: Logits) -> dict[str, Row]:
    """Row passes over one matrix of logits."""
    of, size, labels = t.of, t.nbytes, t.labels
    logps, entropy, _, _, saved = t.stats
    none = (None, None, None)
    padded = -(-t.x.shape[2] // 64) * 64  # rows of a basis begin at 16-byte boundaries
    basis, out = (t.x.new_empty(t.x.shape[1], padded)[:, : t.x.shape[2]] for _ in range(2))
    of.gradient(t.x, labels, saved, entropy, *none, 1.0, None, basis[None])

    def scored(outputs: int) -> Callable[[], object]:
        return lambda: of.statistics(t.x, labels, 1.0, None, IGNORE, outputs)

    def from_basis() -> None:
        of.from_basis(basis, labels, saved, logps, entropy, t.ones, None, None, 1.0, out)

    return {
        "statistics, log-probs": Row(scored(1), size, "statistics"),
        "statistics, log-probs and entropy": Row(scored(3), size, "statistics"),
        "statistics, all": Row(scored(63), size, "statistics"),
        "gradient, log-probs": Row(lambda: t.gradient(t.x, False), 2 * size, "gradient"),
        "gradient, all": Row(lambda: t.gradient(t.x, True), 2 * size, "gradient"),
        "basis": Row(lambda: of.gradient(t.x, labels, saved, entropy, *none, 1.0, None, t.out), 2 * size, "gradient"),
        "from the basis": Row(from_basis, 2 * size, "gradient"),
        "score and basis in place": Row(
            lambda: of.score(t.x, labels, 1.0, None, IGNORE, 1, t.x), 3 * size, "gradient", True
        ),
        "policy, k3": Row(lambda: t.policy(False), size, "policy"),
        "policy, k3, and its gradient in place": Row(lambda: t.policy(True), 3 * size, "policy", True),
    }


def double(t: Logits) -> dict[str, Row]:
    """Row passes over the logits of policy and reference."""
    of, size, labels = t.of, t.nbytes, t.labels
    reference = t.kept + torch.randn_like(t.kept)
    scaling, grads = (1.0, None), torch.stack([t.ones] * 3)
    rows = {
        "policy and reference in one launch": Row(
            lambda: of.pair_statistics(t.x, reference, labels, 1.0, None, IGNORE), 2 * size, "statistics"
        )
    }
    for direction in ("reverse", 0.25):
        name = direction if isinstance(direction, str) else "js"
        tokens = of.kl(t.x, reference, labels, scaling, scaling, direction, True)

        def kl(d=direction) -> None:
            of.kl(t.x, reference, labels, scaling, scaling, d, True)

        def gradient(d=direction, tokens=tokens) -> None:
            of.kl_gradient(t.x, reference, labels, tokens, grads, scaling, scaling, d, True, t.out)

        rows |= {f"kl, {name}": Row(kl, 2 * size, "kl"), f"kl gradient, {name}": Row(gradient, 3 * size, "kl")}
    return rows


def kernels(t: Logits) -> dict[str, Row]:
    return single(t) | double(t)


def backend_on(device: str) -> str:
    return "triton" if device == "cuda" else "reference"


def timed(rows: dict[str, Row], t: Logits, device: str) -> dict[str, dict]:
    """Seconds, and the share of the bandwidth of a copy of the same logits, timed in turns."""
    calls = {name: row.run for name, row in rows.items()} | {"copy": lambda: t.out.copy_(t.kept)}
    times = turns(calls, device, {name: t.restore for name, row in rows.items() if row.restore})
    of_copy = statistics.median(times["copy"])
    found = {"copy": {"seconds": of_copy, "GB/s": 2 * t.nbytes / of_copy / 1e9}}
    for name, row in rows.items():
        seconds = statistics.median(times[name])
        share = row.bytes / seconds / (2 * t.nbytes / of_copy)
        found[name] = {"seconds": seconds, "GB/s": row.bytes / seconds / 1e9, "share": share}
        found[name] |= {"bytes a logit": row.bytes / t.x.numel(), "fastest": min(times[name])}
    return found


def share(args: argparse.Namespace) -> dict:
    """Each kernel's share of copy bandwidth for each vocabulary."""
    found = {}
    for v in args.vocabularies or (500,):
        n = max(8, (LOGITS if args.suite == "gpu" else 1 << 14) // v)
        t = Logits(n, v, DTYPES[args.dtype], args.device, backend_on(args.device))
        for name, row in timed(kernels(t), t, args.device).items():
            found[f"{name}, V={v}"] = row
            print(f"{name}, V={v}: {row['GB/s']:.0f} GB/s, {row.get('share', 1):.1%} of a copy", flush=True)
        del t
    return {"rows": found, "dtype": args.dtype}


def one_read(args: argparse.Namespace) -> dict:
    """kernels/cuda: one read beside two passes, its own and Triton's, by the bytes that one read moves."""
    found = {}
    for v in (500,) if args.suite == "tiny" else (32000, 128256, 151936):
        n = max(8, (LOGITS if args.suite == "gpu" else 1 << 14) // v)
        t = Logits(n, v, torch.bfloat16, args.device, "cuda")
        other, once = t.on("triton"), 2 * t.nbytes

        def two_passes(t=t) -> None:
            stats = t.of.statistics(t.x, t.labels, 1.0, None, IGNORE, 1)
            t.of.gradient(t.x, t.labels, stats[4], stats[1], None, None, None, 1.0, None, t.x)

        rows = {
            "score, one read": Row(lambda t=t: t.of.score(t.x, t.labels, 1.0, None, IGNORE, 1, t.x), once, "", True),
            "score, two passes": Row(two_passes, once, "", True),
            "score, Triton": Row(lambda o=other: o.of.score(o.x, o.labels, 1.0, None, IGNORE, 1, o.x), once, "", True),
            "policy, one read": Row(lambda t=t: t.policy(True), once, "", True),
            "policy, Triton": Row(lambda o=other: o.policy(True), once, "", True),
        }
        for name, row in timed(rows, t, args.device).items():
            found[f"{name}, V={v}"] = row
            print(f"{name}, V={v}: {row['seconds'] * 1e3:.3f} ms, {row.get('share', 1):.1%} of a copy", flush=True)
    return {"rows": found}


def profile(args: argparse.Namespace) -> dict:
    """Launch each kernel of a group once, under ncu."""
    v = 500 if args.suite == "tiny" else 128256
    t = Logits(max(8, SMALL[args.suite] // v), v, DTYPES[args.dtype], args.device, backend_on(args.device))
    ran = [name for name, row in kernels(t).items() if row.group == args.words[0] and (row.run(), True)]
    if args.device == "cuda":
        torch.cuda.synchronize()
    return {"kernels": ran}


def parts(args: argparse.Namespace) -> dict:
    """Small launches under the sanitizers that selfcheck does not reach: split rows, vocabularies split over ranks."""
    device, (r, n, v) = args.device, (4, 37, 40_001)
    of, scaling = backends.get(backend_on(device)), (1.0, None)
    x, y = (torch.randn(1, 3, v, device=device).bfloat16() for _ in range(2))
    labels = torch.randint(0, v, (3,), device=device)
    for outputs in (1, 63):  # a few long rows: their parts, and the merge
        of.statistics(x, labels, 1.0, None, IGNORE, outputs)
    of.mixture(x, y, of.kl(x, y, labels, scaling, scaling, 0.25, True), scaling, scaling, 0.25)
    owner = torch.randint(-1, r, (n,), device=device)
    for fields, outputs in ((3, 1), (7, 63)):
        of.merge_scores(torch.randn(r, fields, n, device=device).abs(), owner, 1000, outputs)
    for direction, fields in (("reverse", 5), ("forward", 8), ("js", 8)):
        of.merge_kl(torch.randn(r, fields, n, device=device).abs(), owner, 0.25 if direction == "js" else direction)
    of.gae(*(torch.randn(3, 1100, device=device) for _ in range(2)), None, None, 0.99, 0.95)
    of.scale(x.clone(), torch.full((), 0.5, device=device))
    if device == "cuda":
        torch.cuda.synchronize()
    return {"launched": 10}
