"""`make rehearse`: run the CUDA path on this machine's CPU, in stages. README.md lists what it shows and cannot show.

    python -m rehearsal                              every stage; of each test the first case and every eighth after it
    python -m rehearsal --every 1                    all cases: hours
    python -m rehearsal --short                      the short form: minutes
    python -m rehearsal selfcheck benchmark          these stages
    python -m rehearsal -- tests/ops/test_kl.py -x   pytest with these arguments, as a rehearsal
    python -m rehearsal --python -- benchmarks/evidence --suite tiny --out runs/dry      Python with these arguments

Exit status: 0 if all passed, 1 if a stage failed, 2 if no rehearsal can be made here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, NamedTuple

from . import build

ROOT = Path(__file__).resolve().parents[3]
LOGS = ROOT / "runs" / "rehearsal"
PYTEST = ("-m", "pytest", "-o", "addopts=", "-q", "--color=no", "-p", "no:cacheprovider", "--durations=5")
SAMPLED = ("-p", "rehearsal.sample", "-m", "not slow", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile")

# Tests whose tensors are on the GPU if there is one, except those that train whole models or start other programs. OPS
# are the most important: every op and schedule against float64.
OPS = (
    "ops/test_logps",
    "lm_head/test_schedules",
    "ops/test_kl",
    "lm_head/test_linear_kl",
    "ops/test_dpo",
    "losses/test_policy",
    "ops/test_policy_loss",
    "ops/test_policy_loss_torch",
    "lm_head/test_chunked_loss",
    "ops/test_gae",
)
AROUND = (
    "ops/test_torch_features",
    "ops/test_autograd",
    "ops/test_autograd_transforms",
    "robustness/test_bad_arguments",
    "benchmarks/test_benchmark_suite",
    "robustness/test_default_dtype",
    "robustness/test_determinism",
    "losses/test_divergence",
    "project/test_error_bounds",
    "robustness/test_empty_and_meta_inputs",
    "robustness/test_bad_calls",
    "robustness/test_backend_failures",
    "robustness/test_out_of_memory",
    "robustness/test_threads_and_forks",
    "robustness/test_corner_cases",
    "robustness/test_infinities",
    "ops/test_inplace_backward",
    "robustness/test_invariances",
    "lm_head/test_low_rank",
    "modules/test_liger_modules",
    "modules/test_liger_agreement",
    "modules/test_openrlhf_modules",
    "planner/test_planned_costs",
    "planner/test_planned_gpu_memory",
    "losses/test_reduce",
    "ops/test_saved_tensor_hooks",
    "project/test_selfcheck",
    "losses/test_token_logps_refused",
    "kernels/test_row_splits",
    "ops/test_strides",
    "ops/test_confident_labels",
    "integrations/test_swap",
)
SHORT = ("kernels/test_row_splits",)


class Stage(NamedTuple):
    """commands: arguments for Python, run one after another, with at most `limit` seconds each."""

    name: str
    what: str
    commands: tuple[tuple[str, ...], ...]
    limit: int = 3600


def tests(*names: str) -> tuple[tuple[str, ...], ...]:
    return ((*PYTEST, *SAMPLED, *(f"tests/{name}.py" for name in names)),)


SELFCHECK = ("-m", "fused_po", "selfcheck", "--device", "cuda", "--quick", "--vocab", "203", "--hidden", "16")
BENCHMARK = (*PYTEST, "benchmarks/test_head.py", "benchmarks/test_kl.py", "--suite", "tiny")
HELD_OUT = "runs/rehearsal/held-out.jsonl"  # the first shipped held-out rows


def example(name: str, *words: str, output: str = "") -> tuple[str, ...]:
    """One step of a training script, from loading the model to the final plot."""
    few = ("--steps", "1", "--batch-size", "4", "--eval-every", "9", "--test-dataset", HELD_OUT)
    return f"examples/{name}.py", "--device", "cuda", *few, *words, "--output", f"runs/rehearsal/{output or name}"


FP32, SHORT_SFT, DRAWN = ("--no-bf16",), ("--sft-steps", "1"), ("--max-completion-length", "8")
EXAMPLES = (
    example("dpo", *SHORT_SFT, *FP32),
    example("dpo", *SHORT_SFT, output="dpo-bf16"),
    example("kto", *SHORT_SFT, *FP32),
    example("sft", *FP32),
    example("reward", *FP32),
    example("ppo", *SHORT_SFT, *DRAWN, *FP32),
    example("online_dpo", *SHORT_SFT, *DRAWN, *FP32),
    example("grpo", *SHORT_SFT, *DRAWN, "--num-generations", "2", *FP32),
)

STAGES = (
    Stage("ops", "every op against float64", tests(*OPS)),
    Stage("selfcheck", "python -m fused_po selfcheck --device cuda, small", (SELFCHECK,)),
    Stage("benchmark", "the tiny suite, a turn each", (BENCHMARK,)),
    Stage("examples", "a step of each training script in fp32, of dpo.py under autocast too", EXAMPLES),
    Stage("around", "errors, memory, autograd, torch.compile, modules, planner", tests(*AROUND)),
)
SHORT_STAGES = (
    Stage("ops", "statistics, rows split over programs", tests(*SHORT)),
    Stage("selfcheck", "one op", ((*SELFCHECK, "--only", "linear_logps"),)),
)


class Outcome(NamedTuple):
    passed: int
    failed: int
    skipped: int
    seconds: float
    faults: tuple[str, ...]  # the failed cases, or the command that failed


def run(command: tuple[str, ...], log: IO[str], limit: int) -> tuple[int, str]:
    """(exit status, output); the output is also written to the log as it arrives."""
    log.write(f"$ python {' '.join(command)}\n")
    log.flush()
    begin = log.tell()
    try:
        status = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=build.environment(), timeout=limit, stdout=log, stderr=log
        ).returncode
    except subprocess.TimeoutExpired:
        status = 124
        os.write(log.fileno(), f"stopped after {limit} s\n".encode())
    log.seek(begin)
    return status, log.read()


def counts(output: str) -> tuple[int, int, int]:
    """The counts in pytest's last line: (passed, failed and errors, skipped and expected failures)."""

    def number(word: str) -> int:
        found = re.findall(rf"(\d+) {word}", output)
        return int(found[-1]) if found else 0

    return number("passed"), number("failed") + number("errors?"), number("skipped") + number("xfailed")


