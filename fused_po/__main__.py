"""`python -m fused_po info`: what is here and what would run. `python -m fused_po selfcheck`: is it right, here."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import sys

import torch

import fused_po
from fused_po import selfcheck

PACKAGES = {  # what it is for, and the command that installs it
    "triton": ("the kernels on a GPU", "pip install triton"),
    "transformers": ("integrations.transformers, the examples", "pip install transformers"),
    "trl": ("integrations.trl", "pip install trl"),
}
QUICK, FULL = selfcheck.Size(192, 4099, 96), selfcheck.Size(512, 50257, 256)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> dict[str, str]:
    """Name and capability of each device that torch sees, the CPU last."""
    found = {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB"
    return found | {"cpu": f"{torch.get_num_threads()} threads"}


def info() -> dict:
    """Versions, devices, and for each device and dtype which backend serves the ops, and why another does not."""
    versions = {"fused_po": fused_po.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {name: version_of(name) for name in PACKAGES}
    served = {
        device: {name: fused_po.backends(device, dtype) for name, dtype in (*selfcheck.DTYPES.items(), FP64)}
        for device in devices()
    }
    missing = {name: f"{what}: {how}" for name, (what, how) in PACKAGES.items() if versions[name] is None}
    return {"versions": versions, "devices": devices(), "backends": served, "missing": missing}


FP64 = ("fp64", torch.float64)


def print_info(found: dict) -> None:
    print(", ".join(f"{name} {value or '(absent)'}" for name, value in found["versions"].items()))
    for device, about in found["devices"].items():
        print(f"\n{device}: {about}")
        by_answer: dict[str, list[str]] = {}
        for dtype, answers in found["backends"][device].items():
            for backend, answer in answers.items():
                by_answer.setdefault(f"{backend}: {answer}", []).append(dtype)
        for answer, dtypes in by_answer.items():
            print(f"  {', '.join(dtypes)}: {answer}")
    for name, what in found["missing"].items():
        print(f"\nmissing {name}, for {what}")


def check(args: argparse.Namespace) -> int:
    """Run the checks, print what they found, and return the exit status."""
    base = QUICK if args.quick else FULL
    size = selfcheck.Size(base.tokens, args.vocab or base.vocab, args.hidden or base.hidden)
    dtypes = tuple(args.dtype or (("fp32", "bf16") if args.quick else selfcheck.DTYPES))
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    results = []
    for done, total, result in selfcheck.run(size, dtypes, args.device, seed, args.backend, args.only):
        selfcheck.progress(done, total, result.check)
        results.append(result)
    if not results:
        sys.exit(f"error: --only: no check has {args.only!r} in its name")
    failed = [result for result in results if not result.passed]
    where = f"--device {args.device}" + (f" --backend {args.backend}" if args.backend else "")
    again = [
        f"python -m fused_po selfcheck {where} --dtype {r.dtype} --vocab {size.vocab} --hidden {size.hidden} "
        f"--seed {seed} --only {r.check!r}" + (" --quick" if args.quick else "")
        for r in failed
    ]
    if args.json:
        rows = [result._asdict() for result in results]
        print(json.dumps({"seed": seed, "size": size._asdict(), "results": rows, "failed": again}, indent=1))
        return 1 if failed else 0
    print(
        f"RMS errors against float64 on {args.device}; N={size.tokens}, V={size.vocab}, H={size.hidden}, seed {seed}\n"
    )
    print(selfcheck.table(results))
    print(
        f"\n{len(results) - len(failed)} of {len(results)} passed" + "".join(f"\nto repeat: {line}" for line in again)
    )
    return 1 if failed else 0


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are integers above 0")
    return int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fused_po", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="versions, devices, which backend would serve, what is missing")
    ran = commands.add_parser("selfcheck", help="every op against float64 on this machine, beside plain PyTorch")
    for command in (about, ran):
        command.add_argument("--json", action="store_true", help="the same for programs")
    ran.add_argument("--quick", action="store_true", help="small and in fp32 and bf16: under a minute on a CPU")
    ran.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    ran.add_argument("--dtype", action="append", choices=[*selfcheck.DTYPES], help="may be given several times")
    ran.add_argument("--vocab", type=positive, help="vocabulary; 50257, or 4099 with --quick")
    ran.add_argument("--hidden", type=positive, help="hidden width; 256, or 96 with --quick")
    ran.add_argument("--backend", help="triton, cuda or reference; the one that would be chosen if left out")
    ran.add_argument("--seed", type=int, help="of the random inputs; a fresh one if left out")
    ran.add_argument("--only", default="", help="checks with this in their name")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "selfcheck":
        return check(args)
    found = info()
    print(json.dumps(found, indent=1)) if args.json else print_info(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
