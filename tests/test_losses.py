"""The losses, reductions and modules in plain PyTorch: frozen numbers, gradients, extremes, call signatures."""

import math

import pytest
import torch

import fused_po
from fused_po import losses, modules

# A loss is a row here: its function of [B] float64 tensors, arguments, the value worked out by hand.
TABLE = [
    # h = 0.5 * ((-1 - -2) - (-3 - -3.5)) = 0.25: -log s(0.25) = log(1 + e^-0.25)
    ("dpo", lambda a, b, c, d: losses.dpo(a, b, c, d, beta=0.5), (-1.0, -3.0, -2.0, -3.5), math.log1p(math.exp(-0.25))),
    # 0.9 log(1 + e^-0.25) + 0.1 log(1 + e^0.25)
    (
        "dpo, smoothed",
        lambda a, b, c, d: losses.dpo(a, b, c, d, beta=0.5, label_smoothing=0.1),
        (-1.0, -3.0, -2.0, -3.5),
        0.9 * math.log1p(math.exp(-0.25)) + 0.1 * math.log1p(math.exp(0.25)),
    ),
    ("k1", lambda a, b: losses.kl_loss(a, b, "k1"), (-1.0, -1.5), 0.5),
    ("k2", lambda a, b: losses.kl_loss(a, b, "k2"), (-1.0, -1.5), 0.125),
    ("k3", lambda a, b: losses.kl_loss(a, b, "k3"), (-1.0, -1.5), math.exp(-0.5) - 0.5),
]
IDS = [row[0] for row in TABLE]


def tensors(values, n=1):
    return [torch.full((n,), v, dtype=torch.float64) for v in values]


@pytest.mark.parametrize("name, loss, values, expected", TABLE, ids=IDS)
def test_value_worked_out_by_hand(name, loss, values, expected):
    assert loss(*tensors(values)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name, loss, values, expected", TABLE, ids=IDS)
def test_unreduced_and_gradcheck(name, loss, values, expected, seed):
    inputs = [torch.randn(4, dtype=torch.float64) for _ in values]
    assert loss(*inputs).shape == (4,)
    inputs[0].requires_grad_()
    if len(inputs) == 4:
        inputs[1].requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("ratio", (0.0, 30.0, -30.0, 1e4, -1e4))
def test_dpo_never_overflows(ratio):
    chosen = torch.tensor([ratio], requires_grad=True)
    zero = torch.zeros(1)
    loss = losses.dpo(chosen, zero, zero, zero, beta=1.0, label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


def test_kl_gives_the_reference_no_gradient():
    logps, ref = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    losses.kl_loss(logps, ref, "k3").sum().backward()
    assert ref.grad is None and logps.grad is not None


def test_sequence_logps(seed):
    logps = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    broken = torch.where(mask, logps, torch.nan)  # what is masked is not looked at
    sums = fused_po.sequence_logps(broken, mask)
    expected = torch.stack([row[m].sum() for row, m in zip(logps, mask)])
    torch.testing.assert_close(sums, expected)
    means = fused_po.sequence_logps(broken, mask, average=True)
    torch.testing.assert_close(means, expected / torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64))
    lengths = [2, 0, 5]
    bounds = torch.tensor([0, 2, 2, 7])
    packed = torch.randn(7, dtype=torch.float64, requires_grad=True)
    pieces = packed.split(lengths)
    torch.testing.assert_close(
        fused_po.sequence_logps(packed, cu_seqlens=bounds), torch.stack([p.sum() for p in pieces])
    )
    average = fused_po.sequence_logps(packed, cu_seqlens=bounds.int(), average=True)
    torch.testing.assert_close(average, torch.stack([p.mean() if len(p) else p.sum() for p in pieces]))
    assert torch.autograd.gradcheck(lambda p: fused_po.sequence_logps(p, cu_seqlens=bounds), packed)


def test_dpo_module_is_openrlhfs(seed):
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (torch.randn(5) for _ in range(4))
    policy_chosen.requires_grad_()
    module = modules.DPOLoss(beta=0.2, label_smoothing=0.1)
    loss, chosen, rejected = module(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    h = 0.2 * ((policy_chosen - policy_rejected) - (ref_chosen - ref_rejected))
    expected = -(torch.sigmoid(h).log() * 0.9 + torch.sigmoid(-h).log() * 0.1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(chosen, 0.2 * (policy_chosen - ref_chosen).detach())
    torch.testing.assert_close(rejected, 0.2 * (policy_rejected - ref_rejected))
    assert loss.requires_grad and not chosen.requires_grad


@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("nll", (False, True))
@pytest.mark.parametrize("use_ref", (False, True))
def test_fused_linear_dpo_module_is_ligers(average, nll, use_ref, seed):
    hidden, weight, bias = torch.randn(4, 6, 8), torch.randn(30, 8), torch.randn(30)
    ref_hidden, ref_weight = torch.randn(4, 6, 8), torch.randn(30, 8)
    target = torch.randint(0, 30, (4, 6))
    target[:, :2] = -100
    target[1, 4:] = -100
    mask = target != -100
    how = dict(beta=0.3, compute_nll_loss=nll, use_ref_model=use_ref, average_log_prob=average)
    module = modules.FusedLinearDPOLoss(**how)
    w = weight.clone().requires_grad_()
    loss, aux = module(w, hidden, target, bias, ref_hidden, ref_weight, bias if use_ref else None)

    def sequences(h, w_):
        logp = (h @ w_.T + bias).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1) * mask
        return logp.sum(-1) / (mask.sum(-1) if average else 1), logp

    w2 = weight.clone().requires_grad_()
    (chosen, rejected), tokens = [s.chunk(2) if i == 0 else s for i, s in enumerate(sequences(hidden, w2))]
    ref = sequences(ref_hidden, ref_weight)[0].chunk(2) if use_ref else (0.0, 0.0)
    rewards = 0.3 * (chosen - ref[0]), 0.3 * (rejected - ref[1])
    expected = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]).mean()
    nll_value = -tokens[:2].sum() / mask[:2].sum()
    if nll:
        expected = expected + nll_value
    torch.testing.assert_close(loss, expected)
    assert len(aux) == 7
    logits = hidden @ weight.T + bias
    means = [logits[rows][mask[rows]].mean() for rows in (slice(0, 2), slice(2, 4))]
    expected_aux = (chosen, rejected, *means, nll_value if nll else torch.zeros(()), *rewards)
    for got, want in zip(aux, expected_aux):
        torch.testing.assert_close(got.detach(), want.detach())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(w.grad, w2.grad, rtol=1e-4, atol=1e-6)
