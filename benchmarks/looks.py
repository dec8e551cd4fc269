"""How the charts draw each provider: one colour per family, one marker and line style per member.

A provider looks the same in every panel and chart. The colours are those of Okabe and Ito, which people with any colour
vision can distinguish, and grey and brown. A new provider needs an entry here.
"""

from __future__ import annotations

from typing import NamedTuple

OURS = "#0072B2"
SKY, GREEN, ORANGE, YELLOW, RED, PURPLE, BLACK = (
    "#56B4E9", "#009E73", "#E69F00", "#F0E442", "#D55E00", "#CC79A7", "#000000",
)  # fmt: skip
GREY, BROWN = "#999999", "#7F3C8D"


class Look(NamedTuple):
    """Keyword arguments of matplotlib's `plot`."""

    color: str
    marker: str
    linestyle: str
    linewidth: float = 1.3


# Only fused_po has this colour.
LOOKS = {
    "fused_po": Look(OURS, "o", "-", 3),
    "fused_po, all kept": Look(SKY, "^", "--"),
    "fused_po, none kept": Look(SKY, "v", ":"),
    "fused_po, bf16 tiles": Look(SKY, "s", "-."),
    "fused_po, with log-probs": Look(SKY, "D", "-"),
    "bare GEMMs": Look(GREY, "x", "--"),
    "eager": Look(BLACK, "s", "-"),
    "torch.compile": Look(GREY, "^", "-."),
    "F.linear_cross_entropy": Look(BLACK, "v", ":"),
    "TRL": Look(RED, "o", "-"),
    "Liger": Look(GREEN, "s", "-"),
    "Liger, scaled CE": Look(GREEN, "^", "--"),
    "Liger, cross entropy": Look(GREEN, "v", ":"),
    "Liger, Triton": Look(GREEN, "D", "-."),
    "unsloth": Look(PURPLE, "o", "-"),
    "unsloth, cross entropy": Look(PURPLE, "v", ":"),
    "cut-cross-entropy": Look(ORANGE, "s", "-"),
    "cut-cross-entropy, exact": Look(ORANGE, "^", "--"),
    "verl": Look(YELLOW, "D", "-"),
    "quack": Look(BROWN, "P", "-."),
}
UNKNOWN = Look(GREY, "*", ":")  # for a provider in an older file that no longer exists


def look(name: str) -> dict:
    """The keyword arguments for a provider's curve; fused_po is drawn above the others."""
    found = LOOKS.get(name, UNKNOWN)
    return found._asdict() | {"zorder": 3 if found.color == OURS else 2}
