"""What is run, in order: stages, and their units. A unit is one process; its result is kept.

The most valuable comes first: is it correct, how fast is it and why, is it free of races, what does a step gain.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")] * (str(ROOT / "benchmarks") not in sys.path)

from evidence import prices  # noqa: E402


class Stage(NamedTuple):
    """A part of the evidence.

    gate: later stages wait for it, and do not run if one of its units failed. jobs: how many of its units run at once;
    more than one only if nothing is timed. log: the file in OUT for its output.
    """

    name: str
    about: str
    log: str
    gate: bool = False
    jobs: int = 1
    peers: bool = False  # the peers' wheels are on PYTHONPATH


STAGES = {
    stage.name: stage
    for stage in (
        Stage("tests", "the tests that run on the GPU", "tests.log", gate=True, jobs=12),
        Stage("selfcheck", "every op against float64", "tests.log", gate=True, jobs=3),
        Stage("benchmark", "kernels, heads and peers beside their upper bounds", "benchmark.log", peers=True),
        Stage("shapes", "launch shapes of the kernels", "benchmark.log"),
        Stage("ncu", "where bytes and instructions go", "ncu.log"),
        Stage("sanitizer", "memcheck and racecheck", "sanitizer.log", jobs=2),
        Stage("cuda", "kernels/cuda: build, check, one read beside two passes", "benchmark.log"),
        Stage("step", "DPO steps of whole models", "benchmark.log", peers=True),
    )
}


REAL = "GPU"  # a unit's need: a GPU that runs machine code, unlike a rehearsal or a CPU


class Unit(NamedTuple):
    """One process. It writes its result as JSON, and is not run again once it has succeeded.

    arguments: of `python -m evidence.unit`. price: expected seconds on a machine. needs: programs of the CUDA toolkit
    without which it cannot run, and REAL. memory: bytes on the GPU. alone: nothing else runs at the same time.
    """

    stage: str
    name: str
    arguments: tuple[str, ...]
    price: Callable[[prices.Machine], float]
    needs: tuple[str, ...] = ()
    memory: int = 0
    alone: bool = False

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.name}"


# Files of tests that compute on numerics.DEVICE, and how many tests each has. The tests of the numbers come first.
TESTS = {
    "logps": 378,
    "schedules": 218,
    "kl": 141,
    "linear_kl": 150,
    "dpo": 98,
    "policy_loss": 162,
    "gae": 184,
    "strides": 56,
    "empty_and_meta_inputs": 169,
    "infinities": 96,
    "confident_labels": 59,
    "low_rank": 128,
    "row_splits": 63,
    "chunked_loss": 40,
    "corner_cases": 34,
    "determinism": 42,
    "torch_features": 58,
    "policy_loss_torch": 44,
    "invariances": 11,
    "autograd": 334,
    "autograd_transforms": 443,
    "inplace_backward": 78,
    "opinfo": 5,
    "backend_failures": 16,
    "out_of_memory": 44,
    "planned_costs": 88,
    "planned_peers": 36,
    "benchmark_suite": 27,
}
ELSEWHERE = {  # they use DEVICE too, but do not need a GPU, or run in another stage
    "cuda_host": "in the stage cuda",
    "fuzz_reduce": "in make fuzz",
    "threads_and_forks": "processes",
    "interpreter": "Triton's interpreter",
    "verl": "verl",
    "planned_vocab_parallel": "gloo processes",
    "evidence_report": "in the stage cuda",
}
UNCOUNTED = 40  # tests of a file that is not in TESTS yet
LARGE = ("extreme_sizes", 28)  # tensors of more than 2^31 elements: alone
SHARD = 120  # at most so many tests per unit, so that units end within a minute
TINY_TESTS = {"confident_labels": 59, "chunked_loss": 40}


def test_files() -> dict[str, str]:
    """The path of each file of tests, by its name without "test_"; no two folders have a file of the same name."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return {path.stem.removeprefix("test_"): path.relative_to(ROOT).as_posix() for path in paths}


