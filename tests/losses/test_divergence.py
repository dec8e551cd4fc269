"""KL estimators by exact enumeration, values worked out by hand, KL in rewards, controllers, bad input.

The policy pi = softmax(theta) has five answers of one token each; expectations are sums over all five.
"""

import math
import warnings

import pytest
import torch
from trl_source import execute, function, trainer
from zoo import F64

import fused_po
from fused_po import losses
from fused_po.losses import divergence

V = 5
EPS = torch.finfo(F64).eps


def policies(distance=1.0):
    """(theta that requires grad, log pi_ref, log-probs of an older policy)."""
    theta = torch.randn(V, dtype=F64)
    ref = (theta + distance * torch.randn(V, dtype=F64)).log_softmax(-1)
    old = (theta + distance * torch.randn(V, dtype=F64)).log_softmax(-1)
    return theta.requires_grad_(), ref, old


def true_gradient(theta, ref):
    """The gradient of KL(pi || pi_ref)."""
    return torch.autograd.grad(losses.categorical_kl(theta.log_softmax(-1), ref), theta)[0]


def expected_gradient(theta, sampler_logp, per_answer):
    """Sum over answers of P(answer) * grad loss(answer), with the sampler's probabilities held constant."""
    loss = (sampler_logp.detach().exp() * per_answer(theta.log_softmax(-1))).sum()
    return torch.autograd.grad(loss, theta)[0]


def close(a, b):
    """Equal up to float64 rounding."""
    torch.testing.assert_close(a, b, rtol=0, atol=64 * EPS * max(1.0, float(b.abs().max())))


@pytest.mark.filterwarnings("ignore:fused_po. k1 as a loss")
def test_k1_as_a_loss_has_no_expected_gradient(seed):
    theta, ref, _ = policies()
    close(
        expected_gradient(theta, theta.log_softmax(-1), lambda p: losses.kl_loss(p, ref, "k1")),
        torch.zeros(V, dtype=F64),
    )


def test_k2_as_a_loss_gives_the_true_gradient(seed):
    theta, ref, _ = policies(3.0)
    found = expected_gradient(theta, theta.log_softmax(-1), lambda p: losses.kl_loss(p, ref, "k2"))
    close(found, true_gradient(theta, ref))


def test_k1_in_the_reward_gives_the_true_gradient(seed):
    """REINFORCE with the reward -k1: E[-k1 grad log pi] = -grad KL."""
    theta, ref, _ = policies(3.0)
    reward = losses.kl_in_reward(
        torch.zeros(V, dtype=F64), theta.log_softmax(-1)[:, None], ref[:, None], torch.ones(V, 1), beta=1.0
    )[:, 0]
    close(expected_gradient(theta, theta.log_softmax(-1), lambda p: -reward * p), true_gradient(theta, ref))


def test_k3s_value_is_unbiased_and_its_gradient_is_not(seed):
    """E[k3] = KL at any distance. The bias of its gradient grows faster than the distance."""
    direction, theta = torch.randn(V, dtype=F64), torch.randn(V, dtype=F64).requires_grad_()
    biases = []
    for distance in (0.01, 0.1, 1.0):
        ref = (theta.detach() + distance * direction).log_softmax(-1)
        logp = theta.log_softmax(-1)
        close(
            (logp.exp() * losses.kl_estimate(logp, ref, "k3")).sum().detach(), losses.categorical_kl(logp, ref).detach()
        )
        found = expected_gradient(theta, logp, lambda p, ref=ref: losses.kl_loss(p, ref, "k3"))
        biases.append((found - true_gradient(theta, ref)).norm().item() / distance)
    assert biases[0] < biases[1] < biases[2]
    assert biases[0] < 0.05 * biases[2]


def test_straight_through_has_k3s_value_and_the_true_gradient(seed):
    theta, ref, _ = policies(3.0)
    logp = theta.log_softmax(-1)
    loss = losses.kl_loss(logp, ref, "k3", straight_through=True)
    close(loss.detach(), losses.kl_estimate(logp, ref, "k3"))
    found = expected_gradient(theta, logp, lambda p: losses.kl_loss(p, ref, "k3", straight_through=True))
    close(found, true_gradient(theta, ref))


@pytest.mark.parametrize("estimator", ("k1", "k3"))
def test_samples_of_an_older_policy_corrected(estimator, seed):
    """For both unbiased estimators E_old[k pi / pi_old] has the value and the gradient of KL(pi || pi_ref)."""
    theta, ref, old = policies()
    logp = theta.log_softmax(-1)
    value = (old.exp() * losses.kl_loss(logp, ref, estimator, old_logps=old)).sum()
    close(value.detach(), losses.categorical_kl(logp, ref).detach())
    close(
        expected_gradient(theta, old, lambda p: losses.kl_loss(p, ref, estimator, old_logps=old)),
        true_gradient(theta, ref),
    )


