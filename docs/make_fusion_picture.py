"""docs/fusion.png: the whole [tokens, vocab] matrix of an eager head beside one tile at a time."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREY = "#4c78a8", "#f58518", "#d0d0d0"


def box(axis, x, y, width, height, colour, text, **how):
    axis.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="black", linewidth=0.8, **how))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axis, begin, end):
    axis.annotate("", end, begin, arrowprops={"arrowstyle": "->", "linewidth": 1.2})


figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for axis, title in zip(axes, ("eager: every logit kept, in fp32, and its gradient", "fused_po: one tile at a time")):
    axis.set(xlim=(0, 11), ylim=(-0.6, 6.2), title=title)
    axis.axis("off")
    box(axis, 0, 0.5, 1.1, 4.5, BLUE, "hidden\n[N, H]")
    box(axis, 1.6, 5.2, 5.4, 0.8, BLUE, "LM head$^T$ [H, V]")
    arrow(axis, (1.15, 2.75), (1.55, 2.75))
eager, fused = axes
box(eager, 1.6, 0.5, 5.4, 4.5, ORANGE, "logits [N, V]\n+ fp32 copy\n+ log-softmax\n+ gradient")
arrow(eager, (7.05, 2.75), (7.6, 2.75))
box(eager, 7.7, 0.5, 1.4, 4.5, BLUE, "log-probs\n[N]")
box(fused, 1.6, 0.5, 5.4, 4.5, "white", "")
for i in range(5):
    where = 0.5 + 0.9 * i
    live = i == 3
    box(
        fused,
        1.6,
        where,
        5.4,
        0.9,
        ORANGE if live else "white",
        "tile [n, V]" if live else "",
        alpha=1 if live else 0.35,
    )
arrow(fused, (7.05, 3.65), (7.6, 3.65))
box(fused, 7.7, 0.5, 1.4, 4.5, BLUE, "log-probs\nentropy\n[N]")
box(fused, 9.45, 0.5, 1.5, 4.5, BLUE, "sequences\n↓\nDPO loss\nrewards\nKL")
arrow(fused, (9.15, 2.75), (9.4, 2.75))
fused.text(4.3, 0, "GEMM → one read for the statistics → the next tile", ha="center", fontsize=9)
eager.text(4.3, 0, "several passes over all N V numbers", ha="center", fontsize=9)
figure.savefig(Path(__file__).with_name("fusion.png"), dpi=130)
