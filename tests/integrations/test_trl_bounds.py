"""The bound on training with TRL's trainers is tight: it finds every small fault that is planted in our op."""

import functools

import pytest
import torch
from numerics import RUNS
from tiny_trl import assert_equal_runs, nudged, train, true_run
from trl_trainers import dpo, grpo, sft

from fused_po.integrations.trl import patched
from fused_po.integrations.trl.scoring import Scoring


class Times(torch.autograd.Function):
    """The identity, with the gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def without_one(targets):
    targets = targets.clone()
    targets[len(targets) // 2] = -100
    return targets


# For each fault the argument of `Scoring.apply` that it changes, and the change.
FAULTS = {
    "sign of the hidden states' gradient": ("hidden", lambda x: Times.apply(x, -1)),
    "factor 1.001 of the hidden states' gradient": ("hidden", lambda x: Times.apply(x, 1.001)),
    "sign of the head's gradient": ("weight", lambda x: Times.apply(x, -1)),
    "factor 1.001 of the head's gradient": ("weight", lambda x: Times.apply(x, 1.001)),
    "a dropped token": ("targets", without_one),
    "a temperature off by 0.1%": ("temperature", lambda x: x * 1.001),
}
PLACES = ("hidden", "weight", "bias", "targets", "temperature")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """found(trainer): (make, stock runs, exact run)."""

    @functools.cache
    def once(trainer):
        make = trainer(tmp_path_factory.mktemp(trainer.__name__))
        return make, [train(nudged(make, seed)) for seed in range(RUNS)], true_run(make)

    return once


def check(make, stock, truth) -> None:
    with patched():
        ours = train(make(torch.float32))
    assert_equal_runs([(run, truth) for run in stock], ours, truth)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("trainer", [sft, dpo, grpo], ids=lambda f: f.__name__)
def test_planted_faults_are_found(trainer, fault, found, monkeypatch):
    name, change = FAULTS[fault]
    right = Scoring.apply

    def wrong(self, *args):
        args = [change(x) if place == name else x for place, x in zip(PLACES, args)] + list(args[len(PLACES) :])
        return right(self, *args)

    monkeypatch.setattr(Scoring, "apply", wrong)
    with pytest.raises(AssertionError, match=r"off by .*, allowed"):
        check(*found(trainer))


@pytest.mark.parametrize("trainer", [sft, dpo, grpo], ids=lambda f: f.__name__)
def test_nothing_is_found_without_a_fault(trainer, found):
    check(*found(trainer))