def test_straight_through_of_an_older_policy(seed):
    theta, ref, old = policies()
    found = expected_gradient(theta, old, lambda p: losses.kl_loss(p, ref, "k3", old_logps=old, straight_through=True))
    close(found, true_gradient(theta, ref))


def test_worked_numbers():
    p, q = (torch.tensor(v, dtype=F64).log() for v in ([0.2, 0.8], [0.8, 0.2]))
    assert losses.categorical_kl(p, q).item() == pytest.approx(0.6 * math.log(4), rel=1e-14)
    assert losses.categorical_kl(p, q).item() == pytest.approx(0.832, abs=5e-4)
    assert losses.categorical_kl(q, p).item() == pytest.approx(0.6 * math.log(4), rel=1e-14)  # symmetric by accident
    p, q = (torch.tensor(v, dtype=F64).log() for v in ([0.5, 0.5], [0.9, 0.1]))
    assert losses.categorical_kl(p, q).item() == pytest.approx(0.5 * math.log(25 / 9), rel=1e-14)  # 0.5108
    # 0.3681
    assert losses.categorical_kl(q, p).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-14)
    assert losses.categorical_kl(p, q) > losses.categorical_kl(q, p) + 0.1


def test_categorical_kl_of_masked_answers():
    p, q = torch.tensor([0.5, 0.5, 0.0], dtype=F64).log(), torch.tensor([0.25, 0.75, 0.0], dtype=F64).log()
    assert losses.categorical_kl(p, q).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-14)
    assert losses.categorical_kl(q.roll(1), p) == math.inf


@pytest.mark.parametrize("std_p, std_q", [(0.7, 0.7), (0.5, 2.0), (3.0, 1.0)])
def test_gaussian_kls_gradient_in_the_mean(std_p, std_q, seed):
    """(mean_p - mean_q) / std_q^2 for any std_p; with equal variances the KL is |mean_p - mean_q|^2 / (2 std^2)."""
    mean_p, mean_q = torch.randn(2, 3, 4, dtype=F64)
    mean_p.requires_grad_()
    kl = losses.gaussian_kl(mean_p, mean_q, std_p, std_q)
    kl.sum().backward()
    torch.testing.assert_close(mean_p.grad, (mean_p.detach() - mean_q) / std_q**2)
    squares = (mean_p.detach() - mean_q).square().sum(-1)
    expected = 4 * (math.log(std_q / std_p) + std_p**2 / (2 * std_q**2) - 0.5) + squares / (2 * std_q**2)
    torch.testing.assert_close(kl.detach(), expected)
    if std_p == std_q:
        torch.testing.assert_close(kl.detach(), squares / (2 * std_p**2))
    assert losses.gaussian_kl(mean_q, mean_q, std_p, std_q)[0].item() == pytest.approx(
        4 * (math.log(std_q / std_p) + std_p**2 / (2 * std_q**2) - 0.5)
    )


def test_diffusion_dpo_is_the_papers_loss_of_noise_errors(seed):
    """With equal variances the KLs of a step are weighted squared errors of the predicted noise, up to a factor."""
    noise, ours, ref = torch.randn(3, 2, 4, 6, dtype=F64)  # [chosen and rejected, B, dimensions]
    std, weight = 0.3, 0.8  # the means of p and q differ by `weight` times the error of the noise

    def kl(prediction):
        return losses.gaussian_kl(weight * noise, weight * prediction, std, std)

    found = losses.diffusion_dpo(*kl(ours), *kl(ref), beta=2.0)
    errors = [(noise - x).square().sum(-1) for x in (ours, ref)]
    inside = (errors[0][0] - errors[1][0]) - (errors[0][1] - errors[1][1])
    torch.testing.assert_close(found, -torch.sigmoid(-2.0 * weight**2 / (2 * std**2) * inside).log())


@pytest.mark.parametrize("beta", (0, 0.3, 1))
def test_trls_distillation_agrees(beta, seed):
    method = function(trainer("experimental/gkd/gkd_trainer.py"), "generalized_jsd_loss")
    student, teacher = torch.randn(2, 4, 6, 9, dtype=F64)
    method.decorator_list = []
    theirs = (
        execute([method]).generalized_jsd_loss(student, teacher, beta=beta, temperature=1.7, reduction="none").sum(-1)
    )
    torch.testing.assert_close(losses.generalized_jsd(student, teacher, beta=beta, temperature=1.7), theirs)
    kind = {0: ("forward", 0.5), 1: ("reverse", 0.5)}.get(beta, ("js", beta))
    fused = fused_po.kl_from_logits(student, teacher, direction=kind[0], js_weight=kind[1], temperature=1.7)
    torch.testing.assert_close(fused.kl, theirs)


