"""Unpaired losses beyond their rows in the zoo: TRL and Liger, the reference point, BCO's shift, metrics."""

import ast
import math
from types import SimpleNamespace

import pytest
import torch
from trl_source import execute, function, trainer

import fused_po
from fused_po import losses

GOOD = torch.tensor([True, False, True, True, False, False, True])


def answers():
    """(logps that require grad, ref_logps) of the seven answers."""
    return torch.randn(7).requires_grad_(), torch.randn(7)


def of_trl(logps, ref, good, kl, loss_type, weights, beta):
    """TRL's KTO losses of a batch, by its own code from `if chosen_logps.shape[0] != 0 ...` on."""
    body = function(trainer("trainer/kto_trainer.py"), "_compute_loss").body
    sources = [ast.unparse(node) for node in body]
    start = next(i for i, code in enumerate(sources) if code.startswith("if chosen_logps.shape[0]"))
    end = next(i for i, code in enumerate(sources) if code.startswith("losses = torch.cat"))
    settings = dict(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1], loss_type=loss_type)
    names = {
        "chosen_logps": logps[good],
        "rejected_logps": logps[~good],
        "ref_chosen_logps": ref[good],
        "ref_rejected_logps": ref[~good],
    }
    return execute(body[start : end + 1], self=SimpleNamespace(**settings), kl=kl, **names)


@pytest.mark.parametrize("loss_type", ("kto", "apo_zero_unpaired"))
def test_against_trls_kto_trainer(loss_type, seed):
    logps, ref = answers()
    kl = torch.rand(())
    theirs = of_trl(logps, ref, GOOD, kl, loss_type, (1.5, 0.5), 0.3)
    ours = losses.kto(
        logps,
        ref,
        GOOD,
        kl if loss_type == "kto" else None,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        loss_type=loss_type,
    )
    torch.testing.assert_close(torch.cat([ours[GOOD], ours[~GOOD]]), theirs.losses)
    gradients = [torch.autograd.grad(loss.mean(), logps, retain_graph=True)[0] for loss in (ours, theirs.losses)]
    torch.testing.assert_close(*gradients)
    metrics = losses.unpaired_metrics(logps, ref, GOOD, beta=0.3, kl=kl)
    torch.testing.assert_close(metrics["rewards/chosen"], theirs.chosen_rewards.mean())
    torch.testing.assert_close(metrics["rewards/rejected"], theirs.rejected_rewards.mean())


def test_against_ligers_kto(seed):
    """Without class weights, which Liger does not have."""
    kto_loss = pytest.importorskip("liger_kernel.chunked_loss.kto_loss")
    logps, ref = answers()
    kl = torch.rand(())
    theirs, chosen, rejected = kto_loss.LigerFusedLinearKTOFunction.preference_loss_fn(
        logps, GOOD, torch.zeros(7, 3), ref, beta=0.3, kl=kl
    )
    ours = losses.kto(logps, ref, GOOD, kl, beta=0.3).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (ours, theirs)))
    metrics = losses.unpaired_metrics(logps, ref, GOOD, beta=0.3)
    torch.testing.assert_close(metrics["rewards/chosen"] * metrics["count/chosen"], chosen)
    torch.testing.assert_close(metrics["rewards/rejected"] * metrics["count/rejected"], rejected)


@pytest.mark.parametrize("how", ({"kl": 0.2}, {"loss_type": "apo_zero_unpaired"}), ids=("kto", "apo"))
def test_bug_of_peers_class_weights_dropped(how, seed):
    """The losses and gradients of each class are its weight times the unweighted ones."""
    logps, ref = answers()
    plain = losses.kto(logps, ref, GOOD, **how)
    weighted = losses.kto(logps, ref, GOOD, **how, desirable_weight=3.0, undesirable_weight=0.25)
    expected = torch.where(GOOD, 3.0, 0.25)
    torch.testing.assert_close(weighted, expected * plain)
    slopes = [torch.autograd.grad(loss.sum(), logps, retain_graph=True)[0] for loss in (plain, weighted)]
    torch.testing.assert_close(slopes[1], expected * slopes[0])


def test_the_reference_point():
    kl_logps, ref = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.5, 0.5])
    z0 = losses.kto_kl(kl_logps, ref)
    assert z0.item() == 1.5 and z0.shape == () and not z0.requires_grad  # mean of 0.5 and 2.5
    assert losses.kto_kl(ref, kl_logps).item() == 0.0
    assert losses.kto_kl(ref, kl_logps, clamp=False).item() == -1.5
    assert losses.kto_kl(torch.zeros(0), torch.zeros(0)).item() == 0.0


