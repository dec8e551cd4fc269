"""Draws docs/fusion.png: what of [tokens, vocab] is in memory, eager and fused."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

BLUE, ORANGE, YELLOW = "#9ec3e6", "#f58518", "#ffd69c"
LEFT, WIDTH, BOTTOM, HEIGHT, TILES = 1.7, 4.6, 0.9, 4.5, 5  # of the [N, V] area
PANELS = {
    "eager PyTorch": ("all logits in memory at once,\nand several matrices of their size", None, False),
    "fused_po, no gradient or frozen head": (
        "one tile at a time; kept for the backward:\n[N, H] with a frozen head, nothing of [N, V]",
        2,
        False,
    ),
    "fused_po, trainable head": (
        "one tile at a time; the basis is kept up to\nSchedule.logits_budget (0 keeps nothing)",
        3,
        True,
    ),
}


def box(axis: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", **how) -> None:
    axis.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="black", linewidth=0.8, **how))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axis: Axes, x: float) -> None:
    axis.annotate("", (x + 0.45, 3.15), (x, 3.15), arrowprops={"arrowstyle": "->", "linewidth": 1.2})


def panel(axis: Axes, title: str, caption: str, tile: int | None, leaves_basis: bool) -> None:
    """tile: the number of the tile at work; None draws the eager head."""
    axis.set(xlim=(0, 8.3), ylim=(-0.5, 6.5))
    axis.set_title(title, fontsize=11)
    axis.axis("off")
    box(axis, 0.1, BOTTOM, 1.0, HEIGHT, BLUE, "hidden\n[N, H]")
    box(axis, LEFT, 5.65, WIDTH, 0.7, BLUE, "LM head [V, H], transposed")
    arrow(axis, 1.18)
    if tile is None:
        box(
            axis,
            LEFT,
            BOTTOM,
            WIDTH,
            HEIGHT,
            ORANGE,
            "logits [N, V]\nlog-softmax [N, V]\ngradient [N, V]",
        )
    else:
        rows = HEIGHT / TILES
        for number in range(TILES):
            where = BOTTOM + HEIGHT - (number + 1) * rows
            if number == tile:
                box(axis, LEFT, where, WIDTH, rows, ORANGE, "tile of logits [n, V], fp32")
            elif number < tile and leaves_basis:
                box(axis, LEFT, where, WIDTH, rows, YELLOW, "basis, kept for the backward")
            else:
                box(axis, LEFT, where, WIDTH, rows, "white", linestyle=":")
    arrow(axis, LEFT + WIDTH + 0.08)
    text = "log-probs\n[N]" if tile is None else "log-probs\nentropy\n...\n[N]"
    box(axis, LEFT + WIDTH + 0.6, BOTTOM, 1.25, HEIGHT, BLUE, text)
    axis.text(LEFT + WIDTH / 2, 0.15, caption, ha="center", va="center", fontsize=9)


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axis, (title, arguments) in zip(axes, PANELS.items()):
        panel(axis, title, *arguments)
    figure.savefig(Path(__file__).with_name("fusion.png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