def test_kl_in_reward():
    logps, ref = torch.tensor([[-1.0, -2.0, -3.0]] * 3), torch.tensor([[-1.5, -2.0, -2.0]] * 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    broken = torch.where(mask, logps, torch.nan)
    found = losses.kl_in_reward(torch.tensor([2.0, 3.0, 4.0]), broken, ref, mask, beta=0.1)
    # k1 = 0.5, 0, -1; the answer's reward is added to its last token; an empty answer adds nothing
    torch.testing.assert_close(found, torch.tensor([[-0.05, 2.0, 0.0], [-0.05, 0.0, 3.1], [0.0, 0.0, 0.0]]))
    each = losses.kl_in_reward(torch.ones(3, 3), logps.requires_grad_(), ref, mask, beta=0.1)
    torch.testing.assert_close(each[1], torch.tensor([0.95, 1.0, 1.1]))
    assert not each.requires_grad


def test_wrong_uses_warn_once(seed):
    logps, ref = -torch.rand(2, 3), -torch.rand(2, 3)
    cases = {
        "k1 as a loss has an expected gradient of zero": lambda: losses.kl_loss(logps, ref, "kl"),
        "k3 is never negative": lambda: losses.kl_in_reward(
            torch.ones(2), logps, ref, torch.ones(2, 3), beta=0.1, estimator="k3"
        ),
    }
    for message, call in cases.items():
        divergence._warned.clear()
        with pytest.warns(UserWarning, match=message):
            call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
            losses.kl_loss(logps, ref, "k2")
            losses.kl_loss(logps, ref, "k1", straight_through=True)


def test_common_names_of_estimators(seed):
    logps, ref = -torch.rand(2, 3), -torch.rand(2, 3)
    for one, other in (("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")):
        assert torch.equal(losses.kl_estimate(logps, ref, one), losses.kl_estimate(logps, ref, other))
    assert not losses.kl_estimate(logps.requires_grad_(), ref).requires_grad


def test_controllers():
    fixed = losses.FixedKLController(0.2)
    fixed.update(100.0, 10)
    assert fixed.value == 0.2
    adaptive = losses.AdaptiveKLController(0.2, target_kl=6.0, horizon=100)
    adaptive.update(12.0, 10)  # twice the target: the error is clipped to 0.2
    assert adaptive.value == pytest.approx(0.2 * 1.02)
    adaptive.update(5.4, 10)  # 0.9 of the target: -0.1
    assert adaptive.value == pytest.approx(0.2 * 1.02 * 0.99)


def tokens():
    return -torch.rand(2, 3)


BAD = [
    (lambda: losses.kl_loss(tokens(), tokens()[:, :2]), r"ref_logps: got shape \(2, 2\), expected \(2, 3\)"),
    (lambda: losses.kl_loss(tokens(), tokens(), "k4"), "estimator: got 'k4', allowed are 'k1'"),
    (lambda: losses.kl_loss(tokens(), tokens(), "low_var"), "did you mean 'low_var_kl'"),
    (lambda: losses.kl_loss(tokens(), tokens(), "full"), "estimator: got 'full', but the exact KL"),
    (lambda: losses.kl_loss(tokens(), tokens(), clamp=0.0), "clamp: got 0.0, allowed are finite numbers > 0"),
    (lambda: losses.kl_loss(tokens(), tokens(), old_logps=tokens()[0]), r"old_logps: got shape \(3,\)"),
    (lambda: losses.kl_in_reward(torch.ones(3), tokens(), tokens(), tokens(), beta=0.1), r"rewards: got shape \(3,\)"),
    (lambda: losses.kl_in_reward(torch.ones(2), tokens(), tokens(), tokens(), beta=-1.0), "beta: got -1.0"),
    (lambda: losses.gaussian_kl(tokens(), tokens(), 0.0, 1.0), "std_p: got 0.0, allowed are finite numbers > 0"),
    (lambda: losses.diffusion_dpo(*torch.rand(4, 3), beta=0.0), "beta: got 0.0"),
    (lambda: losses.AdaptiveKLController(0.1, 0.0, 10), "target_kl: got 0.0"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
