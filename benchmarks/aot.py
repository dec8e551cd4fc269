"""Compile every Triton kernel for GPUs that need not be present, and read the generated assembly.

    python benchmarks/aot.py                 # a table for sm_80, sm_90 and sm_100; whether gfx942 compiles
    python benchmarks/aot.py --arch 90 --json

For each kernel: registers, spills (local loads and stores), 128-bit loads and stores, and instructions per logit. The
instructions are those of the main loop or, for kernels that process one block of columns, of the longest run of code
without branches that has 128-bit stores. For gfx942 it only says whether Triton compiles and links the kernel. If there
is an nvcc, registers and spills of the CUDA kernels too, from its assembler. Needs torch and triton. It takes about two
minutes on two cores, most of it in the disassembler.
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
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import aot_model as model
import nvcc
import triton
from aot_table import report, report_cuda
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "100", "gfx942")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
LOGITS_POINTERS = {"basis_ptr", "out_ptr", "ref_ptr", "values_ptr", "x_ptr"}  # pointers to logits; others: statistics
FP32_ARGUMENTS = {
    "beta",
    "bound",
    "decay",
    "entropy_coef",
    "gamma",
    "high",
    "inner",
    "kl_coef",
    "label_smoothing",
    "low",
    "outer",
    "ref_inner",
    "ref_outer",
}


def load(name: str) -> types.ModuleType:
    """A module of kernels/triton, imported without fused_po, which need not be installed."""
    package = "aot_triton_kernels"
    if package not in sys.modules:
        parent = types.ModuleType(package)
        parent.__path__ = [str(ROOT / "kernels" / "triton")]
        sys.modules[package] = parent
    return importlib.import_module(f"{package}.{name}")


class Case(NamedTuple):
    """A kernel with its compile-time arguments. Block and warps: None takes those of kernels/triton/launch.py.

    aligned: the vocabulary and the strides are multiples of 16. columns: those of one program; None means a whole row.
    """

    name: str
    module: str
    kernel: str
    dtype: str
    constants: dict
    block: int | None = None
    warps: int | None = None
    aligned: bool = True
    group: int | None = None  # 1: rows of logits and gradient have different alignments
    columns: int | None = None


def table_name(case: Case) -> str:
    """The name of the case's kernel in the table of launch shapes, or None."""
    name = "statistics_kernel" if case.kernel == "scan_parts_kernel" else case.kernel
    more = name == "statistics_kernel" and case.constants["OUTPUTS"] >= 8
    return "statistics_all" if more else name.removesuffix("_kernel")


def shaped(case: Case, arch: str) -> Case:
    """The case with its block, warps and columns filled in."""
    launch = load("launch")
    name = table_name(case)
    if name not in launch.SHAPES:
        return case
    block, warps, turns = launch.shape_for(name, f"sm_{arch}")
    case = case._replace(block=case.block or block, warps=case.warps or warps)
    if turns and "TURNS" in getattr(load(case.module), case.kernel).arg_names:
        case.constants["TURNS"] = turns
    return case._replace(columns=case.columns or (turns * case.block or None))


NO_GRADIENTS = {"g_logps_ptr": None, "g_entropy_ptr": None, "g_lse_ptr": None, "entropy_ptr": None}
LOGPS_ONLY = {"g_entropy_ptr": None, "g_lse_ptr": None, "entropy_ptr": None}


def statistics_cases(dtype: str) -> list[Case]:
    out = []
    for label, outputs in {"logps": 1, "logps+entropy": 3, "all outputs": 63}.items():
        flags = {"OUTPUTS": outputs}
        out.append(Case(f"statistics, {label}", "statistics", "statistics_kernel", dtype, flags))
        if dtype == "bf16" or outputs == 63:
            out.append(
                Case(f"statistics of parts, {label}", "statistics", "scan_parts_kernel", dtype, flags, columns=16384)
            )
            lanes = {"LANES": 64, **flags}
            out.append(Case(f"merge of parts, {label}", "statistics", "merge_parts_kernel", dtype, lanes, 4096, 1))
        if dtype == "bf16" and outputs != 63:
            name = f"statistics, {label}, V=50257"
            out.append(Case(name, "statistics", "statistics_kernel", dtype, flags, aligned=False))
    return out


