"""All measurements on a GPU: tests, selfcheck, benchmark, launch shapes, ncu, sanitizers, training steps.

    make gpu-evidence OUT=runs/evidence            # repeat until the exit status is not 3
    python benchmarks/evidence --plan H100         # the expected time; needs no GPU

Exit status: 0 all is done; 1 something failed or could not run, see the last lines; 2 wrong usage; 3 the time is used
up and units are left: call it again. make turns each of them except 0 into 2; the last line has the number.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evidence import prices, table
from evidence.runner import Runner, Settings, environment
from evidence.stages import ROOT, STAGES, plan_units
from evidence.state import State, Unusable, open_folder, read_json

PROBE_LIMIT = 180.0  # seconds in which torch must describe the machine
PATIENCE = 20.0  # in a rehearsal, where kernels are interpreted
EXIT_FAILED, EXIT_USAGE, EXIT_LEFT = 1, 2, 3


def stages_of(text: str) -> tuple[str, ...]:
    """Names separated by commas or spaces, in any order."""
    names = text.replace(",", " ").split()
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; allowed are {', '.join(STAGES)}")
    return tuple(name for name in STAGES if name in names) or tuple(STAGES)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=ROOT / "runs" / "evidence",
        help="folder for results and logs; continued if it exists",
    )
    add("--from", dest="before", type=Path, help="OUT of an earlier call, copied to --out first")
    add("--stages", type=stages_of, default=tuple(STAGES), help=f"some of {', '.join(STAGES)}")
    add("--budget", type=positive, default=570.0, help="seconds for this call; default: 570")
    add("--plan", metavar="GPU", choices=[*prices.MACHINES], help="print the expected seconds on H100 or H200 and exit")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial run with --suite tiny, no evidence")
    add("--suite", choices=("gpu", "tiny"), default="gpu", help="tiny: every stage at its smallest size, no evidence")
    add("--retry", action="store_true", help="run failed and abandoned units again")
    add("--keep-going", action="store_true", help="continue after a failed test")
    add(
        "--jobs",
        type=int,
        default=max(1, min(12, 3 * (os.cpu_count() or 1) // 4)),
        help="number of test processes at once",
    )
    args = parser.parse_args(argv)
    if args.device == "cpu" and args.suite != "tiny":
        parser.error("argument --device: cpu works only with --suite tiny; its results are no evidence")
    return args


def git(*words: str) -> str | None:
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() or None if done.returncode == 0 else None
    return None


def probe(device: str) -> dict:
    """The device, asked in a process of its own: {"device": name or None, "reason", "memory", "versions", ...}."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "probe.json"
        words = [sys.executable, "-m", "evidence.unit", "probe", "--device", device, "--result", str(result)]
        try:
            done = subprocess.run(
                words,
                capture_output=True,
                text=True,
                cwd=ROOT,
                timeout=PROBE_LIMIT,
                env=environment(STAGES["tests"], None),
            )
            return read_json(result)
        except subprocess.TimeoutExpired:
            return {"device": None, "reason": f"torch did not answer within {PROBE_LIMIT:.0f} s"}
        except (OSError, ValueError):
            said = done.stderr.strip().splitlines() or ["no output"]
            return {"device": None, "reason": f"torch could not be asked: {said[-1][:300]}"}


def unpack_peers(limit: float = 60.0) -> tuple[Path | None, str | None]:
    """(folder with the unpacked peers, what went wrong), from wheels/peers if it exists."""
    script, wheels = ROOT / "benchmarks" / "peer_wheels.py", ROOT / "wheels" / "peers"
    if not (script.exists() and wheels.is_dir()):
        return None, None
    target = ROOT / "runs" / "peers"
    try:
        target.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, str(script), "unpack", str(target)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=limit)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the peers' wheels could not be unpacked: {error}"
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        return None, f"the peers' wheels could not be unpacked: {last[-1][:300]}"
    return target, None


def about_of(found: dict, args: argparse.Namespace) -> dict:
    """What is needed to interpret the figures; evidence: whether they were measured on a GPU."""
    rehearsal = os.environ.get("FUSED_PO_REHEARSAL") == "1" or "rehearsal" in found["device"].lower()
    evidence = args.device == "cuda" and args.suite == "gpu" and not rehearsal
    commit = os.environ.get("COMMIT") or git("describe", "--always", "--dirty")
    return found | {"rehearsal": rehearsal, "evidence": evidence, "suite": args.suite, "commit": commit}


def no_device(args: argparse.Namespace, reason: str) -> int:
    """Report every stage as not run, because there is no GPU. Nothing runs on the CPU instead."""
    for name in args.stages:
        print(f"{name}: not run: {reason}")
    print(f"\nno evidence: {reason} (exit status {EXIT_FAILED})")
    return EXIT_FAILED


def run(args: argparse.Namespace, began: float) -> int:
    args.out = args.out.absolute()
    open_folder(args.out, args.before)
    rehearsal = os.environ.get("FUSED_PO_REHEARSAL") == "1"
    if args.device == "cuda" and not rehearsal and os.environ.get("TRITON_INTERPRET") not in (None, "", "0"):
        raise Unusable("TRITON_INTERPRET is set: kernels would be interpreted, not run on the GPU; unset it")
    found = probe(args.device)
    if not found["device"]:
        return no_device(args, found["reason"])
    about = about_of(found, args)
    real = args.device == "cuda" and not about["rehearsal"]
    units = plan_units(args.stages, args.suite == "tiny")
    state = State(args.out, about)
    if args.retry:
        state.forget_failures()
    state.begin_call(" ".join(["python", "benchmarks/evidence", *sys.argv[1:]]), args.budget)
    peers, trouble = unpack_peers()
    if trouble:
        state.notes.append(trouble)
    state.save()
    machine = prices.MACHINES["H200" if "H200" in about["device"] else "H100"]
    settings = Settings(
        machine,
        args.budget,
        args.device,
        args.keep_going,
        args.jobs,
        about["memory"] or 1 << 60,
        real,
        1.0 if real else PATIENCE,
    )
    runner = Runner(units, state, settings, peers=peers, began=began, say=lambda text: print(text, flush=True))
    runner.run()
    left = [u.key for u in runner.unfinished()]
    said = table.summary(units, state, runner.stopped)
    bad = table.troubles(units, state) + ([trouble] if trouble else [])
    if bad:
        ending, code = f"{len(bad)} failed or not run, see above" + (f"; {len(left)} left" if left else ""), EXIT_FAILED
    elif left:
        ending, code = f"{len(left)} left: call it again with the same OUT (or FROM=)", EXIT_LEFT
    else:
        ending, code = "all done", 0
    ending += f" (exit status {code})"
    print(f"\n{said}\n\n{ending}", flush=True)
    (args.out / "table.txt").write_text(f"{said}\n\n{ending}\n", encoding="utf-8")
    return code


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    args = parse(argv)
    if args.plan:
        print(table.plan(plan_units(args.stages, args.suite == "tiny"), prices.MACHINES[args.plan], args.budget, 12))
        return 0

    def stop(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return run(args, began)
    except Unusable as error:
        print(f"gpu-evidence: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
