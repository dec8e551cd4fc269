"""Rows of the losses of single answers."""

from __future__ import annotations

from functools import partial
from math import exp, log1p

import torch

from fused_po import losses

from .row import F64, Row

GOOD = torch.tensor([True, False])  # by hand: r = -1 - -2 = 1 for a desirable answer, r = -3 - -3.5 = 0.5 for the other
BY_HAND = ([-1.0, -3.0], [-2.0, -3.5], GOOD)
MIXED = torch.tensor([True, False, False, True, True])
KTO_PEERS = "TRL agrees, as did OpenRLHF's KTOLoss till 2026; Liger has no weights"


def s(x):
    return 1 / (1 + torch.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def answers(*more):
    return lambda: [torch.randn(5, dtype=F64), torch.randn(5, dtype=F64), MIXED, *(draw() for draw in more)]


def scalar():
    return torch.rand((), dtype=F64)


def apart(*more):
    """fp32 answers, one desirable and one not; the policy is `distance` above the reference."""
    return lambda distance: [torch.full((2,), -2e4 + distance), torch.full((2,), -2e4), GOOD, *map(torch.tensor, more)]


def kto_oracle(weights, beta):
    """The paper's formula, one class after the other."""

    def oracle(logps, ref, desirable, kl=0.0):
        ratio = logps - ref
        good, bad = weights[0] * (1 - s(beta * (ratio - kl))), weights[1] * (1 - s(beta * (kl - ratio)))
        return torch.stack([g if d else b for g, b, d in zip(good, bad, desirable)])

    return oracle


def bco_oracle(logps, ref, desirable, delta, weights=None):
    reward = 0.5 * (logps - ref) - delta
    terms = [-s(x if d else -x).log() for x, d in zip(reward, desirable)]
    return torch.stack(terms) * (1 if weights is None else weights)


WEIGHTS = dict(desirable_weight=2.0, undesirable_weight=3.0)
ROWS = [
    Row(
        "kto", "", partial(losses.kto, beta=0.5), kto_oracle((1, 1), 0.5), (*BY_HAND, 0.25),
        [1 - sigmoid(0.375), 1 - sigmoid(-0.125)],  # 0.5 (1 - 0.25), 0.5 (0.25 - 0.5)
        answers(scalar), (0,), apart(0.5), KTO_PEERS,
    ),
    Row(
        "kto", "weights", partial(losses.kto, beta=0.5, **WEIGHTS), kto_oracle((2, 3), 0.5), (*BY_HAND, 0.25),
        [2 * (1 - sigmoid(0.375)), 3 * (1 - sigmoid(-0.125))],
        answers(scalar), (0,), apart(0.5), KTO_PEERS,
    ),
    Row(
        "kto", "apo_zero_unpaired", partial(losses.kto, beta=0.5, loss_type="apo_zero_unpaired", **WEIGHTS),
        kto_oracle((2, 3), 0.5), BY_HAND,
        [2 * (1 - sigmoid(0.5)), 3 * sigmoid(0.25)],  # 0.5 * 1, 0.5 * 0.5
        answers(), (0,), apart(), "TRL agrees; OpenRLHF and Liger have none",
    ),
    Row(
        "apo_zero_unpaired", "", partial(losses.apo_zero_unpaired, beta=0.5, **WEIGHTS),
        kto_oracle((2, 3), 0.5), BY_HAND,
        [2 * (1 - sigmoid(0.5)), 3 * sigmoid(0.25)],
        answers(), (0,), apart(), "TRL agrees; OpenRLHF and Liger have none",
    ),
    Row(
        "bco", "", partial(losses.bco, beta=0.5), bco_oracle, (*BY_HAND, 0.25),
        [log1p(exp(-0.25)), log1p(exp(0.0))],  # -log s(0.5 - 0.25), -log s(-(0.25 - 0.25))
        answers(scalar), (0,), apart(0.5), "TRL's BCOTrainer (removed by 1.16) agrees; OpenRLHF and Liger have none",
    ),
    Row(
        "bco", "weights", lambda *a: losses.bco(*a[:4], beta=0.5, weights=a[4]), bco_oracle,
        (*BY_HAND, 0.25, [1.0, 4.0]),
        [log1p(exp(-0.25)), 4 * log1p(exp(0.0))],
        answers(scalar, lambda: torch.rand(5, dtype=F64)), (0,), apart(0.5, [1.0, 4.0]),
        "TRL's BCOTrainer (removed by 1.16) agrees; OpenRLHF and Liger have none",
    ),
]  # fmt: skip
