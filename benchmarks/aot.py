"""Compile every Triton kernel for GPUs that need not be here, and read what the assembler made of it.

    python benchmarks/aot.py                 # a table for sm_80, sm_90 and sm_100
    python benchmarks/aot.py --arch 90 --json

Per kernel: registers, spills (local loads and stores), 128-bit loads and stores, and for kernels with a main loop its
instructions per element of logits. Needs triton alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
LOGITS_POINTERS = {"out_ptr", "ref_ptr", "x_ptr"}  # pointers to logits; the others point to statistics


def load(name: str) -> types.ModuleType:
    """A module of kernels/triton without the package around it, so that torch and fused_po need not be installed."""
    package = "aot_triton_kernels"
    if package not in sys.modules:
        parent = types.ModuleType(package)
        parent.__path__ = [str(ROOT / "kernels" / "triton")]
        sys.modules[package] = parent
    return importlib.import_module(f"{package}.{name}")


class Case(NamedTuple):
    """A kernel with its compile-time arguments."""

    name: str
    module: str
    kernel: str
    dtype: str
    constants: dict
    block: int = 4096
    warps: int = 8


def cases() -> list[Case]:
    """Every kernel in every form that changes its code."""
    flags = {"logps": 1, "logps+entropy": 3, "all outputs": 63}
    out = []
    for dtype in ("bf16", "fp16", "fp32"):
        for label, outputs in flags.items():
            out.append(Case(f"statistics, {label}", "statistics", "statistics_kernel", dtype, {"OUTPUTS": outputs}))
        grads = {"g_logps_ptr": None, "g_entropy_ptr": None, "g_lse_ptr": None, "entropy_ptr": None}
        out.append(Case("gradient, basis", "gradient", "gradient_kernel", dtype, grads))
        one = {"g_entropy_ptr": None, "g_lse_ptr": None, "entropy_ptr": None}
        out.append(Case("gradient, logps", "gradient", "gradient_kernel", dtype, one))
        out.append(Case("gradient, all", "gradient", "gradient_kernel", dtype, {}))
        dpo = {"g_losses_ptr": None, "g_sequences_ptr": None}
        for kl in (None, "k3"):
            out.append(Case(f"dpo gradient, kl={kl}", "preference", "dpo_gradient_kernel", dtype, {"KL": kl, **dpo}))
        reference = {"REF_GROUP": 16 // ITEMSIZE[dtype]}
        out.append(Case("pair statistics", "preference", "pair_statistics_kernel", dtype, reference))
    softcap = {"OUTPUTS": 3, "inner": 0.0}
    out.append(Case("statistics, logps+entropy, softcap", "statistics", "statistics_kernel", "bf16", softcap))
    out.append(Case("gradient, all, softcap", "gradient", "gradient_kernel", "bf16", {"inner": 0.0}))
    for kl in (None, "k1", "k2", "k3"):
        for sums in (False, True) if kl is None else (False,):
            name = f"dpo, kl={kl}" + (", reference sums" if sums else "")
            constants = {"KL": kl, "REF_SUMS": sums}
            out.append(Case(name, "preference", "dpo_kernel", "fp32", constants, block=1024, warps=4))
    return out


def signature(case: Case, names: list[str]) -> tuple[dict, dict]:
    """(types of run-time arguments, values of compile-time ones)."""
    constants = dict(case.constants)
    if "softcap" in case.name:
        constants.pop("inner")
    elif "inner" in names:
        constants["inner"] = None
    constants |= {"BLOCK": case.block, "GROUP": 16 // ITEMSIZE[case.dtype]}
    constants = {name: value for name, value in constants.items() if name in names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("label_ptr"):
            return "*i64"
        if name.endswith("_ptr"):
            return "*" + (case.dtype if name in LOGITS_POINTERS and case.kernel != "dpo_kernel" else "fp32")
        if name in ("outer", "inner", "beta", "label_smoothing"):
            return "fp32"
        return "i64" if "stride" in name or name == "ignore_index" else "i32"

    return {name: kind(name) for name in names}, constants


def compile_case(case: Case, arch: int):
    """The compiled kernel; pointers, strides and the vocabulary are multiples of 16, as with an aligned vocabulary."""
    kernel = getattr(load(case.module), case.kernel)
    names = list(kernel.arg_names)
    types_, constants = signature(case, names)
    aligned = [n for n in names if types_[n].startswith("*") or "stride" in n or n in ("n_cols", "n_rows")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if types_[n] != "constexpr"}
    source = ASTSource(fn=kernel, signature=types_, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.warps})


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, assembly) by the cuobjdump that triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        ]
    return run[0].stdout, run[1].stdout


def main_loop(assembly: str) -> int:
    """Instructions in the longest loop, 0 without one: a loop is what a backward branch encloses."""
    at = [int(m[1], 16) for m in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+\S.*;", assembly, re.M)]
    lengths = [0]
    for m in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/.*\bBRA\b.*?0x([0-9a-f]+)", assembly, re.M):
        begin, end = int(m[2], 16), int(m[1], 16)
        if begin < end:
            lengths.append(sum(begin <= address <= end for address in at))
    return max(lengths)


def figures(case: Case, arch: int) -> dict:
    """One row of the table."""
    compiled = compile_case(case, arch)
    usage, assembly = disassemble(compiled.asm["cubin"])
    loop = main_loop(assembly)
    scans = case.kernel in ("statistics_kernel", "pair_statistics_kernel")
    return {
        "kernel": case.name,
        "dtype": case.dtype,
        "arch": f"sm_{arch}",
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        "loads_128bit": len(re.findall(r"\bLDG\.E\S*\.128", assembly)),
        "stores_128bit": len(re.findall(r"\bSTG\.E\S*\.128", assembly)),
        "loop_instructions_per_element": round(loop * case.warps * 32 / case.block, 2) if scans else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, help="compute capabilities, e.g. 90")
    parser.add_argument("--json", action="store_true", help="print JSON, not a Markdown table")
    args = parser.parse_args()
    rows = []
    for arch in args.arch:
        for case in cases():
            print(f"sm_{arch} {case.name} {case.dtype}", file=sys.stderr)
            rows.append(figures(case, arch))
    if args.json:
        print(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
