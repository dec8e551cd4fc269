"""Rows of the losses of reward models."""

from __future__ import annotations

from functools import partial
from math import exp, log, log1p

import torch

from fused_po import losses

from .row import F64, Row


def logistic(x):
    """log(1 + e^-x), written out."""
    return (1 + torch.exp(-x)).log()


def two():
    return [torch.randn(4, dtype=F64) for _ in range(2)]


def apart(distance: float) -> list:
    return [torch.tensor([distance]), torch.tensor([0.0])]


def ranking(rewards, mask=None):
    """Plackett-Luce, one list and one choice at a time."""
    total = []
    for i, row in enumerate(rewards):
        left = [r for j, r in enumerate(row) if mask is None or mask[i, j]]
        total.append(sum((torch.stack(left[k:]).logsumexp(0) - left[k] for k in range(len(left))), row.sum() * 0))
    return torch.stack(total)


RAGGED = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])
HOLES = torch.tensor([[False, True, True, False], [True, False, True, True], [False, False, False, False]])


def lists(mask=None):
    rewards = torch.randn(3, 4, dtype=F64)
    return [rewards] if mask is None else [rewards, mask]


ROWS = [
    Row(
        "bradley_terry", "", losses.bradley_terry, lambda c, r: logistic(c - r), (1.0, 0.5),
        log1p(exp(-0.5)),  # -log s(1 - 0.5)
        two, (0, 1), apart, "TRL, OpenRLHF's PairWiseLoss agree; OpenRLHF's LogExpLoss overflows in fp32 from 89 on",
    ),
    Row(
        "bradley_terry", "margin, centred", partial(losses.bradley_terry, margin=0.75, centering=0.1),
        lambda c, r: logistic(c - r - 0.75) + 0.1 * (c + r) ** 2, (1.0, 0.5),
        log1p(exp(0.25)) + 0.1 * 1.5**2,  # -log s(1 - 0.5 - 0.75) + 0.1 (1 + 0.5)^2
        two, (0, 1), apart, "TRL agrees; OpenRLHF has no centring, and its LogExpLoss takes a margin without using it",
    ),
    Row(
        "bradley_terry", "margin per pair", lambda c, r, m: losses.bradley_terry(c, r, margin=m),
        lambda c, r, m: logistic(c - r - m), (1.0, 0.5, 2.0),
        log1p(exp(1.5)),  # -log s(1 - 0.5 - 2)
        lambda: [*two(), torch.rand(4, dtype=F64)], (0, 1), lambda d: [*apart(d), torch.tensor([1.0])],
        "TRL, OpenRLHF's PairWiseLoss agree",
    ),
    Row(
        "plackett_luce", "", losses.plackett_luce, ranking, ([[log(2), log(1), log(3)]],),
        -log(2 / 6 * 1 / 4),  # strengths 2, 1, 3: 2 of 6 for the first place, 1 of the 4 left for the second
        lists, (0,), lambda d: [torch.tensor([[d, 0.0, -d], [0.0, d, d]])], "none has it",
    ),
    Row(
        "plackett_luce", "ragged", losses.plackett_luce, ranking,
        ([[log(2), log(3), 7.0]], torch.tensor([[True, True, False]])),
        -log(2 / 5),
        partial(lists, RAGGED), (0,), lambda d: [torch.tensor([[d, -d, 0.0, 0.0]] * 3), RAGGED], "none has it",
    ),
    Row(
        "plackett_luce", "gaps", losses.plackett_luce, ranking,
        ([[log(2), 7.0, log(3)]], torch.tensor([[True, False, True]])),
        -log(2 / 5),
        partial(lists, HOLES), (0,), lambda d: [torch.tensor([[d, -d, 0.0, 0.0]] * 3), HOLES], "none has it",
    ),
]  # fmt: skip
