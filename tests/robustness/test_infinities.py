"""Forbidden tokens: log-probs, margins and log-ratios of -inf and inf, in the fused losses and in the loss functions.

Value and gradient are the limit if there is one. Where there is none (inf - inf), both are NaN.
"""

import math

import pytest
import torch
from numerics import BACKENDS, DEVICE

import fused_po
from fused_po import losses
from fused_po.backend import choose as backends
from fused_po.backend.interface import Form, TokenInputs
from fused_po.losses.numerics import k3_estimate, saturating_expm1
from fused_po.reference.dpo import kl_estimate

INF = math.inf
E20 = math.expm1(20.0)


def tensor(*values):
    return torch.tensor(values, device=DEVICE)


def value_and_slope(function, *inputs):
    """(values, gradient of their sum in the first input)."""
    first = inputs[0].clone().requires_grad_()
    out = function(first, *inputs[1:])
    (grad,) = torch.autograd.grad(out.sum(), first)
    return out.detach(), grad


def assert_same(ours, exact):
    torch.testing.assert_close(ours, torch.as_tensor(exact, device=DEVICE).to(ours.dtype), rtol=2e-6, atol=1e-7)


# The fused DPO loss.


def pair(chosen: bool, rejected: bool):
    """Logits [2, 3, 5] and labels; one token of each named answer is forbidden."""
    logits, labels = torch.randn(2, 3, 5, device=DEVICE), torch.randint(0, 5, (2, 3), device=DEVICE)
    for row, forbidden in enumerate((chosen, rejected)):
        if forbidden:
            logits[row, 1, labels[row, 1]] = -INF
    return logits, labels


