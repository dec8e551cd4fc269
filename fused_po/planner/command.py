"""The flags of `python -m fused_po plan`, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import textwrap
from fractions import Fraction

import torch

from fused_po.lm_head.plan import Dtypes
from fused_po.planner.devices import STATED, Device, measured
from fused_po.planner.model import DTYPES, HeadShape, read_head
from fused_po.planner.report import report
from fused_po.planner.work import LOSSES, Work
from fused_po.schedule import CPU_TILE_BYTES, GPU_TILE_BYTES, default_budget

PREFIXES = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
UNITS = {"": 1, "B": 1, **{f"{prefix}B": factor for prefix, factor in PREFIXES.items()}}
LARGEST = 2**63 - 1  # of counts and sizes: what tensors can have
NUMBER = re.compile(r"(\d{1,30}(?:\.\d{1,30})?(?:E[+]?\d{1,2})?)\s*([A-Z]*)")
NARROWEST, TO_COPY = 40, "to repeat: "  # columns; what begins a line that holds a command
GEMM_ROWS, GEMM_COLUMNS = 2048, 2**15  # at most, of the product that --measure times


def scaled(text: str, units: dict[str, int]) -> Fraction | None:
    """Parse a number with a unit, exactly, up to LARGEST; None if it is not one."""
    found = NUMBER.fullmatch(text.strip().upper())
    unit = found and units.get(found[2])
    value = Fraction(found[1]) * unit if unit else None
    return None if value is None or value > LARGEST else value


def count(text: str) -> int:
    """An integer above 0: 2048, 2k (2000), 2Ki (2048), 1e6."""
    value = scaled(text, {"": 1, **PREFIXES})
    if value is None or value < 1 or value.denominator != 1:
        allowed = "integers above 0, such as 2048, 2k (2000), 2Ki (2048) or 1e6"
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are {allowed}")
    return int(value)


def size(text: str) -> int:
    """Bytes: 0, 512MiB, 2GiB, 1.5GB, 4e9."""
    value = scaled(text, UNITS)
    if value is None:
        allowed = "bytes such as 0, 512MiB, 2GiB, 80GB or 4e9"
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are {allowed}")
    return int(value)


def fitted(text: str) -> str:
    """Wrap lines at the terminal's width, or at COLUMNS. Lines are not wrapped if stdout is not a terminal."""
    asked = os.environ.get("COLUMNS", "")
    if not asked.isdecimal() and not (sys.stdout and sys.stdout.isatty()):
        return text
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    lines = []
    for line in text.split("\n"):
        if len(line) > width and not line.startswith(TO_COPY):
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            lines += textwrap.wrap(
                line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
        else:
            lines.append(line)
    return "\n".join(lines)


def refused(message: str, as_json: bool) -> int:
    """Print why the command does not run, and return the exit status."""
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message}))
    return 2


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are shares above 0 and up to 1")
    return value


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    model = parser.add_argument_group("the head")
    model.add_argument("--model", help="a config.json, a folder with one, or a Hub id (which needs transformers)")
    model.add_argument("--vocab", type=count, help="vocabulary size; --vocab and --hidden replace --model")
    model.add_argument("--hidden", type=count, help="hidden size")
    model.add_argument("--dtype", choices=[*DTYPES], help="of hidden states and head; default: the model's, or bf16")
    model.add_argument("--bias", action="store_true", help="the head has a bias")
    model.add_argument("--head", choices=("trainable", "frozen"), default="trainable", help="frozen: LoRA, probes")
    batch = parser.add_argument_group("the batch of one data-parallel rank, and the loss")
    batch.add_argument("--tokens", type=count, required=True, help="tokens per sequence, with prompt and padding")
    many = batch.add_mutually_exclusive_group()
    many.add_argument("--pairs", type=count, help="number of pairs of a chosen and a rejected answer; default: 1")
    many.add_argument("--sequences", type=count, help="number of sequences, for losses of single answers")
    about = "share of the tokens that are not prompt or padding; default: 1"
    batch.add_argument("--scored", type=share, default=1.0, help=about)
    about = "logps: no reference, or cached log-probs; dpo: the reference's head runs too; kl: exact KL; dpo-kl: both"
    batch.add_argument("--loss", choices=[*LOSSES], default="dpo", help=about + "; default: dpo")
    batch.add_argument("--entropy", action="store_true", help="the entropy has gradients too; only with --loss logps")
    ranks = parser.add_argument_group("the ranks")
    ranks.add_argument("--tp", type=count, default=1, help="number of ranks over which the vocabulary is sharded")
    ranks.add_argument("--dp", type=count, default=1, help="number of data-parallel ranks")
    about = "the head on data-parallel ranks: a copy (ddp), or a shard gathered once (fsdp) or twice (zero3) per step"
    ranks.add_argument("--dp-mode", choices=("ddp", "fsdp", "zero3"), default="ddp", help=about)
    how = parser.add_argument_group("memory settings and the device")
    about = "Schedule.logits_budget, such as 2GiB; default: 1/32 of the device's memory (1GiB on a CPU); "
    about += "FUSED_PO_LOGITS_BUDGET is ignored"
    how.add_argument("--budget", type=size, help=about)
    how.add_argument("--tile", type=size, help="Schedule.tile_bytes; default: 512MiB, 128MiB on a CPU")
    about = "the device whose peak rates from the data sheet are used; default: h100"
    how.add_argument("--device", choices=[*STATED], default="h100", help=about)
    about = "time a GEMM and a copy on this machine, and plan for it"
    how.add_argument("--measure", action="store_true", help=about)
    about = "memory available for the head and the loss; default: all of the device's"
    how.add_argument("--free", type=size, help=about)


