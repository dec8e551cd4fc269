"""Run the tests with each CPU instruction set, with 1 and 2 threads and fresh seeds, and print a table of counts.

    python tests/support/instruction_sets.py [--times 3] [-- arguments for pytest]

Each set limits which instructions PyTorch, oneDNN and MKL use, which changes the order of their sums. The runs of a set
alternate between one and two threads.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
SETS = {
    "as it is": (),
    "SSE 4": ("default", "SSE41", "SSE4_2"),
    "AVX 2": ("avx2", "AVX2", "AVX2"),
    "AVX 512": ("avx512", "AVX512_CORE", "AVX512"),
}


def run(values: tuple, threads: int, arguments: list[str]) -> tuple[dict[str, int], str]:
    """(counts by outcome, the output) of one pytest run."""
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "FUSED_PO_SEED", *NAMES)}
    env |= dict(zip(NAMES, values)) | {"OMP_NUM_THREADS": str(threads)}
    env["OMP_WAIT_POLICY"] = "PASSIVE"  # waiting threads leave the cores to the other test processes
    command = [sys.executable, "-m", "pytest", "--color=no", *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = done.stdout.strip().rpartition("\n")[2]
    counts = {outcome.rstrip("s"): int(count) for count, outcome in re.findall(r"(\d+) (passed|failed|errors?)", last)}
    if done.returncode not in (0, 1):
        counts["error"] = max(1, counts.get("error", 0))
    return counts, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=2, help="runs of each set (default: 2)")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="only these")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="arithmetic"))
    bad = 0
    print(f"output: {logs}\n\n{'set':10}{'threads':>8}{'run':>5}{'passed':>8}{'failed':>8}{'errors':>8}")
    for time, (i, name) in itertools.product(range(1, args.times + 1), enumerate(args.sets)):
        threads = 1 + (time + i) % 2
        counts, output = run(SETS[name], threads, args.arguments)
        (logs / f"{name}, {threads}, {time}.txt").write_text(output)
        passed, failed, errors = (counts.get(outcome, 0) for outcome in ("passed", "failed", "error"))
        bad += failed + errors
        print(f"{name:10}{threads:8}{time:5}{passed:8}{failed:8}{errors:8}", flush=True)
        for line in re.findall(r"^(?:FAILED|ERROR) .*", output, re.M):
            print(f"    {line}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