def plain_dpo(logits, labels, smoothing):
    """(loss, gradient) in plain PyTorch, from sequence log-probs."""
    x = logits.double().requires_grad_()
    sums = x.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1).sum(1)
    loss = losses.dpo(sums[:1], sums[1:], beta=0.1, label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
@pytest.mark.parametrize("forbidden", ["chosen", "rejected"])
def test_dpo_with_an_infinite_margin(backend, smoothing, kl, forbidden, seed):
    """Also with a KL that is only reported: its coefficient of 0 must not multiply an infinite value or slope."""
    logits, labels = pair(forbidden == "chosen", forbidden == "rejected")
    exact, exact_grad = plain_dpo(logits, labels, smoothing)
    assert exact.item() == (0 if (forbidden, smoothing) == ("rejected", 0.0) else INF)
    x = logits.clone().requires_grad_()
    how = {"beta": 0.1, "label_smoothing": smoothing, "kl": kl, "backend": backend}
    out = fused_po.dpo_from_logits(x, labels, ref_logps=torch.zeros(2, 3, device=DEVICE), **how)
    (grad,) = torch.autograd.grad(out.loss, x)
    assert_same(out.losses, exact)
    assert_same(out.loss, exact[0])
    assert_same(grad, exact_grad)
    assert out.margins.item() == (-INF if forbidden == "chosen" else INF)
    assert out.accuracy.item() == (forbidden == "rejected")
    if kl:
        row = int(forbidden == "rejected")
        assert out.kl_per_token[row, 1].item() == (-INF if kl == "k1" else INF)
        assert not out.kl_per_token.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_heads_and_the_exact_kl(backend, smoothing, seed):
    """`linear_dpo` with a bias of -inf, and kl="full", where the reference forbids the same token."""
    _, labels = pair(False, True)
    labels[0], token = (labels[1, 1] + 1) % 5, labels[1, 1].item()
    bias = torch.zeros(5, device=DEVICE)
    bias[token] = -INF
    labels[1, 0] = labels[1, 2] = (token + 2) % 5
    hidden, weight = torch.randn(2, 3, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    exact = 0.0 if smoothing == 0 else INF
    h, ref = hidden.clone().requires_grad_(), torch.zeros(2, 3, device=DEVICE)
    how = {"label_smoothing": smoothing, "backend": backend}
    out = fused_po.linear_dpo(h, weight, labels, ref_logps=ref, bias=bias, kl="k2", **how)
    (grad,) = torch.autograd.grad(out.loss, h)
    assert out.losses.item() == exact and grad.isfinite().all()
    ref_hidden = torch.randn(2, 3, 4, device=DEVICE)
    out = fused_po.linear_dpo(hidden, weight, labels, ref_hidden, weight, bias=bias, kl="full", **how)
    assert out.losses.item() == exact and out.kl.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_answers_forbidden_have_no_margin(backend, seed):
    """inf - inf is NaN, as in `losses.dpo`, and the other pairs are not affected."""
    logits, labels = pair(True, True)
    more, more_labels = pair(False, False)
    stacked = torch.stack([logits[0], more[0], logits[1], more[1]]).requires_grad_()
    all_labels = torch.stack([labels[0], more_labels[0], labels[1], more_labels[1]])
    ref = torch.zeros(4, device=DEVICE)
    out = fused_po.dpo_from_logits(stacked, all_labels, ref_logps=ref, backend=backend)
    assert out.losses[0].isnan() and out.losses[1].isfinite()
    (grad,) = torch.autograd.grad(out.losses[1], stacked)
    assert grad.isfinite().all()
    assert losses.dpo(tensor(-INF), tensor(-INF)).isnan().all()


# Estimates of the KL.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_estimates_in_the_fused_ops(backend, kl):
    """r of -inf, inf and beyond the start of the tangent: values, and gradients through the loss."""
    r = tensor(-INF, -30.0, -20.0, -1.0, 0.0, 2.0, 50.0, INF)
    exact = {
        "k1": r,
        "k2": r * r / 2,
        "k3": torch.where(r < -20, E20 - 20 + E20 * (-r - 20), torch.expm1(-r) + r.double()),
    }[kl]
    exact = torch.where(r == INF, INF, exact)
    slopes = {"k1": torch.ones_like(r), "k2": r, "k3": -torch.expm1(-r.double().clamp(min=-20))}[kl]
    run, n = backends.get(backend), r.numel()
    labels = torch.zeros(2, n // 2, dtype=torch.long, device=DEVICE)
    tokens = torch.stack([r * 0, r * 0, r.clamp(max=0), -r.clamp(min=0)]).nan_to_num(nan=0.0, neginf=-INF)
    assert_same(tokens[2] - tokens[3], r)
    kl_tokens = run.dpo(tokens, labels, None, 0.1, 0.0, kl, -100)[3]
    assert_same(kl_tokens, exact)
    assert_same(kl_estimate(r.double(), kl)[1], slopes)


def test_estimates_in_the_losses():
    r = tensor(-INF, -30.0, -1.0, 0.0, 2.0, INF)
    zero = torch.zeros_like(r)
    with pytest.warns(UserWarning) if not losses.divergence._warned else _nothing():
        losses.kl_loss(r, zero, "k1")
    value, slope = value_and_slope(lambda x: losses.kl_loss(x, zero, "k3"), r)
    assert_same(value, [INF, E20 - 20 + 10 * E20, math.e - 2, 0.0, math.exp(-2) + 1, INF])
    assert_same(slope, [-E20, -E20, 1 - math.e, 0.0, 1 - math.exp(-2), 1.0])
    value, slope = value_and_slope(lambda x: losses.kl_loss(x, zero, "k2"), r)
    assert_same(value, [INF, 450.0, 0.5, 0.0, 2.0, INF])
    assert_same(slope, r)
    value, slope = value_and_slope(lambda x: losses.kl_loss(x, zero, "abs"), r)
    assert_same(value, r.abs())
    assert_same(slope, [-1.0, -1.0, -1.0, 0.0, 1.0, 1.0])
    # Multiplied by pi / pi_old: tokens that the policy forbids add 0.
    value, slope = value_and_slope(lambda x: losses.kl_loss(x, zero[:1], "k3", old_logps=zero[:1]), r[:1])
    assert value.item() == 0 and slope.item() == 0
    value, slope = value_and_slope(k3_estimate, r)
    assert value[0] == INF and value[-1] == INF and slope.isfinite().all()


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_exponentials_continue_to_both_infinities():
    value, slope = value_and_slope(saturating_expm1, tensor(-INF, -50.0, 30.0, INF))
    assert_same(value, [-1.0, -1.0, E20 + 10 * (E20 + 1), INF])
    assert_same(slope, [0.0, 0.0, E20 + 1, E20 + 1])
    ratio = losses.policy.importance_ratio
    value, slope = value_and_slope(lambda x: ratio(x, None), tensor(-INF, 0.0, INF))
    assert_same(value, [0.0, 1.0, INF])
    assert_same(slope, [0.0, 1.0, math.exp(20)])
    for divergence in losses.pairwise.F_DIVERGENCES:
        value, slope = value_and_slope(lambda x, d=divergence: losses.f_divergence_score(x, None, d), tensor(-INF, INF))
        assert value[0] == -INF and not value.isnan().any() and not slope.isnan().any()


# Losses of pairs: h of inf and -inf, and coefficients of 0.

H = (tensor(0.0, -INF), tensor(-INF, 0.0))  # chosen, rejected: h = inf, then -inf
PAIRS = [
    ("dpo", {}, [0.0, INF], [0.0, -0.1]),
    ("dpo", {"label_smoothing": 0.1}, [INF, INF], [0.01, -0.09]),
    ("robust_dpo", {}, [0.0, INF], [0.0, -0.1]),
    ("robust_dpo", {"label_smoothing": 0.1}, [-INF, INF], [-0.0125, -0.1125]),
    ("hinge", {}, [0.0, INF], [0.0, -0.1]),
    ("exo_pair", {"label_smoothing": 0.01}, [-math.log1p(-0.01), -math.log(0.01)], [0.0, 0.0]),
    ("discopop", {}, [0.0, INF], [0.0, -0.1]),
    ("discopop", {"tau": 1.0}, [0.0, INF], [0.0, -0.1]),
    ("dpop", {"penalty": 0.0, "beta": 0.1}, [0.0, INF], [0.0, -0.1]),
    ("apo_zero", {}, [0.5, 1.5], None),
    ("apo_down", {}, [0.5, 1.0], None),
    ("bco_pair", {}, [math.log(2), INF], None),
]


@pytest.mark.parametrize("name, settings, values, slopes", PAIRS)
def test_losses_of_pairs(name, settings, values, slopes):
    value, slope = value_and_slope(lambda c: getattr(losses, name)(c, H[1], **settings), H[0])
    assert not slope.isnan().any()
    if values is not None:
        assert_same(value, values)
    if slopes is not None:
        assert_same(slope, slopes)


def test_coefficients_of_zero():
    """A coefficient, weight, advantage or ratio of 0 times an infinity gives 0."""
    c, r = tensor(-INF), tensor(-INF)
    one = tensor(1)
    assert_same(
        value_and_slope(lambda x: losses.rpo(x, x * 0.0 - 1, chosen_length=one, alpha=0.0), tensor(-2.0))[0],
        losses.dpo(tensor(-2.0), tensor(-1.0)),
    )
    assert losses.rpo(c, tensor(-1.0), chosen_length=one, alpha=0.0).item() == INF
    assert losses.tdpo(tensor(0.0), tensor(0.0), None, None, tensor(0.0), tensor(INF), alpha=0.0).isfinite().all()
    assert losses.tpo(tensor(0.0), tensor(0.0), c, alpha=0.0).isfinite().all()
    assert losses.orpo(tensor(-1.0), r, nll_coef=0.0).item() == 0
    desirable, weights = torch.tensor([True], device=DEVICE), tensor(0.0)
    assert losses.bco(c, None, desirable, 0.0, weights=weights).item() == 0
    value, slope = value_and_slope(lambda x: losses.sft(x, loss_type="dft"), c)
    assert value.item() == 0 and slope.item() == 0


@pytest.mark.parametrize("rewards", [(0.0, -INF), (-INF, 0.0), (1.0, 0.0, -INF), (1.0, -INF, 0.0), (1.0, -INF, -INF)])
def test_rankings_with_a_forbidden_answer(rewards):
    """A ranking equals its separate choices between two answers, each without an infinity in a sum."""
    value, slope = value_and_slope(losses.plackett_luce, tensor(*rewards)[None])
    x = tensor(*rewards).requires_grad_()
    exact = x.new_zeros(())
    for k in range(len(rewards) - 1):
        later = [x[j] for j in range(k + 1, len(rewards)) if x[j] > -INF]
        if later:
            exact = exact - torch.nn.functional.logsigmoid(x[k] - torch.stack(later).logsumexp(0))
        elif x[k] == -INF:
            exact = exact + math.nan  # a choice between two forbidden answers
    assert torch.equal(value[0].isnan(), exact.isnan())
    if not exact.isnan():
        (grad,) = torch.autograd.grad(exact, x) if exact.requires_grad else (torch.zeros_like(x),)
        assert_same(value[0], exact.detach())
        assert_same(slope[0], grad)


TOKENS = tensor(-INF, -1.0)[None]
POLICY = [
    lambda x, a, m: losses.reinforce(x, a, m),
    lambda x, a, m: losses.ppo_clip(x, TOKENS.clamp(min=-2), a, m),
    lambda x, a, m: losses.ppo_clip(x, TOKENS.clamp(min=-2), a, m, log_ratio_clamp=None),
    lambda x, a, m: losses.ppo_clip(-x, TOKENS.clamp(min=-2), a, m, log_ratio_clamp=None),
    lambda x, a, m: losses.cispo(x, TOKENS.clamp(min=-2), a, m, cap=2.0),
    lambda x, a, m: losses.sapo(x, TOKENS.clamp(min=-2), a, m),
    lambda x, a, m: losses.vespo(x, TOKENS.clamp(min=-2), a, m),
    lambda x, a, m: losses.grpo(x, TOKENS.clamp(min=-2), a, m, loss_type="cispo"),
    lambda x, a, m: losses.grpo(x, TOKENS.clamp(min=-2), a, m, weights=a * 0),
    lambda x, a, m: losses.gspo(x, TOKENS.clamp(min=-2), a, m),
    lambda x, a, m: losses.kl_cov(x, TOKENS.clamp(min=-2), a, m, ppo_kl_coef=0.0),
]


@pytest.mark.parametrize("loss", POLICY)
def test_no_advantage_gives_no_loss(loss):
    """A counted forbidden token with an advantage of 0 has no loss and no gradient."""
    a, mask = torch.zeros_like(TOKENS), torch.ones_like(TOKENS, dtype=torch.bool)
    value, slope = value_and_slope(lambda x: loss(x, a, mask), TOKENS)
    assert (value == 0).all() and (slope == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["clip", "weight", "gate"])
@pytest.mark.parametrize("kl", [None, "k2", "k3"])
def test_policy_ops(backend, kind, kl, seed):
    """A forbidden token with an advantage and KL coefficient of 0, or with a weight of 0: finite loss and gradient."""
    logits, labels = torch.randn(1, 3, 6, device=DEVICE), torch.randint(0, 6, (3,), device=DEVICE)
    logits[0, 1, labels[1]] = -INF
    zero, one = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    for a, weights in ((zero, one), (one, tensor(1.0, 0.0, 1.0))):
        if kind == "weight" and a is one:
            continue  # the loss of the token is infinite, and not weighted yet
        given = TokenInputs(a, weights, one * -2, None if kl is None else one * -1)
        form = Form(kind, 0.5, 2.0, kl=kl, kl_coef=0.0)
        x = logits.clone()
        tokens = backends.get(backend).policy(x, labels, given, form, 1.0, -100, True)
        assert tokens[[0, 2, 3, 4, 6, 7, 8]].isnan().sum() == 0
        assert tokens[4].isfinite().all() and tokens[8].isfinite().all() and x.isfinite().all()
        if kl:
            assert tokens[5, 1] == INF


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ratio_of_two_forbidden_tokens_is_nan(backend):
    """-inf - -inf of policy and old policy is NaN, instead of silently e^-20."""
    logits = torch.tensor([[[-INF, 0.0]]], device=DEVICE)
    labels, one = torch.zeros(1, dtype=torch.long, device=DEVICE), torch.ones(1, device=DEVICE)
    given = TokenInputs(one, one, one * -INF, None)
    tokens = backends.get(backend).policy(logits, labels, given, Form("clip", 0.8, 1.2), 1.0, -100, False)
    assert tokens[6].isnan().all()


def test_jensen_shannon_of_masked_vocabularies():
    """A token that both sides forbid: value and gradient of the remaining tokens."""
    p, q = torch.randn(3, 5, device=DEVICE), torch.randn(3, 5, device=DEVICE)
    p[:, 2] = q[:, 2] = -INF
    few = [x[:, [0, 1, 3, 4]] for x in (p, q)]
    for beta in (0.0, 0.3, 1.0):
        value, slope = value_and_slope(lambda x, b=beta: losses.generalized_jsd(x, q, beta=b), p)
        exact, exact_slope = value_and_slope(lambda x, b=beta: losses.generalized_jsd(x, few[1], beta=b), few[0])
        assert_same(value, exact)
        assert_same(slope[:, [0, 1, 3, 4]], exact_slope)
        assert (slope[:, 2] == 0).all()
