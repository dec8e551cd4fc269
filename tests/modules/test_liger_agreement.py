"""The modules with Liger's signatures against Liger's own classes: signatures, losses, aux values, gradients."""

import inspect

import pytest
import torch
from liger_batches import GRPO, GRPO_IDS, IGNORE, Answers, B, Batch, T, V, compare, grpo_arguments

from fused_po import modules

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
NAMES = ("DPO", "CPO", "SimPO", "ORPO", "KTO", "GRPO")
HOW, OURS_ALONE = {"compiled", "chunk_size"}, {"KTO": {"desirable_weight", "undesirable_weight"}}


def both(name: str, how: dict) -> tuple:
    """(ours, theirs), constructed with the same arguments."""
    ours = getattr(modules, f"FusedLinear{name}Loss")(**how)
    return ours, getattr(chunked_loss, f"LigerFusedLinear{name}Loss")(compiled=False, **how)


def parameters(function) -> dict:
    return {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    """Liger's arguments in its order and with its defaults, except those about how it computes; positions agree."""
    ours, theirs = getattr(modules, f"FusedLinear{name}Loss"), getattr(chunked_loss, f"LigerFusedLinear{name}Loss")
    forward = [list(parameters(cls.forward).items()) for cls in (ours, theirs)]
    assert [(n, p.default) for n, p in forward[0]] == [(n, p.default) for n, p in forward[1]]
    mine, other = parameters(ours.__init__), parameters(theirs.__init__)
    wanted = [n for n in other if n not in HOW]
    assert [n for n in mine if n not in OURS_ALONE.get(name, set())] == wanted
    assert [mine[n].default for n in wanted] == [other[n].default for n in wanted]
    by_place = [n for n, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_place == list(other)[: len(by_place)]


PAIRS = [
    ("DPO", {"beta": 0.3, "compute_nll_loss": True, "alpha": 0.7}, True),
    ("DPO", {"use_ref_model": False, "average_log_prob": True}, True),
    *(
        ("DPO", {"loss_type": name, "label_smoothing": e}, True)
        for name, e in [(n, 0.1 if n in ("exo_pair", "robust") else 0.0) for n in modules.liger.DPO_LOSSES]
    ),
    ("CPO", {"beta": 0.3, "label_smoothing": 0.1, "alpha": 0.7}, False),
    ("CPO", {"compute_nll_loss": False, "average_log_prob": True}, False),
    ("SimPO", {"beta": 2.0, "label_smoothing": 0.1, "gamma": 0.7}, False),
    ("SimPO", {"compute_nll_loss": False}, False),
    ("ORPO", {"beta": 0.3}, False),
    ("ORPO", {"compute_nll_loss": False}, False),
]


@pytest.mark.parametrize("name, how, ref", PAIRS, ids=[f"{p[0]}-{'-'.join(map(str, p[1].values()))}" for p in PAIRS])
def test_pairs(name, how, ref, seed):
    batch = Batch()
    batch.hidden *= 0.3  # log-ratios for which none of Liger's losses overflows
    results, leaves = [], []
    for module in both(name, how):
        hidden, weight, bias = batch.leaves()
        reference = batch.reference() if ref else ()
        results.append(module(weight, hidden, batch.target, bias, *reference))
        leaves.append((hidden, weight, bias))
    compare(*results, tuple(leaves))


def test_orpo_with_nll_labels(seed):
    batch, nll_target = Batch(), torch.randint(0, V, (2 * B, T))
    nll_target[:, 0] = IGNORE
    results, leaves = [], []
    for module in both("ORPO", {}):
        leaves.append(batch.leaves())
        hidden, weight, bias = leaves[-1]
        results.append(module(weight, hidden, batch.target, bias, nll_target))
    compare(*results, tuple(leaves))


@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("use_ref, kl", ((True, 0.4), (False, None)))
def test_kto(use_ref, kl, average, seed):
    batch, good = Batch(5), torch.tensor([True, False, False, True, True])
    z0 = None if kl is None else torch.tensor(kl)
    results, leaves = [], []
    for module in both("KTO", {"beta": 0.3, "use_ref_model": use_ref, "average_log_prob": average}):
        leaves.append(batch.leaves())
        hidden, weight, bias = leaves[-1]
        results.append(module(hidden, weight, batch.target, bias, good, *batch.reference(), z0))
    compare(*results, tuple(leaves))


@pytest.mark.parametrize("weighed", (False, True), ids=("", "weights"))
@pytest.mark.parametrize("name, how", GRPO, ids=GRPO_IDS)
def test_grpo(name, how, weighed, seed):
    """In Liger vespo reads the weights of masked positions, so they are 1 there, and luspo's mean includes padding if
    anything differs between tokens."""
    batch = Answers()
    batch.is_ratio = batch.is_ratio[:, :1] if name == "luspo" else torch.where(batch.mask, batch.is_ratio, 1.0)
    results, leaves = [], []
    for module in both("GRPO", {"loss_type": name, **how}):
        leaves.append(batch.leaves())
        results.append(module(**grpo_arguments(batch, leaves[-1], batch.is_ratio if weighed else None)))
    compare(*results, tuple(leaves))


@pytest.mark.parametrize("name", ("dapo", "cispo"))
def test_grpo_of_a_step(name, seed):
    batch = Answers()
    results, leaves = [], []
    for module in both("GRPO", {"loss_type": name}):
        leaves.append(batch.leaves())
        arguments = grpo_arguments(batch, leaves[-1], None) | {"num_items_in_batch": torch.tensor(60)}
        results.append(module(**arguments))
    compare(*results, tuple(leaves))


def test_known_bug_sigmoid_ignores_label_smoothing(seed):
    """Liger's loss does not change with label_smoothing; ours does."""
    batch = Batch()
    hidden, weight, bias = batch.leaves()
    values = []
    for e in (0.0, 0.2):
        modules_of_e = both("DPO", {"label_smoothing": e})
        values.append([m(weight, hidden, batch.target, bias, *batch.reference())[0].item() for m in modules_of_e])
    (ours, theirs), (ours_smoothed, theirs_smoothed) = values
    assert theirs == theirs_smoothed and ours != ours_smoothed
    assert ours == pytest.approx(theirs, rel=1e-5)