def device_tests() -> dict[str, int]:
    """TESTS, then every other file of tests that imports DEVICE from numerics."""
    others = []
    for name, path in test_files().items():
        text = (ROOT / path).read_text(encoding="utf-8")
        known = name in TESTS or name in ELSEWHERE or name == LARGE[0]
        if not known and re.search(r"^from numerics import (?:\([^)]*|.*)\bDEVICE\b", text, re.M):
            others.append(name)
    return TESTS | dict.fromkeys(others, UNCOUNTED)


def test_units(tiny: bool) -> list[Unit]:
    units, files = [], test_files()
    for name, count in (TINY_TESTS if tiny else device_tests()).items():
        parts = -(-count // SHARD)
        for part in range(parts):
            label = name if parts == 1 else f"{name}-{part + 1}of{parts}"
            words = ("tests", files[name], "--shard", f"{part}/{parts}")
            units.append(
                Unit("tests", label, words, lambda m, n=count / parts: prices.tests(m, n), memory=8 * prices.GIB)
            )
    if not tiny:
        words = ("tests", files[LARGE[0]])
        units.append(
            Unit("tests", LARGE[0], words, lambda m: prices.tests(m, LARGE[1]) + 10, memory=48 * prices.GIB, alone=True)
        )
    return units


SELFCHECK_CHECKS = 20


def selfcheck_units(tiny: bool) -> list[Unit]:
    words = ("--suite", "tiny") if tiny else ()
    dtypes = ("fp32",) if tiny else ("fp32", "bf16", "fp16")
    return [
        Unit(
            "selfcheck",
            dtype,
            ("selfcheck", "--dtype", dtype, *words),
            lambda m: prices.START + SELFCHECK_CHECKS * 0.8 * prices.FORM,
            memory=4 * prices.GIB,
        )
        for dtype in dtypes
    ]


def case_units(tiny: bool) -> list[Unit]:
    """Heads and KLs of cases.py, each with some of the providers."""
    from cases import WHO, evidence

    suite = "tiny" if tiny else "gpu"
    units = []
    for case, who in evidence(suite):
        held = case.tokens * case.vocabulary * (24 if case.task == "kl" else 12) + 14 * case.vocabulary * case.width
        price = lambda m, c=case, names=WHO[who]: prices.head(m, c, names)  # noqa: E731
        words = ("case", case.name, "--who", who, "--suite", suite)
        units.append(Unit("benchmark", f"{case.name}.{who}", words, price, memory=held + 2 * prices.GIB))
    return units


ROW_FORMS = 14  # kernels that rows.py times for each vocabulary
VOCABULARIES = (128256, 50257, 32000)
LOGITS = 1 << 30  # size of the logits of a row pass: 2 GiB in bf16, far more than any cache


def benchmark_units(tiny: bool) -> list[Unit]:
    from cases import PRODUCTS

    size = ("--suite", "tiny") if tiny else ()

    def rows(dtype: str, itemsize: int, vocabularies: tuple[int, ...]) -> Unit:
        words = ("rows", "--dtype", dtype, "--vocabularies", *map(str, vocabularies), *size)
        forms = ROW_FORMS * len(vocabularies)
        price = lambda m: prices.rows(m, forms, LOGITS, itemsize)  # noqa: E731
        return Unit("benchmark", f"rows-{dtype}", words, price, memory=7 * LOGITS * itemsize)

    price = lambda m: prices.gemms(m, PRODUCTS["gpu"])  # noqa: E731
    ceilings = Unit("benchmark", "ceilings", ("ceilings", *size), price, memory=16 * prices.GIB)
    rest = case_units(tiny)
    few = (500,) if tiny else VOCABULARIES
    return [ceilings, rows("bf16", 2, few), *rest, rows("fp32", 4, few[:1])]


def shapes_units(tiny: bool) -> list[Unit]:
    words = ("shapes", *(("--suite", "tiny") if tiny else ()))
    return [Unit("shapes", "all", words, lambda m: prices.START + 50 * prices.FORM, memory=8 * prices.GIB)]


NCU_GROUPS = {"statistics": 5, "gradient": 6, "kl": 6, "policy": 2}  # and the number of launches of each under ncu
SANITIZED = {"from_logits": 10, "linear": 8, "parts": 6}  # and the number of checks in each


def sanitized(stage: str, group: str, checks: int, size: tuple[str, ...], *needs: str) -> list[Unit]:
    """memcheck and racecheck of a group of ops."""
    price = lambda m: prices.SANITIZED_START + checks * prices.SANITIZED_CHECK  # noqa: E731
    needs = (REAL, "compute-sanitizer", *needs)
    return [
        Unit(stage, f"{tool}-{group}", ("sanitizer", tool, group, *size), price, needs, 4 * prices.GIB)
        for tool in ("memcheck", "racecheck")
    ]


def tool_units(stage: str, tiny: bool) -> list[Unit]:
    size = ("--suite", "tiny") if tiny else ()
    if stage == "ncu":
        price = lambda n: lambda m: prices.START + n * (prices.FORM + prices.NCU_FORM)  # noqa: E731
        return [
            Unit(stage, group, ("ncu", group, *size), price(count), (REAL, "ncu"), 8 * prices.GIB)
            for group, count in NCU_GROUPS.items()
        ]
    return [u for group, count in SANITIZED.items() for u in sanitized(stage, group, count, size)]


def cuda_units(tiny: bool) -> list[Unit]:
    size = ("--suite", "tiny") if tiny else ()
    timed = 3 * 8  # vocabularies, variants
    return [
        Unit("cuda", "build", ("cuda-build",), lambda m: prices.START + prices.NVCC, (REAL, "nvcc")),
        Unit("cuda", "tests", ("tests", test_files()["cuda_host"]), lambda m: prices.tests(m, 110) / 2, (REAL, "nvcc")),
        Unit("cuda", "selfcheck", ("cuda-check", *size), lambda m: prices.START + 14, (REAL, "nvcc"), 4 * prices.GIB),
        Unit(
            "cuda",
            "one-read",
            ("one-read", *size),
            lambda m: prices.rows(m, timed, LOGITS, 2) - 12 * prices.FORM,
            (REAL, "nvcc"),
            10 * LOGITS,
        ),
        *sanitized("cuda", "cuda", 2, size, "nvcc"),
    ]


STEP_LENGTHS = 6  # lengths to try for the longest sequence


def step_units(tiny: bool) -> list[Unit]:
    from training import suite

    units = []
    for case in suite("tiny" if tiny else "gpu"):
        words = ("--suite", "tiny" if tiny else "gpu")
        held = 20 * case.parameters + case.memory
        trl = lambda m, c=case: prices.step(m, c, 3, STEP_LENGTHS)  # noqa: E731
        own = lambda m, c=case: prices.step(m, c, 1, STEP_LENGTHS)  # noqa: E731
        units.append(Unit("step", f"trl-{case.name}", ("step-trl", case.name, *words), trl, memory=held))
        units.append(Unit("step", f"example-{case.name}", ("step-example", case.name, *words), own, memory=held))
    return units


def units_of(stage: str, tiny: bool = False) -> list[Unit]:
    """The units of a stage in order."""
    if stage in ("ncu", "sanitizer"):
        return tool_units(stage, tiny)
    makers = {
        "tests": test_units,
        "selfcheck": selfcheck_units,
        "benchmark": benchmark_units,
        "shapes": shapes_units,
        "cuda": cuda_units,
        "step": step_units,
    }
    return makers[stage](tiny)


def plan_units(stages: tuple[str, ...], tiny: bool = False) -> list[Unit]:
    """All units of these stages, in the order of `STAGES`."""
    return [unit for name in STAGES if name in stages for unit in units_of(name, tiny)]