def chosen_head(args: argparse.Namespace) -> HeadShape:
    """The head that --model, or --vocab and --hidden, name."""
    by_hand = (args.vocab is not None) + (args.hidden is not None)
    if args.model is not None and by_hand:
        raise ValueError("--model: not allowed with --vocab or --hidden; pass --model, or the other two")
    if args.model is not None:
        head = read_head(args.model)
    elif by_hand == 2:
        head = HeadShape("head", args.vocab, args.hidden, None)
    else:
        missing = "--vocab" if args.vocab is None and args.hidden is not None else "--hidden"
        name = missing if by_hand else "--model"
        raise ValueError(f"{name}: missing; expected --model, or --vocab and --hidden")
    dtype = DTYPES[args.dtype] if args.dtype else head.dtype or torch.bfloat16
    return head._replace(dtype=dtype, bias=head.bias or args.bias)


def chosen_device(args: argparse.Namespace, head: HeadShape) -> Device:
    """The device to plan for: one from its data sheet, or this machine as measured."""
    stated = STATED[args.device]
    if not args.measure:
        return stated
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if sys.stderr and sys.stderr.isatty():
        print(f"measuring a GEMM and a copy on {kind} ...", file=sys.stderr)
    dtype = Dtypes(head.dtype, torch.float32).gemm(kind)
    rows, columns = min(GEMM_ROWS, args.tokens), min(-(-head.vocab // args.tp), GEMM_COLUMNS)
    return measured((rows, head.hidden, columns), dtype, kind, stated)


def chosen_work(args: argparse.Namespace, head: HeadShape, device: Device) -> Work:
    """What one rank does in a step."""
    if args.entropy and args.loss != "logps":
        raise ValueError(f"--entropy: used only with --loss logps, got --loss {args.loss}; leave it out")
    if args.tp > head.vocab:
        raise ValueError(f"--tp: got {args.tp}, allowed are 1 to {head.vocab}, the rows of the head")
    budget = default_budget(torch.device(device.kind), device.memory) if args.budget is None else args.budget
    if budget > device.memory:
        raise ValueError(
            f"--budget: got {human(budget)}, allowed are 0 to {human(device.memory)}, all of {device.name}"
        )
    tile = args.tile if args.tile is not None else CPU_TILE_BYTES if device.kind == "cpu" else GPU_TILE_BYTES
    if tile < 1:
        raise ValueError("--tile: got 0, allowed are bytes above 0")
    sequences = args.sequences or 2 * (args.pairs or 1)
    if args.sequences and args.loss in ("dpo", "dpo-kl"):
        raise ValueError(f"--sequences: not allowed with --loss {args.loss}, a pair loss; pass --pairs or --loss logps")
    tokens = sequences * args.tokens
    return Work(
        tokens=tokens,
        scored=max(1, round(tokens * args.scored)),
        vocab=head.vocab,
        hidden=head.hidden,
        ref_hidden=head.hidden,
        dtype=head.dtype,
        bias=head.bias,
        loss=args.loss,
        needs=(True, args.head == "trainable"),
        entropy=args.entropy,
        tile_bytes=tile,
        budget=budget,
        device=torch.device(device.kind),
        sequences=sequences,
        tp=args.tp,
        dp=args.dp,
        dp_mode=args.dp_mode,
    )


def human(value: float) -> str:
    """Format bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if value >= UNITS[unit.upper()]:
            scaled = value / UNITS[unit.upper()]
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.3g}{unit}"
    return f"{value:.0f}B"


def seconds(value: float) -> str:
    """Format seconds."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def table(title: str, rows: list[dict], mark: str = "") -> list[str]:
    """A table of implementations or schedules, one per line."""
    lines = [f"\n{title:32} {'GEMMs':>6} {'TFLOP':>9} {'min. time':>9} {'peak':>9} {'total':>9} {'tp sends':>9}"]
    for r in rows:
        figures = f"{r['GEMMs']:6.2f} {r['flops'] / 1e12:9.4g} {seconds(r['seconds']):>9}"
        held = f"{human(r['peak bytes']):>9} {human(r['total bytes']):>9} {human(r['sent bytes']):>9}"
        suffix = "" if r["fits"] else "  does not fit"
        lines.append(f"{r['name']:32} {figures} {held}{suffix}{'  ' + r['note'] if r['note'] else ''}")
    return lines


def text(found: dict) -> str:
    """The report as text."""
    head, work, device = found["head"], found["work"], found["device"]
    tied = {True: "tied to the embedding", False: "not tied", None: ""}[head["tied"]]
    about = [f"[{head['vocab']}, {head['hidden']}]", head["dtype"], tied, "with bias" if head["bias"] else ""]
    softcap = f"softcap {head['softcap']}" if head["softcap"] else ""
    rates = ", ".join(f"{rate / 1e12:.4g} TFLOP/s {name}" for name, rate in device["flops"].items())
    lines = [
        f"{head['name']}: LM head {', '.join(x for x in (*about, softcap, head['note']) if x)}",
        f"one step of one rank: {work['tokens']} tokens, {work['scored']} scored, loss {work['loss']}; "
        f"tp {work['tp']} x dp {work['dp']} ({work['dp_mode']}) = {found['ranks']} ranks, "
        f"{found['rows of the head on a rank']} rows of the head per rank",
        f"device: {device['name']}, {rates}, {device['bandwidth'] / 1e12:.3g} TB/s, {human(device['memory'])} "
        f"({device['source']})",
        f"\nruns: {found['runs']}",
        f"      budget {human(work['budget'])}, {found['kept tokens']} tokens kept; {found['tile rows']} rows per tile",
        "\nmemory on one rank, without the rest of the model and the optimizer",
    ]
    held = {**found["held bytes"], **found["peak"]["bytes"]}
    lines += [f"  {name:44} {human(value):>9}" for name, value in held.items()]
    lines.append(f"  {'total at the peak, in the ' + found['peak']['moment']:44} {human(sum(held.values())):>9}")
    lines.append(f"\n{'steps':46} {'TFLOP':>9} {'moved':>9} {'sent':>9} {'min. time':>9}")
    for s in found["steps"]:
        flops = f"{s['flops'] / 1e12:.4g}" if s["flops"] else "-"
        moved, sent = (human(s[k]) if s[k] else "-" for k in ("moved", "sent"))
        overlap = "  during the model's backward" * (s["kind"] == "dp")
        under = f"  during {s['hidden_by']}" if s["hidden_by"] else overlap
        lines.append(f"  {s['name']:44} {flops:>9} {moved:>9} {sent:>9} {seconds(s['seconds']):>9}{under}")
    lines += table("schedules of fused_po", found["schedules"]) + table("other implementations", found["beside"])
    lines.append("\n" + ("fits" if found["fits"] else "does not fit"))
    lines += [f"  {line}" for line in found["advice"]]
    return "\n".join(lines)


def plan(args: argparse.Namespace) -> int:
    """Run the command; the exit status: 0, or 1 where it does not fit."""
    try:
        head = chosen_head(args)
        device = chosen_device(args, head)
        work = chosen_work(args, head, device)
    except ValueError as error:
        return refused(str(error), args.json)
    free = device.memory if args.free is None else args.free
    found = {
        "head": head._asdict() | {"dtype": str(head.dtype)},
        "work": work._asdict() | {"dtype": str(work.dtype), "device": str(work.device)},
        "device": device._asdict(),
        "free bytes": free,
        **report(work, device, free, human),
    }
    print(json.dumps(found, indent=1) if args.json else fitted(text(found)))
    return 0 if found["fits"] else 1
