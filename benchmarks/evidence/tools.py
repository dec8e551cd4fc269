"""Programs of the CUDA toolkit on small problems: ncu, compute-sanitizer, nvcc."""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evidence.runner import find_tool
from evidence.stages import ROOT

SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
    "WarpStateStats",
)
KERNELS = {  # by group, the kernels that ncu profiles
    "statistics": "statistics_kernel",
    "gradient": "gradient_kernel|from_basis_kernel",
    "kl": "kl_.*kernel",
    "policy": "policy_kernel",
}
KEPT = (  # metrics of the details page for the JSON; the log has all of them
    "Duration",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "L2 Hit Rate",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Registers Per Thread",
    "Executed Ipc Active",
    "Max Bandwidth",
    "Warp Cycles Per Issued Instruction",
    "Block Limit Registers",
    "Block Limit Shared Mem",
    "Grid Size",
    "Block Size",
)
SERVED = (  # checks of selfcheck that launch only kernels that the CUDA backend has
    "policy_loss_from_logits",
    "policy_loss_from_logits, in place",
    "logps_from_logits",
    "logps_from_logits, in place",
    "linear_logps, none kept",
    "linear_logps, head frozen",
    "linear_logps, low rank",
    "chunked_loss",
)
FORBIDDEN = "ERR_NVGPUCTRPERM"
FOUND = 77  # exit status of the sanitizers if they found errors
LIMIT = 280.0


def unit(*words: str) -> list[str]:
    return [sys.executable, "-m", "evidence.unit", *words]


def metrics(text: str) -> list[dict]:
    """One row per profiled kernel, from ncu's CSV: {"kernel", and the metrics of KEPT that it has, with units}."""
    begin = next((i for i, line in enumerate(text.splitlines()) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    found: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO("\n".join(text.splitlines()[begin:]))):
        kernel = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if row.get("Metric Name") in KEPT:
            kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(found.values())


def ncu(args: argparse.Namespace) -> dict:
    """Profile one group of kernels with ncu: the whole report goes to stdout, some metrics are the result."""
    group = args.words[0]
    program = find_tool("ncu")
    if program is None:
        return {"reason": "no ncu on PATH"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        looks = [program, "--csv", "--page", "details", "--clock-control", "none", "--log-file", str(log)]
        looks += [word for section in SECTIONS for word in ("--section", section)]
        looks += ["--kernel-name", f"regex:{KERNELS[group]}", "--launch-count", "8"]
        inside = unit("profile", group, "--device", args.device, "--suite", args.suite)
        done = subprocess.run([*looks, *inside], cwd=ROOT, timeout=LIMIT)
        text = log.read_text(errors="replace") if log.exists() else ""
    print(text)
    if FORBIDDEN in text:
        return {
            "reason": f"ncu: {FORBIDDEN}: this user may not read the GPU's counters; the administrator can allow it"
        }
    found = metrics(text)
    if done.returncode or not found:
        return {"kernels": found, "reason": f"ncu ended with status {done.returncode}, {len(found)} kernels profiled"}
    return {"kernels": found}


def errors_in(text: str) -> int | None:
    """Errors and hazards that compute-sanitizer counted, or None if it stopped before its summary."""
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:error|hazard)", text)
    return sum(map(int, found)) if found else None


def sanitizer(args: argparse.Namespace) -> dict:
    """memcheck or racecheck on small problems of a group of ops, whose results are checked too."""
    tool, group = args.words
    program = find_tool("compute-sanitizer")
    if program is None:
        return {"reason": "no compute-sanitizer on PATH"}
    if group == "parts":
        inside = unit("parts", "--device", args.device)
    else:
        name, more = (group, []) if group != "cuda" else ("policy_loss_from_logits", ["--backend", "cuda"])
        inside = [
            sys.executable, "-m", "fused_po", "selfcheck", "--quick", "--device", args.device, "--dtype", "bf16",
            "--vocab", "1037", "--hidden", "32", "--only", name, *more,
        ]  # fmt: skip
    words = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    if tool == "memcheck":
        words += ["--padding", "64"]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor ends where its allocation ends
    done = subprocess.run([*words, *inside], cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT)
    text = done.stdout + done.stderr
    print(text)
    counted = errors_in(text)
    if counted is None:
        last = (text.strip().splitlines() or ["no output"])[-1]
        return {"reason": f"{tool} gave no summary (status {done.returncode}): {last[:200]}"}
    found = {"errors": counted}
    if counted:
        return found | {"reason": f"{tool} found {counted} errors"}
    return found | (
        {"reason": f"no errors, but the checks ended with status {done.returncode}"} if done.returncode else {}
    )


def build(args: argparse.Namespace) -> dict:
    """Build kernels/cuda for this GPU: seconds, and the architecture."""
    code = (
        "from fused_po.kernels import load\n"
        "library = load('cuda').build\n"
        "print(library.architectures(), library.cannot_build(library.architectures()))\n"
        "library.library()\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    print(done.stdout + done.stderr)
    seconds = round(time.monotonic() - begin, 1)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"seconds": seconds, "reason": last[:300]}
    return {"seconds": seconds, "architectures": done.stdout.strip()}


def check(args: argparse.Namespace) -> dict:
    """Check the ops of backend 'cuda' against float64."""
    from fused_po import selfcheck
    from fused_po.__main__ import QUICK

    found = []
    for name in SERVED:
        for _, _, result in selfcheck.run(QUICK, ("fp32", "bf16"), args.device, 0, "cuda", name):
            if result.check == name:
                found.append(result)
    print(selfcheck.table(found))
    bad = [f"{r.check} {r.dtype} {r.note}" for r in found if not r.passed]
    rows = [r._asdict() for r in found]
    return {"results": rows} | ({"reason": "; ".join(bad[:5])} if bad else {})