def rehearse(stage: Stage) -> Outcome:
    """Run the commands of a stage, and print the result of each when it ends."""
    began, passed, failed, skipped, faults = time.monotonic(), 0, 0, 0, []
    with open(LOGS / f"{stage.name}.log", "w+", encoding="utf-8", errors="replace") as log:
        for command in stage.commands:
            begin = time.monotonic()
            status, output = run(command, log, stage.limit)
            good, bad, left = counts(output) if "pytest" in command else (int(status == 0), int(status != 0), 0)
            if status and not bad:
                bad = 1
            named = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
            faults += named or ([f"{command[-1]} (exit status {status})"] if status else [])
            passed, failed, skipped = passed + good, failed + bad, skipped + left
            seconds = time.monotonic() - begin
            print(
                f"{stage.name:10} {command[-1]:44} {good:5} passed {bad:3} failed {left:4} skipped {seconds:6.0f} s",
                flush=True,
            )
    return Outcome(passed, failed, skipped, time.monotonic() - began, tuple(faults))


def report(outcomes: dict[str, Outcome]) -> str:
    lines = ["", f"{'stage':12}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for name, o in outcomes.items():
        lines.append(f"{name:12}{o.passed:8}{o.failed:8}{o.skipped:9}{o.seconds:9.0f}")
    lines += [f"failed: {fault}" for o in outcomes.values() for fault in o.faults]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="stage", help=", ".join(stage.name for stage in STAGES))
    parser.add_argument("--short", action="store_true", help="a few minutes")
    parser.add_argument("--every", type=int, metavar="N", help="of each test's cases every N-th (default: 8)")
    parser.add_argument("--python", action="store_true", help="what follows -- are Python's arguments, not pytest's")
    own, arguments = partition(sys.argv[1:])
    args = parser.parse_args(own)
    if args.python and not arguments:
        parser.error("--python: got nothing after --, expected a script and its arguments")
    if arguments and (args.stages or args.short or args.every is not None):
        parser.error("--: got stages, --short or --every before it, which only a run of stages reads; leave them out")
    if args.every is not None and args.every < 1:
        parser.error(f"--every: got {args.every}, expected a whole number >= 1")
    stages = SHORT_STAGES if args.short else STAGES
    if unknown := set(args.stages) - {stage.name for stage in stages}:
        parser.error(f"stages: got {', '.join(sorted(unknown))}; allowed: {', '.join(s.name for s in stages)}")
    if (reason := build.cannot()) is not None:
        print(f"rehearsal: {reason}", file=sys.stderr)
        return 2
    if not build.LIBRARY.is_file():
        build.build()
    if arguments:
        os.chdir(ROOT)
        words = arguments if args.python else [*PYTEST, *arguments]
        os.execve(sys.executable, [sys.executable, *words], build.environment())
    chosen = [stage for stage in stages if not args.stages or stage.name in args.stages]
    os.environ["FUSED_PO_REHEARSAL_EVERY"] = str(args.every or 8)
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    shipped = (ROOT / "examples" / "data" / "comparisons-test.jsonl").read_text(encoding="utf-8")
    (ROOT / HELD_OUT).write_text("".join(shipped.splitlines(True)[:8]), encoding="utf-8")
    outcomes = {}
    for stage in chosen:
        print(f"{stage.name}: {stage.what} (runs/rehearsal/{stage.name}.log)", flush=True)
        outcomes[stage.name] = rehearse(stage)
    print(report(outcomes))
    print(f"logs: {LOGS.relative_to(ROOT)}")
    return int(any(outcome.failed for outcome in outcomes.values()))


def partition(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