def gradient_cases(dtype: str) -> list[Case]:
    out = []
    for label, constants in {"basis": NO_GRADIENTS, "logps": LOGPS_ONLY, "all": {}}.items():
        out.append(Case(f"gradient, {label}", "gradient", "gradient_kernel", dtype, constants))
        if dtype == "bf16":
            name = f"gradient, {label}, V=50257"
            out.append(Case(name, "gradient", "gradient_kernel", dtype, constants, aligned=False))
            name = f"gradient, {label}, other alignment"
            out.append(Case(name, "gradient", "gradient_kernel", dtype, constants, aligned=False, group=1))
        if label != "basis":
            out.append(Case(f"gradient from the basis, {label}", "gradient", "from_basis_kernel", dtype, constants))
    return out


def dpo_cases(dtype: str) -> list[Case]:
    out = []
    dpo = {"g_losses_ptr": None, "g_sequences_ptr": None}
    for kl in (None, "k3"):
        out.append(Case(f"dpo gradient, kl={kl}", "dpo", "dpo_gradient_kernel", dtype, {"KL": kl, **dpo}))
    reference = {"REF_GROUP": 16 // ITEMSIZE[dtype]}
    return [*out, Case("pair statistics", "dpo", "pair_statistics_kernel", dtype, reference)]


def kl_cases(dtype: str) -> list[Case]:
    out = []
    for direction in ("reverse", "forward", 0.5):
        for labels in (False, True) if dtype == "bf16" else (True,):
            flags = {"DIRECTION": direction, "LABELS": labels, "ref_inner": None}
            name = ("js" if direction == 0.5 else direction) + (", log-probs and entropy" if labels else "")
            out.append(Case(f"kl, {name}", "kl", "kl_kernel", dtype, flags))
            out.append(Case(f"kl gradient, {name}", "kl", "kl_gradient_kernel", dtype, flags))
    if dtype == "bf16":
        flags = {"DIRECTION": "reverse", "LABELS": True, "ref_inner": None, "SAME": False}
        out.append(Case("kl, reverse, other alignment", "kl", "kl_kernel", dtype, flags, aligned=False))
        out.append(
            Case("kl gradient, reverse, other alignment", "kl", "kl_gradient_kernel", dtype, flags, aligned=False)
        )
    return [
        *out,
        Case("kl, js over a part", "kl", "mixture_kernel", dtype, {"ref_inner": None, "WEIGHT": 0.5}),
    ]


def shards_cases() -> list[Case]:
    """Of 8 ranks."""
    out, shape = [], {"LANES": 8}
    for label, outputs in {"logps": 1, "all outputs": 63}.items():
        flags = {"OUTPUTS": outputs, **shape}
        out.append(Case(f"merge of ranks, {label}", "shards", "merge_scores_kernel", "fp32", flags, 128, 4))
    for direction in ("reverse", "forward", "js"):
        flags = {"DIRECTION": direction, "LABELS": True, **shape}
        out.append(Case(f"merge of ranks, {direction}", "shards", "merge_kl_kernel", "fp32", flags, 128, 4))
    return out


def policy_cases(dtype: str) -> list[Case]:
    out = [Case("scale", "policy", "scale_kernel", dtype, {})]
    bare = {"KL_KIND": None, "KL_TIMES_RATIO": False, "ref_ptr": None}
    forms = {"clip": bare, "clip, k3": {"KL_KIND": "k3", "KL_TIMES_RATIO": True}}
    if dtype == "bf16":
        forms |= {"weight": bare | {"old_ptr": None}, "gate, k2": {"KL_KIND": "k2", "KL_TIMES_RATIO": True}}
    for name, constants in forms.items():
        for overwrite in (False, True):
            flags = {"KIND": name.split(",")[0], "OVERWRITE": overwrite, "WITH_ENTROPY": False, **constants}
            label = f"policy, {name}" + (", and its gradient" if overwrite else "")
            out.append(Case(label, "policy", "policy_kernel", dtype, flags))
    return out


def cases() -> list[Case]:
    """Every kernel, in every variant that changes its code."""
    out = []
    for dtype in ("bf16", "fp16", "fp32"):
        out += statistics_cases(dtype) + gradient_cases(dtype) + dpo_cases(dtype)
        out += kl_cases(dtype) + policy_cases(dtype)
    softcap = {"OUTPUTS": 3, "inner": 0.0}
    out.append(Case("statistics, logps+entropy, softcap", "statistics", "statistics_kernel", "bf16", softcap))
    out.append(Case("gradient, all, softcap", "gradient", "gradient_kernel", "bf16", {"inner": 0.0}))
    for kl in (None, "k1", "k2", "k3"):
        for sums in (False, True) if kl is None else (False,):
            name = f"dpo, kl={kl}" + (", reference sums" if sums else "")
            constants = {"KL": kl, "REF_SUMS": sums}
            out.append(Case(name, "dpo", "dpo_kernel", "fp32", constants, block=1024, warps=4))
    out += shards_cases()
    for name, constants in {"gae": {"mask_ptr": None, "last_ptr": None}, "gae, masked, last values": {}}.items():
        out.append(Case(name, "gae", "gae_kernel", "fp32", constants, block=1024, warps=8))
    return out


def signature(case: Case, names: list[str]) -> tuple[dict, dict]:
    """(types of run-time arguments, values of compile-time arguments)."""
    constants = dict(case.constants)
    if "softcap" in case.name:
        constants.pop("inner")
    elif "inner" in names:
        constants["inner"] = None
    constants = {"SAME": True} | constants | {"BLOCK": case.block, "GROUP": case.group or 16 // ITEMSIZE[case.dtype]}
    constants = {name: value for name, value in constants.items() if name in names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("label_ptr", "owner_ptr", "mask_ptr"):
            return "*u8" if name == "mask_ptr" else "*i64"
        if name.endswith("_ptr"):
            logits = name in LOGITS_POINTERS and case.kernel != "dpo_kernel"
            return "*" + (case.dtype if logits and (case.kernel, name) != ("policy_kernel", "ref_ptr") else "fp32")
        if name in FP32_ARGUMENTS:
            return "fp32"
        return "i64" if "stride" in name or name == "ignore_index" else "i32"

    return {name: kind(name) for name in names}, constants


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)


def compile_case(case: Case, arch: str):
    """The compiled kernel. Pointers are multiples of 16; so are strides and the vocabulary if the case says so.

    Nothing is assumed about an argument that the kernel does not specialise on, as at run time.
    """
    case = shaped(case, arch)
    kernel = getattr(load(case.module), case.kernel)
    names = list(kernel.arg_names)
    types_, constants = signature(case, names)

    def multiple_of_16(i: int, name: str) -> bool:
        parameter = kernel.params[i]
        if types_[name] == "constexpr" or parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
            return False
        return types_[name].startswith("*") or (case.aligned and ("stride" in name or name in ("n_cols", "n_rows")))

    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if multiple_of_16(i, name)}
    source = ASTSource(fn=kernel, signature=types_, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target_of(arch), options={"num_warps": case.warps})


def dump(cubin: bytes, *what: str) -> str:
    """Resource usage ("-res-usage") or assembly ("-sass"), from the cuobjdump in triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, *what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


OPERANDS = {"kl_kernel": 2, "kl_gradient_kernel": 2, "mixture_kernel": 2}  # logits per column; otherwise 1
NO_LOGITS = ("dpo_kernel", "gae_kernel")  # like the merges: their work does not grow with the vocabulary
SECOND_PASS = ("policy_kernel", "kl_kernel")  # in these the last loop may differ from the first


def passes(case: Case, code: model.Code) -> list[model.Pass]:
    """The loops that a program runs over its columns, one after another; of two equal loops the longer one."""
    if case.kernel in NO_LOGITS or case.kernel.startswith("merge_"):
        return []
    found = model.loops(code)
    second = case.constants.get("OVERWRITE") or case.constants.get("DIRECTION") == 0.5
    if not found:
        path = model.vector_path(code)
        return [model.Pass(path, case.block)] if path else []
    chosen = [found[0], found[-1]] if case.kernel in SECOND_PASS and second else [max(found, key=len)]
    per_column = ITEMSIZE[case.dtype] * OPERANDS.get(case.kernel, 1)
    loaded = [model.moved(loop, model.LOAD) + model.moved(loop, model.COPY) for loop in chosen]
    return [model.Pass(loop, size * case.warps * 32 // per_column) for loop, size in zip(chosen, loaded)]


def beside(code: model.Code, chosen: list[model.Pass]) -> model.Code:
    """What a program runs once: everything outside the loops; without a loop, what leads to its longest path."""
    loops = model.loops(code)
    if chosen and not loops:
        return [line for line in code if line[0] < chosen[0].code[0][0]]
    inside = {address for loop in loops for address, _ in loop}
    return [line for line in code if line[0] not in inside]


def speed(case: Case, arch: str, registers: int, shared: int, code: model.Code, vocabulary: int) -> dict:
    """What determines the speed of the passes over the columns: the worst of several, and the sum of instructions."""
    chosen = passes(case, code)
    if not chosen:
        return {}
    rest = beside(code, chosen)
    looped = bool(model.loops(code))
    columns = (case.columns or vocabulary) if looped else case.block
    gpus = {name: gpu for name, gpu in model.GPUS.items() if gpu.arch == arch}
    any_gpu = next(iter(gpus.values()))
    held = model.residents(registers, case.warps, shared, any_gpu)
    in_flight = min(model.walk(one.code, any_gpu, 4).in_flight for one in chosen) * held * case.warps * 32
    lanes = case.warps * 32
    return {
        "warps": held * case.warps,
        "in_flight": in_flight,
        "narrow_loads": sum("LDG.E" in text and ".128" not in text for one in chosen for _, text in one.code),
        "instructions_per_element": round(sum(len(one.code) * lanes / one.columns for one in chosen), 2),
        "instructions_once": len(rest),
        "share": {
            name: round(model.share(chosen, rest, columns, case.warps, held, gpu), 2) for name, gpu in gpus.items()
        },
    }


def figures(case: Case, arch: str, disassembled: bool, vocabulary: int) -> dict:
    """One row of the table, or why the case does not compile. Without a disassembly only registers and spills."""
    case = shaped(case, arch)
    row = {"kernel": case.name, "dtype": case.dtype, "arch": arch if arch.startswith("gfx") else f"sm_{arch}"}
    try:
        compiled = compile_case(case, arch)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return row | {"compiles": f"{type(error).__name__}: {lines[0]}"}
    row["compiles"] = True
    if "cubin" not in compiled.asm:
        return row
    usage = dump(compiled.asm["cubin"], "-res-usage")
    row["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
    spills = int(re.search(r"STACK:(\d+)", usage)[1]) > 0  # a register is spilled to the stack
    assembly = dump(compiled.asm["cubin"], "-sass") if disassembled or spills else ""
    row["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    if not disassembled:
        return row
    code = model.instructions(assembly)
    row |= {
        "shared": compiled.metadata.shared,
        "loads_128bit": len(re.findall(r"\bLDG\.E\S*\.128", assembly)),
        "stores_128bit": len(model.VECTOR_STORE.findall(assembly)),
    }
    return row | speed(case, row["arch"], row["registers"], compiled.metadata.shared, code, vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=ARCHITECTURES, help="compute capabilities, e.g. 90, or gfx942")
    parser.add_argument("--disassemble", nargs="*", help="disassemble only for these; it takes most of the time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a Markdown table")
    parser.add_argument("--kernel", default="", metavar="REGEX", help='only these kernels, e.g. "gradient.*bf16"')
    parser.add_argument("--vocabulary", type=int, default=32000, help="columns per row, for the predicted shares")
    args = parser.parse_args()
    began = time.monotonic()
    if unknown := set(args.disassemble or ()) - set(args.arch):
        parser.error(
            f"--disassemble: got {', '.join(sorted(unknown))}; allowed are those of --arch: {' '.join(args.arch)}"
        )
    chosen = args.arch if args.disassemble is None else args.disassemble
    mine = [case for case in cases() if re.search(args.kernel, f"{case.name}, {case.dtype}")]
    work = [(case, arch, arch in chosen, args.vocabulary) for arch in args.arch for case in mine]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(figures, *zip(*work)))
    print(f"{len(rows)} kernels in {time.monotonic() - began:.0f} s", file=sys.stderr)
    functions = sorted({case.kernel for case in cases()})
    if args.json:
        print(json.dumps({"triton": triton.__version__, "functions": functions, "rows": rows}, indent=1))
    else:
        print(report(rows))
        cuda = "only Triton kernels were asked for" if args.kernel else nvcc.figures()
        print("\n" + (f"CUDA kernels: not compiled, {cuda}" if isinstance(cuda, str) else report_cuda(cuda)))


if __name__ == "__main__":
    main()
