"""The Markdown tables of `benchmarks/aot.py`: Triton kernels, and CUDA kernels."""

from __future__ import annotations

import aot_model as model


def cell(row: dict, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if name == "share":
        return ", ".join(f"{gpu} {part:.2f}" for gpu, part in value.items())
    if name == "in_flight":
        needs = max(gpu.needs for gpu in model.GPUS.values() if gpu.arch == row["arch"])
        return f"{value / 1024:.0f} KB, {value / needs:.1f} x"
    return str(value)


def report(rows: list[dict]) -> str:
    """A Markdown table of the rows with figures; for a target without figures, how many kernels compile."""
    lines = []
    counted = [row for row in rows if "registers" in row]
    if counted:
        names = [name for name in max(counted, key=len) if name != "compiles"]
        lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(cell(row, name) for name in names) + " |" for row in counted]
        lines.append("")
    for arch in dict.fromkeys(row["arch"] for row in rows):
        mine = [row for row in rows if row["arch"] == arch]
        good = sum(row["compiles"] is True for row in mine)
        lines.append(f"{arch}: {good} of {len(mine)} compiled and linked" + (", none run." if good else "."))
        lines += [
            f"- {row['kernel']}, {row['dtype']}: {row['compiles']}" for row in mine if row["compiles"] is not True
        ]
    return "\n".join(lines)


def report_cuda(rows: list[dict]) -> str:
    """A Markdown table with one line per CUDA kernel and type: registers by architecture, spilled bytes in all."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    lines = ["| CUDA kernel | dtype | registers, " + ", ".join(archs) + " | bytes spilled |", "|---|---|---|---|"]
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
        registers = ", ".join(str(row["registers"]) for arch in archs for row in mine if row["arch"] == arch)
        lines.append(f"| {kernel} | {dtype} | {registers} | {sum(row['spills'] for row in mine)} |")
    return "\n".join(lines)
