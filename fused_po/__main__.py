"""Show the installation (info), verify the ops on this machine (selfcheck), or estimate memory and time (plan)."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import sys
from pathlib import Path

import torch

import fused_po
from fused_po import selfcheck
from fused_po.backend import choose as backends
from fused_po.planner import command as planner
from fused_po.schedule import BUDGET_VARIABLE

PACKAGES = {  # what it is for, and the command that installs it
    "triton": ("the kernels on a GPU", backends.kernels.how_to_get_triton()),
    "transformers": ("integrations.transformers, the examples", "pip install 'transformers>=5.17'"),
    "peft": ("adapters (LoRA), the examples' --lora", "pip install peft"),
    "datasets": ("the examples on data sets of the Hub", "pip install datasets"),
    "trl": ("integrations.trl", "pip install 'trl>=1.15,<1.17'"),
    "verl": ("integrations.verl", "pip install verl==0.9.1"),
    "openrlhf": ("integrations.openrlhf", "pip install openrlhf==0.11.2"),
    "liger-kernel": ("integrations.liger, `make peers bench`", "pip install liger-kernel==0.8.5"),
    "axolotl": ("integrations.axolotl", "pip install axolotl==0.19.0"),
}
BUILDS = {"triton": ("triton", "triton-rocm", "pytorch-triton-rocm")}  # PyTorch for ROCm brings one of its own
DTYPES = {**selfcheck.DTYPES, "fp64": torch.float64}
WIDE = ("linear_logps", "linear_kl", "linear_dpo", "chunked_loss", "gae")  # their kernels work on fp32, or fp64
OPS = ("logps_from_logits", "kl_from_logits", "dpo_from_logits", "policy_loss_from_logits", *WIDE)
VARIABLES = ("FUSED_PO_DEBUG", BUDGET_VARIABLE, "TRITON_INTERPRET", "TRITON_CACHE_DIR")
QUICK, FULL = selfcheck.Size(192, 4099, 96), selfcheck.Size(512, 50257, 256)


def version_of(package: str) -> str | None:
    """The installed version of a package, under any of the names it is distributed by; None if it is not installed."""
    for name in BUILDS.get(package, (package,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def devices() -> dict[str, str]:
    """Device name -> description, for each device that torch sees; the CPU is last."""
    found = {}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    capability = torch.backends.cpu.get_cpu_capability()
    return found | {"cpu": f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"}


def default_backends(device: str) -> dict[str, dict[str, str]]:
    """op -> {dtype of its inputs: the backend that backend=None selects}."""
    where, default = torch.device(device), fused_po.Schedule()
    return {
        op: {
            name: backends.resolve(None, where, default.logits_dtype_for(dtype) if op in WIDE else dtype)
            for name, dtype in DTYPES.items()
        }
        for op in OPS
    }


def missing() -> dict[str, str]:
    """What is not installed -> what needs it, and the command that installs it."""
    found = {name: f"{what}: {how}" for name, (what, how) in PACKAGES.items() if version_of(name) is None}
    if torch.version.cuda is None and Path("/dev/nvidia0").exists():
        found["CUDA in torch"] = "the GPU of this machine: pip install --force-reinstall torch"
    if torch.cuda.is_available() and not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        found["a C compiler"] = "Triton's launches: apt-get install gcc"
    return found


def info() -> dict:
    """Versions and settings; for each device the backend of each op, and why others cannot run; what is missing."""
    versions = {"fused_po": fused_po.__version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {"cuda": torch.version.cuda, **{name: version_of(name) for name in PACKAGES}}
    return {
        "versions": versions,
        "settings": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "devices": devices(),
        "ops": {device: default_backends(device) for device in devices()},
        "backends": {
            device: {n: fused_po.backends(device, dtype) for n, dtype in DTYPES.items()} for device in devices()
        },
        "missing": missing(),
    }


def print_info(found: dict) -> None:
    lines = [", ".join(f"{name} {value or '(not installed)'}" for name, value in found["versions"].items())]
    if found["settings"]:
        lines.append(", ".join(f"{name}={value}" for name, value in found["settings"].items()))
    for device, description in found["devices"].items():
        lines.append(f"\n{device}: {description}\n")
        lines.append("  " + f"{'op, dtype':24}" + "".join(f"{dtype:11}" for dtype in DTYPES).rstrip())
        for op, choices in found["ops"][device].items():
            lines.append("  " + f"{op:24}" + "".join(f"{choices[dtype]:11}" for dtype in DTYPES).rstrip())
        by_answer: dict[str, list[str]] = {}
        for dtype, answers in found["backends"][device].items():
            for backend, answer in answers.items():
                by_answer.setdefault(f"{backend}: {answer}", []).append(dtype)
        lines.append("")
        lines += [f"  {', '.join(dtypes)}: {answer}" for answer, dtypes in by_answer.items()]
    lines.append("\nmissing" * bool(found["missing"]))
    lines += [f"  {name}, for {what}" for name, what in found["missing"].items()]
    print(planner.fitted("\n".join(lines)))


def check(args: argparse.Namespace) -> int:
    """Run the checks, print the results, and return the exit status."""
    base = QUICK if args.quick else FULL
    size = selfcheck.Size(base.tokens, args.vocab or base.vocab, args.hidden or base.hidden)
    dtypes = tuple(args.dtype or (("fp32", "bf16") if args.quick else selfcheck.DTYPES))
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    if not any(args.only in check.name for check in selfcheck.checks(args.backend)):
        return planner.refused(f"--only: no check has {args.only!r} in its name", args.json)
    if args.backend is not None:
        where = torch.device(args.device)
        reasons = [backends.cannot_run(args.backend, where, selfcheck.DTYPES[dtype]) for dtype in dtypes]
        if all(reasons):
            reason = f"{args.backend!r} does not run on {args.device}: {reasons[0]}; leave it out to use the default"
            return planner.refused(f"--backend: {reason}", args.json)
    results = []
    for done, total, result in selfcheck.run(size, dtypes, args.device, seed, args.backend, args.only):
        selfcheck.progress(done, total, result.check)
        results.append(result)
    failed = [result for result in results if not result.passed]
    flags = f"--device {args.device}" + (f" --backend {args.backend}" if args.backend else "")
    commands = [
        f"python -m fused_po selfcheck {flags} --dtype {r.dtype} --vocab {size.vocab} --hidden {size.hidden} "
        f"--seed {seed} --only {r.check!r}" + (" --quick" if args.quick else "")
        for r in failed
    ]
    if args.json:
        rows = [
            {k: None if v in (math.inf, -math.inf) or v != v else v for k, v in result._asdict().items()}
            for result in results
        ]  # JSON has no NaN and no infinities
        print(json.dumps({"seed": seed, "size": size._asdict(), "results": rows, "failed": commands}, indent=1))
        return 1 if failed else 0
    title = (
        f"RMS errors against float64 on {args.device}; N={size.tokens}, V={size.vocab}, H={size.hidden}, seed {seed}"
    )
    passed = f"{len(results) - len(failed)} of {len(results)} passed"
    repeats = "".join(f"\n{planner.TO_COPY}{line}" for line in commands)
    print(planner.fitted(f"{title}\n\n{selfcheck.table(results)}\n\n{passed}{repeats}"))
    return 1 if failed else 0


def device(text: str) -> str:
    """A device that holds values, for argparse."""
    try:
        if torch.empty(0, device=text).device.type != "meta":
            return text
        reason = "a meta tensor has no values"
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that does not exist
        reason = str(error).splitlines()[0][:80]
    raise argparse.ArgumentTypeError(f"got {text!r}, available are {', '.join(devices())} ({reason})")


def seed(text: str) -> int:
    """A seed that torch's generators accept, for argparse."""
    if not text.isdecimal() or int(text[:30]) > planner.LARGEST:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are integers from 0 to {planner.LARGEST}")
    return int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fused_po", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fused_po {fused_po.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    descriptions = {
        "info": "show versions, devices, the backend of each op, and what is missing",
        "selfcheck": "compare every op with float64 and with plain PyTorch, on this machine",
        "plan": "estimate memory, FLOPs, time and communication of the LM head and the loss on each rank",
    }
    subparsers = {
        name: commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        for name, text in descriptions.items()
    }
    for subparser in subparsers.values():
        subparser.add_argument("--json", action="store_true", help="print JSON")
    add_selfcheck_flags(subparsers["selfcheck"])
    planner.add_flags(subparsers["plan"])
    return parser.parse_args(argv)


