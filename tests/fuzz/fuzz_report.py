"""Turn the output of a long run of tests/fuzz into a picture and a table: `make fuzz`.

    python tests/fuzz/fuzz_report.py runs/fuzz -o runs/fuzz

Exit status 1 if a case failed; then no report is written.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BOUND = 2.0  # in units of plain PyTorch's error
ORDER = (
    "logps_from_logits",
    "linear_logps",
    "chunked_loss",
    "kl_from_logits",
    "linear_kl",
    "dpo_from_logits",
    "linear_dpo",
    "sequence_logps",
    "aggregate",
    "gae",
    "losses",
)
FAR = "losses, far from the reference"  # only checked to be finite: there is no ratio


def read(folder: Path) -> tuple[dict[str, list[float]], list[str], set[int]]:
    """(ratios by op, failures, seeds) from all files."""
    ratios, failed, seeds = defaultdict(list), [], set()
    for path in sorted(folder.glob("check_*.json")):
        found = json.loads(path.read_text())
        failed += found["failed"]
        seeds.add(found["seed"])
        for op, values in found["ratios"].items():
            ratios[op] += values
    return ratios, failed, seeds


def table(ratios: dict[str, list[float]]) -> str:
    lines = ["| op | cases | within rounding alone | median | 99 % | largest |", "|---|---|---|---|---|---|"]
    for op in ORDER:
        values = np.array(ratios[op])
        exact = f"{100 * np.mean(values == 0):.0f} %"
        quantiles = " | ".join(f"{q:.2f}" for q in (np.median(values), np.quantile(values, 0.99), values.max()))
        lines.append(f"| `{op}` | {len(values)} | {exact} | {quantiles} |")
    every = np.concatenate([ratios[op] for op in ORDER])
    lines.append(
        f"| all | {len(every)} | {100 * np.mean(every == 0):.0f} % | {np.median(every):.2f} | "
        f"{np.quantile(every, 0.99):.2f} | {every.max():.2f} |"
    )
    lines.append(f"| {FAR}: finite | {len(ratios[FAR])} | | | | |")
    return "\n".join(lines)


def draw(ratios: dict[str, list[float]], path: Path) -> None:
    """One histogram per op: the number of cases by their distance from the bound."""
    figure, axes = plt.subplots(3, 4, figsize=(12, 7.5), sharex=True, layout="constrained")
    bins = np.linspace(0, 2.4, 49)
    for axis, op in zip(axes.flat, (*ORDER, "all")):
        values = np.concatenate([ratios[name] for name in ORDER]) if op == "all" else np.array(ratios[op])
        axis.hist(values, bins, color="#0072b2")
        axis.axvline(1, color="grey", linewidth=1, linestyle="--")
        axis.axvline(BOUND, color="#d55e00", linewidth=2)
        axis.set(yscale="log", ylim=(0.5, None))
        axis.set_title(f"{op}\n{len(values)} cases, largest {values.max():.2f}", fontsize=10)
    figure.supxlabel("largest error of ours, less the result's rounding / plain PyTorch's, same dtype, against float64")
    figure.supylabel("cases")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where FUSED_PO_FUZZ_OUT pointed")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where counts.md and errors.png go")
    args = parser.parse_args()
    ratios, failed, seeds = read(args.folder)
    missing = [op for op in (*ORDER, FAR) if op not in ratios]
    if failed or missing:
        raise SystemExit("\n".join([f"{len(failed)} cases failed, of {missing} there are none:", *failed]))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(ratios, args.out / "errors.png")
    total = sum(map(len, ratios.values()))
    said = f"{total} cases, none failed; FUSED_PO_SEED={', '.join(map(str, sorted(seeds)))}.\n\n{table(ratios)}\n"
    (args.out / "counts.md").write_text(said)
    print(said)


if __name__ == "__main__":
    main()