def test_reference_point_by_answer_scalar_and_number_agree(seed):
    logps, ref = answers()
    shapes = (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.full((7,), 0.5), torch.tensor(0.5, requires_grad=True))
    values = [losses.kto(logps, ref, GOOD, kl) for kl in shapes]
    for value in values[1:]:
        assert torch.equal(value, values[0])


def test_no_reference_equals_a_reference_of_zero(seed):
    logps, _ = answers()
    zero = torch.zeros(7)
    assert torch.equal(losses.kto(logps, None, GOOD, 0.1), losses.kto(logps, zero, GOOD, 0.1))
    assert torch.equal(losses.bco(logps, None, GOOD, 0.1), losses.bco(logps, zero, GOOD, 0.1))


def test_bco_without_a_shift_is_bco_pair(seed):
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 5)
    both = losses.bco(
        torch.cat([chosen, rejected]), torch.cat([ref_chosen, ref_rejected]), torch.arange(10) < 5, 0.0, beta=0.3
    )
    pairs = losses.bco_pair(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    torch.testing.assert_close(both[:5] + both[5:], pairs)


def test_udm_weights_by_hand():
    p = torch.tensor([0.5, 0.75, 0.1, 1.0, 0.0])  # p / (1 - p) = 1, 3, 1/9, inf, 0, clamped to [0.5, 10]
    torch.testing.assert_close(losses.udm_weights(p), torch.tensor([1.0, 3.0, 0.5, 10.0, 0.5]))
    loose = losses.udm_weights(p, min_ratio=0.0, max_ratio=1e6)
    torch.testing.assert_close(loose, torch.tensor([1.0, 3.0, 1 / 9, 1e6, 0.0]))
    good = torch.tensor([True, False, True, False, True])
    torch.testing.assert_close(losses.udm_weights(p, good), torch.tensor([1.0, 3.0, 1.0, 10.0, 1.0]))


def test_running_mean_is_the_mean_of_all(seed):
    batches = [torch.randn(n, requires_grad=True) for n in (3, 1, 0, 8)]
    running = losses.RunningMean()
    assert running.mean.item() == 0.0
    for i, batch in enumerate(batches):
        mean = running.update(batch)
        expected = torch.cat(batches[: i + 1]).double().mean()
        torch.testing.assert_close(mean, expected.detach(), rtol=1e-12, atol=1e-12)
        assert not mean.requires_grad
        if i == 1:  # continues from a checkpoint
            saved = running.state_dict()
            running = losses.RunningMean()
            running.load_state_dict(saved)
    assert running.count == 12 and running.mean.dtype == torch.float64


def test_running_mean_does_not_change_its_saved_state():
    running = losses.RunningMean()
    running.update(torch.tensor([1.0]))
    saved = running.state_dict()
    running.update(torch.tensor([3.0]))
    assert saved["mean"].item() == 1.0 and running.mean.item() == 2.0


def test_metrics_by_hand():
    logps, ref = torch.tensor([1.0, 2.0, 4.0], requires_grad=True), torch.tensor([0.0, 4.0, 1.0])
    metrics = losses.unpaired_metrics(logps, ref, torch.tensor([True, False, True]), beta=0.5, kl=torch.tensor([0.25]))
    expected = {
        "rewards/chosen": 1.0,
        "rewards/rejected": -1.0,
        "rewards/margins": 2.0,  # 0.5 (1 + 3) / 2, 0.5 (-2)
        "logps/chosen": 2.5,
        "logps/rejected": 2.0,
        "count/chosen": 2,
        "count/rejected": 1,
        "kl": 0.25,
    }
    assert {name: value.item() for name, value in metrics.items()} == expected
    assert not any(value.requires_grad or value.ndim for value in metrics.values())


@pytest.mark.parametrize("good", (True, False))
def test_metrics_of_a_single_class(good):
    metrics = losses.unpaired_metrics(torch.ones(2), torch.zeros(2), torch.tensor([good, good]), beta=1.0)
    absent = "rejected" if good else "chosen"
    assert metrics[f"rewards/{absent}"] == metrics[f"logps/{absent}"] == metrics[f"count/{absent}"] == 0
    assert metrics["rewards/margins"] == 0 and metrics["rewards/chosen" if good else "rewards/rejected"] == 1


def test_metric_names_are_trls():
    """Every metric that TRL's KTO trainer logs is in ours or in token_metrics, except those that no loss knows."""
    source = trainer("trainer/kto_trainer.py").read_text()
    appended = {node.slice.value for node in ast.walk(ast.parse(source)) if _is_metric(node)}
    ours = {*losses.unpaired_metrics(torch.zeros(1), None, torch.tensor([True]), kl=torch.zeros(()))}
    others = {"entropy", "num_tokens", "logits/chosen", "logits/rejected", "aux_loss"}
    assert appended - others == ours - {"count/chosen", "count/rejected"}


def _is_metric(node) -> bool:
    """self._metrics[mode]["name"]"""
    named = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    return named and ast.unparse(node.value) == "self._metrics[mode]"


LOGPS, TWO = torch.zeros(2), torch.tensor([True, False])
BAD = [
    (lambda: losses.kto(LOGPS, LOGPS, TWO), ValueError, 'kl: got None, but loss_type="kto" needs it'),
    (lambda: losses.kto(LOGPS, LOGPS, TWO, 0.1, loss_type="apo_zero_unpaired"), ValueError, "kl: not used with"),
    (lambda: losses.kto(LOGPS, LOGPS, TWO, math.nan), ValueError, "kl: got nan"),
    (lambda: losses.kto(LOGPS, LOGPS, TWO, torch.zeros(3)), ValueError, "kl: got shape"),
    (lambda: losses.kto(LOGPS, LOGPS, TWO.int(), 0.1), TypeError, "desirable: got dtype torch.int32"),
    (lambda: losses.kto(LOGPS, LOGPS, TWO[:1], 0.1), ValueError, "desirable: got shape"),
    (lambda: losses.kto(LOGPS, LOGPS[:1], TWO, 0.1), ValueError, "ref_logps: got shape"),
    (lambda: losses.kto(LOGPS, LOGPS, TWO, 0.1, beta=0.0), ValueError, "beta: got 0.0"),
    (lambda: losses.kto(LOGPS, LOGPS, TWO, 0.1, desirable_weight=-1), ValueError, "desirable_weight: got -1"),
    (
        lambda: losses.kto(LOGPS, LOGPS, TWO, 0.1, undesirable_weight=math.inf),
        ValueError,
        "undesirable_weight: got inf",
    ),
    (lambda: losses.kto(LOGPS, LOGPS, TWO, loss_type="apo_zero"), ValueError, "did you mean 'apo_zero_unpaired'"),
    (lambda: losses.kto_kl(LOGPS, LOGPS[:1]), ValueError, "ref_kl_logps: got shape"),
    (lambda: losses.bco(LOGPS, LOGPS, TWO, torch.zeros(3)), ValueError, "delta: got shape"),
    (lambda: losses.bco(LOGPS, LOGPS, TWO, 0.0, weights=torch.ones(3)), ValueError, "weights: got shape"),
    (lambda: losses.udm_weights(torch.tensor([1.5])), ValueError, "prob_desirable: got values from 1.5"),
    (lambda: losses.udm_weights(torch.tensor([math.nan])), ValueError, "prob_desirable: got values from nan"),
    (lambda: losses.udm_weights(LOGPS, max_ratio=0.1), ValueError, "max_ratio: got 0.1"),
    (lambda: losses.RunningMean().update(torch.tensor([math.inf])), ValueError, "rewards: got inf"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[f"{i}-{row[2][:25]}" for i, row in enumerate(BAD)])
def test_bad_call(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_sum_of_differences_keeps_the_digits_of_long_answers(seed):
    """As docs/losses.md says: two fp32 sums of 512 log-probs lose digits that a sum of differences keeps."""
    logps = -torch.rand(8, 512, dtype=torch.float64) * 6
    ref_logps, good = logps + 0.1 * torch.randn(8, 512), torch.arange(8) < 4

    def gradient(dtype, of_differences):
        leaf, ref = logps.to(dtype).requires_grad_(), ref_logps.to(dtype)
        if of_differences:
            given = fused_po.sequence_logps(leaf - ref), None
        else:
            given = fused_po.sequence_logps(leaf), fused_po.sequence_logps(ref)
        return torch.autograd.grad(losses.kto(*given, good, 0.5, beta=0.1).sum(), leaf)[0].double()

    truth, single = gradient(torch.float64, True), torch.float32
    errors = [(gradient(single, way) - truth).norm() / truth.norm() for way in (True, False)]
    assert errors[0] < 2 * torch.finfo(single).eps and errors[0] < errors[1]