def add_selfcheck_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes, fp32 and bf16: under a minute on a CPU")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help=f"cpu, cuda or cuda:1; default: {default}")
    dtypes = "dtype of the inputs, may be repeated; default: all, with --quick fp32 and bf16"
    parser.add_argument("--dtype", action="append", choices=[*selfcheck.DTYPES], help=dtypes)
    sizes = f"default: {FULL.vocab}, with --quick {QUICK.vocab}"
    parser.add_argument("--vocab", type=planner.count, help=f"vocabulary size; {sizes}")
    sizes = f"default: {FULL.hidden}, with --quick {QUICK.hidden}"
    parser.add_argument("--hidden", type=planner.count, help=f"hidden size; {sizes}")
    names = f"{' or '.join(backends.NAMES)}; default: the one that backend=None selects"
    parser.add_argument("--backend", choices=backends.NAMES, help=names)
    parser.add_argument("--seed", type=seed, help="seed of the random inputs; default: random")
    parser.add_argument("--only", default="", help="run only checks with this text in their name")


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    if args.command == "selfcheck":
        return check(args)
    if args.command == "plan":
        return planner.plan(args)
    found = info()
    print(json.dumps(found, indent=1)) if args.json else print_info(found)
    return 0


def drop_output() -> None:
    """Redirect stdout to the null device, so that Python does not fail again when it flushes the rest at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal's encoding does not have
    try:
        try:
            return run(parse(argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        drop_output()
        return 128 + 13  # the status of a process that SIGPIPE ends
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
            raise
        drop_output()
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + 2


if __name__ == "__main__":
    sys.exit(main())
