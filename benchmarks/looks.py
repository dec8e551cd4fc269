"""How the charts draw each provider: a colour for a family, a marker and a line style for each of its members.

A look belongs to a name, so a provider looks the same in every panel and chart. The colours are those of Okabe and Ito,
which people with any colour vision can distinguish, a grey and a brown. A new provider needs an entry here.
"""

from __future__ import annotations

from typing import NamedTuple

OURS = "#0072B2"
SKY, GREEN, ORANGE, YELLOW, RED, PURPLE, BLACK = (
    "#56B4E9", "#009E73", "#E69F00", "#F0E442", "#D55E00", "#CC79A7", "#000000",
)  # fmt: skip
GREY, BROWN = "#999999", "#7F3C8D"


class Look(NamedTuple):
    """What matplotlib's `plot` takes."""

    color: str
    marker: str
    linestyle: str
    linewidth: float = 1.3


# fused_po alone has its colour.
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
UNKNOWN = Look(GREY, "*", ":")  # a name that no provider of today has, in an older file


def look(name: str) -> dict:
    """The keyword arguments for a provider's curve; fused_po lies over the others."""
    found = LOOKS.get(name, UNKNOWN)
    return found._asdict() | {"zorder": 3 if found.color == OURS else 2}
