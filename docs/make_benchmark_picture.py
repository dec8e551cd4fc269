"""Draws docs/benchmark.png, the chart of README.md, from the committed CPU results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from looks import look  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "head.json"
TOKENS, VOCABULARY = 2048, 32000
NAMES = {  # as in the results: as in the chart
    "fused_po": "fused_po",
    "fused_po, none kept": "fused_po,\nlogits_budget=0",
    "torch.compile": "torch.compile",
    "eager": "eager",
    "F.linear_cross_entropy": "F.linear_cross_entropy",
    "TRL": "TRL 1.16",
}
SHADES = {"trainable": 1.0, "frozen": 0.45}


def figures() -> dict[str, dict[str, tuple[float, float]]]:
    """(seconds, peak bytes) of forward and backward, by provider and by head; ValueError if a case is missing."""
    found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in NAMES}
    for benchmark in json.loads(RESULTS.read_text(encoding="utf-8"))["benchmarks"]:
        case = benchmark["extra_info"].get("case", {})
        if case.get("tokens") != TOKENS or case.get("vocabulary") != VOCABULARY:
            continue
        for name, report in benchmark["extra_info"]["providers"].items():
            if name in NAMES and "seconds" in report:
                found[name][case["head"]] = report["seconds"]["forward+backward"], report["peak bytes"]
    if not all(found.values()):
        raise ValueError(f"{RESULTS}: holds no case of {TOKENS} tokens for {[n for n, v in found.items() if not v]}")
    return found


def draw(path: Path) -> None:
    """Two panels of horizontal bars: time and peak memory, a trainable and a frozen head for each provider."""
    found = figures()
    plots = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for plot, index, scale, unit, title in zip(
        plots[1], (0, 1), (1, 1e6), ("{:.2f} s", "{:.0f} MB"), ("time, forward + backward", "peak memory beyond inputs")
    ):
        for row, name in enumerate(NAMES):
            for head, shift in (("trainable", -0.2), ("frozen", 0.2)):
                if head in found[name]:
                    value = found[name][head][index] / scale
                    plot.barh(row + shift, value, 0.38, color=look(name)["color"], alpha=SHADES[head])
                    plot.annotate(unit.format(value), (value, row + shift), (3, 0), textcoords="offset points",
                                  va="center", fontsize=8)  # fmt: skip
        plot.set_title(title, fontsize=10)
        plot.set_yticks(range(len(NAMES)), NAMES.values(), fontsize=9)
        plot.margins(x=0.16)
        plot.spines[["top", "right"]].set_visible(False)
    plots[1][0].invert_yaxis()
    bars = [plt.Rectangle((0, 0), 1, 1, color="#444444", alpha=SHADES[head]) for head in SHADES]
    plots[0].legend(bars, ["trainable head", "frozen head"], loc="outside lower center", ncols=2, frameon=False)
    title = f"{TOKENS} tokens, vocabulary {VOCABULARY}, width 896, fp32, 2 CPU cores. Shorter is better."
    plots[0].suptitle(title, fontsize=10)
    plots[0].savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("benchmark.png"))
