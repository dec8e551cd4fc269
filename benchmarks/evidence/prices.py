"""Expected seconds of each unit, from its work. Nothing here was measured; the first GPU run will correct it.

A price adds up the start of a process, its compilations, and its arithmetic at the rates of `Machine`.
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30


class Machine(NamedTuple):
    """Expected rates of a GPU: FLOPs per second of large GEMMs, bytes per second of a large copy."""

    name: str
    bf16: float
    fp32: float
    fp64: float
    copy: float
    memory: int


# Shares of the data sheets' rates that large GEMMs and copies usually reach: 70%, 75%, 70%, 90%.
MACHINES = {
    "H100": Machine("H100", 690e12, 50e12, 47e12, 3.0e12, 79 * GIB),
    "H200": Machine("H200", 690e12, 50e12, 47e12, 4.3e12, 139 * GIB),
}

CALL = 15.0  # a call of the runner: describe the machine, unpack the peers' wheels
START = 8.0  # a process: import torch, create a CUDA context, draw the problem
PEERS_START = 5.0  # import the peers with transformers too, from a warm disk cache
FORM = 1.0  # compile one variant of a Triton kernel
INDUCTOR = 15.0  # torch.compile of one function for one shape, forward and backward
TEST = 0.30  # one test on a GPU: small tensors; about one in four compiles a kernel
NCU_FORM = 6.0  # one kernel under ncu: about 40 passes, with its memory saved and restored
SANITIZED_CHECK = 1.2  # one check of selfcheck under compute-sanitizer: every kernel is instrumented when it is loaded
SANITIZED_START = 20.0  # torch under compute-sanitizer
NVCC = 45.0  # kernels/cuda for one architecture
ROUNDS = 9  # timed turns, as in measure.ROUNDS
OURS_FORMS = 8  # kernel variants of a head's forward and backward


class Peer(NamedTuple):
    """The cost of a provider: GEMMs of forward and backward, and seconds of compilation."""

    gemms: float
    compile: float


# By a part of the provider's name; the first match counts.
PEERS = {
    "fused_po": Peer(4, 0.25 * OURS_FORMS * FORM),  # several share the compiled code of the first
    "torch.compile": Peer(3.5, 2 * INDUCTOR),  # with and without gradients
    "eager": Peer(3.5, 0),
    "TRL": Peer(4.5, 3 * FORM),
    "scaled": Peer(4.5, 15.0),
    "Liger": Peer(6, 5 * FORM),
    "cut": Peer(5, 20.0),
    "quack": Peer(3.5, 25.0),
}
CHUNKED = Peer(6, 2 * INDUCTOR)  # Liger's preference losses, compiled with torch.compile
LIGER_GRPO = Peer(2 + 2 * 14, INDUCTOR)  # two of its four GEMMs are in fp32, each as long as 14 in bf16
OTHER = Peer(4.5, 10.0)


def peer(name: str, task: str) -> Peer:
    """The cost of a provider."""
    if "Liger" in name and task != "logps":
        return LIGER_GRPO if task == "grpo" else CHUNKED
    return next((cost for part, cost in PEERS.items() if part in name), OTHER)


def head(machine: Machine, case, providers: tuple[str, ...]) -> float:
    """One case of cases.py with all providers: exact results in float64, errors and peaks, then timed turns."""
    gemm = 2.0 * case.tokens * (1 - case.prompt) * case.vocabulary * case.width
    sides = 2 if case.reference == "live" else 1
    passes = 40 if case.task == "kl" else 8  # over float64 logits
    truth = sides * 2.0 * case.tokens * case.vocabulary * case.width / machine.fp64
    truth += passes * 8.0 * case.tokens * case.vocabulary / machine.copy
    rate = machine.bf16 if case.dtype == "bf16" else machine.fp32
    once = (
        sum(1 + sides * peer(name, case.task).gemms for name in providers) + 4 * sides
    )  # one turn; the last term is the bare GEMMs
    runs = ROUNDS + 1 + 3  # the first turn, and the untimed runs: errors, FLOPs, peak
    compiled = OURS_FORMS * FORM + sum(peer(name, case.task).compile for name in providers)
    return START + PEERS_START + truth + compiled + runs * once * gemm / rate / 0.7


def gemms(machine: Machine, shapes: list[tuple[int, int, int]]) -> float:
    """Upper bounds: a copy, and three GEMMs of each shape into two dtypes."""
    flops = sum(2.0 * m * k * n for m, k, n in shapes)
    return START + 2 + 3 * 2 * (ROUNDS + 2) * flops / machine.bf16


def rows(machine: Machine, forms: int, logits: float, itemsize: int) -> float:
    """Row passes over `logits` numbers: compiled once, then timed in turns with a copy."""
    return START + forms * FORM + (ROUNDS + 3) * forms * 3 * logits * itemsize / machine.copy


def tests(machine: Machine, count: int) -> float:
    """A number of tests in one process."""
    return START + count * TEST


def step(machine: Machine, case, ways: int, lengths: int) -> float:
    """Training steps: losses compared in fp32, steps timed in turns, and a search for the longest sequence."""
    weights = case.parameters

    def seconds(length: int, fp32: bool = False) -> float:
        """Forward and backward of the policy and forward of the reference: 8 FLOPs per weight and token."""
        dense = 8.0 * weights * 2 * length
        attention = 8.0 * 2 * case.layers * length**2 * case.width
        return (dense + attention) / (machine.fp32 if fp32 else 0.4 * machine.bf16)

    checked = ways * 2 * seconds(min(case.length, 512), True)
    timed = ways * 8 * seconds(case.length)
    searched = ways * lengths * seconds(case.most) / 2  # half of the maximum, on average
    built = (ways + 2) * 2 * weights * 4 / 20e9
    return START + PEERS_START + 12 * FORM + built + checked + timed + searched
