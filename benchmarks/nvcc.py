"""Registers and spills of kernels/cuda from nvcc's assembler, for the table of aot.py. Needs nvcc, no GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("8.0", "9.0a", "10.0")
TYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
ENTRY = re.compile(r"Compiling entry function '_ZN8fused_po\d+(\w+?)I(\w+?)EEv\w+' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def library():
    """kernels/cuda/library.py, imported without the package."""
    spec = importlib.util.spec_from_file_location("cuda_library", ROOT / "kernels" / "cuda" / "library.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def types_of(mangled: str) -> str:
    """ "fp32 to bf16" of a mangled list of one or two types; S1_ repeats the first."""
    found = [TYPES.get(part, "") for part in re.findall(r"6__half|13__nv_bfloat16|f|S\d*_", mangled)]
    found = [name or found[0] for name in found]
    return " to ".join(dict.fromkeys(found))


def rows_of(said: str) -> list[dict]:
    """One row for each kernel in the report of ptxas."""
    rows = []
    for part in said.split("ptxas info    : Compiling entry")[1:]:
        kernel, types, arch = ENTRY.search("Compiling entry" + part).groups()
        row = {"kernel": kernel, "dtype": types_of(types), "arch": arch}
        row["registers"] = int(re.search(r"Used (\d+) registers", part)[1])
        row["spills"] = sum(map(int, SPILLS.search(part).groups()))
        rows.append(row)
    return rows


def figures() -> list[dict] | str:
    """The rows of all CUDA kernels for all architectures, or why there are none."""
    tools = library()
    reason = tools.cannot_build(ARCHITECTURES)
    if reason is not None:
        return reason
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in tools.SOURCES:
            nvcc = tools.cuda_home() / "bin" / "nvcc"
            command = [nvcc, *tools.flags(ARCHITECTURES), "-Xptxas", "-v", "-c", ROOT / "kernels" / "cuda" / name]
            run = subprocess.run([*command, "-o", f"{folder}/{name}.o"], capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"nvcc failed on {name}:\n{run.stderr[-2000:]}")
            rows += rows_of(run.stderr)
    return rows
