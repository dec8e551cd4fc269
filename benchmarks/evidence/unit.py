"""One unit in its own process: `python -m evidence.unit KIND ... --device cuda --result FILE`.

Its result goes to FILE as JSON. It exits with 0 if it succeeded; otherwise the result's "reason" says why not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from evidence.stages import ROOT
from evidence.state import TESTS, code_digest, read_json, write_json

PACKAGES = (
    "fused-po",
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "liger-kernel",
    "quack-kernels",
    "cut-cross-entropy",
    "unsloth-zoo",
    "verl",
)


def versions() -> dict[str, str | None]:
    import importlib.metadata

    found: dict[str, str | None] = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def probe(args: argparse.Namespace) -> dict:
    """The device; "device" is None, with a reason, if there is none."""
    import torch

    found = {"device": None, "reason": None, "memory": None, "capability": None, "versions": versions()}
    found["versions"] |= {"cuda": torch.version.cuda}
    if args.device == "cpu":
        return found | {"device": "CPU"}
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else f"with CUDA {torch.version.cuda} finds none"
        return found | {"reason": f"no CUDA GPU: torch {torch.__version__} {built}"}
    about = torch.cuda.get_device_properties(0)
    return found | {
        "device": about.name,
        "memory": about.total_memory,
        "capability": [about.major, about.minor],
        "multiprocessors": about.multi_processor_count,
    }


def tests(args: argparse.Namespace) -> dict:
    """Run pytest on a file, or on a share of its tests. Tests that passed are recorded and not run again."""
    ended = args.out / TESTS
    environ = os.environ | {
        "EVIDENCE_TESTS": str(ended),
        "EVIDENCE_CODE": code_digest(),
        "EVIDENCE_SHARD": args.shard,
        "CI": "true",
    }
    words = [sys.executable, "-m", "pytest", "-p", "evidence.passed", "-p", "no:cacheprovider", "-m", args.marks]
    done = subprocess.run([*words, "--durations=5", "--tb=short", *args.words], cwd=ROOT, env=environ)
    from evidence.passed import counts

    found = counts(ended, args.words, args.shard, code_digest())
    nothing_left = done.returncode == 5 and found["passed"] + found["skipped"] > 0
    if done.returncode == 0 or nothing_left:
        return found
    red = found["failed"]
    said = f"{len(red)} failed: {', '.join(red[:5])}" if red else f"pytest ended with status {done.returncode}"
    return found | {"reason": said}


def fused_po_selfcheck(device: str, *words: str) -> dict:
    """The JSON of the command, and a reason if an op failed."""
    command = [sys.executable, "-m", "fused_po", "selfcheck", "--json", "--device", device, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(done.stderr[-20000:])
    try:
        found = json.loads(done.stdout)
    except ValueError:
        print(done.stdout[-5000:])
        return {"reason": f"selfcheck ended with status {done.returncode} and no result"}
    if "results" not in found:
        return {"reason": f"selfcheck: {found}"}
    print(json.dumps(found["failed"], indent=1))
    bad = [r for r in found["results"] if not r["passed"]]
    return found | ({"reason": "; ".join(f"{r['check']} {r['dtype']} {r['note']}" for r in bad[:5])} if bad else {})


def selfcheck(args: argparse.Namespace) -> dict:
    size = ("--quick", "--vocab", "211", "--hidden", "16") if args.suite == "tiny" else ()
    return fused_po_selfcheck(args.device, "--dtype", args.dtype, *size)


def shapes(args: argparse.Namespace) -> dict:
    """Run benchmarks/launch_shapes.py, which times some launch shapes of each kernel."""
    script = ROOT / "benchmarks" / "launch_shapes.py"
    size = ("--suite", "tiny") if args.suite == "tiny" else ("--quick",)
    environ = os.environ | ({"TRITON_INTERPRET": "1"} if args.device == "cpu" else {})
    if not script.exists():
        return {"reason": "benchmarks/launch_shapes.py does not exist"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shapes.json"
        words = [sys.executable, str(script), *size, "--device", args.device, "--json", str(path)]
        done = subprocess.run(words, cwd=ROOT, env=environ)
        if done.returncode or not path.exists():
            return {"reason": f"launch_shapes.py ended with status {done.returncode}"}
        return {"shapes": read_json(path)}


def measured(kind: str, args: argparse.Namespace) -> dict:
    """The units that use torch in this process."""
    if kind in ("case", "ceilings"):
        from evidence import heads

        return heads.case(args) if kind == "case" else heads.ceilings(args)
    if kind in ("rows", "one-read", "profile", "parts"):
        from evidence import rows

        return {"rows": rows.share, "one-read": rows.one_read, "profile": rows.profile, "parts": rows.parts}[kind](args)
    from evidence import steps

    return steps.trl(args) if kind == "step-trl" else steps.example(args)


def toolkit(kind: str, args: argparse.Namespace) -> dict:
    from evidence import tools

    found = {"ncu": tools.ncu, "sanitizer": tools.sanitizer, "cuda-build": tools.build, "cuda-check": tools.check}
    return found[kind](args)


KINDS = {"probe": probe, "tests": tests, "selfcheck": selfcheck, "shapes": shapes}
MEASURED = ("case", "ceilings", "rows", "one-read", "profile", "parts", "step-trl", "step-example")
TOOLKIT = ("ncu", "sanitizer", "cuda-build", "cuda-check")


def end_all(*_) -> None:
    """On SIGTERM, end this process and all that it has started. Needs a process group of its own, as units have."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    sys.exit(128 + signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, end_all)
    parser = argparse.ArgumentParser(prog="python -m evidence.unit", description=__doc__)
    add = parser.add_argument
    add("kind", choices=(*KINDS, *MEASURED, *TOOLKIT))
    add("words", nargs="*")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--result", type=Path)
    add("--out", type=Path, default=Path())
    add("--suite", default="gpu", choices=("gpu", "tiny"))
    add("--shard", default="0/1")
    add("--marks", default="not slow")
    add("--dtype", default="bf16", choices=("fp32", "bf16", "fp16"))
    add("--who", default="main")
    add("--vocabularies", type=int, nargs="*", default=())
    args = parser.parse_args(argv)
    if args.kind in KINDS:
        found = KINDS[args.kind](args)
    elif args.kind in MEASURED:
        found = measured(args.kind, args)
    else:
        found = toolkit(args.kind, args)
    if args.result:
        write_json(args.result, found)
    return 1 if found.get("reason") and args.kind != "probe" else 0


if __name__ == "__main__":
    sys.exit(main())
