"""docs/derivations.md: its links, and the statements that no other test checks, by enumeration."""

import math
import re

import pytest
import torch
from repository import ROOT
from zoo import F64

import fused_po
from fused_po import losses

PAGE = ROOT / "docs" / "derivations.md"
V = 5


def grad(value, of):
    return torch.autograd.grad(value, of, retain_graph=True)[0]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.fixture
def one(seed):
    """(logits that require grad, log p, log q) of one token."""
    theta = torch.randn(V, dtype=F64, requires_grad=True)
    return theta, theta.log_softmax(-1), (theta.detach() + 2 * torch.randn(V, dtype=F64)).log_softmax(-1)


def as_loss(log_p, log_q, kind):
    """The expected loss over tokens drawn from p, with the probabilities held constant."""
    return (log_p.detach().exp() * losses.kl_loss(log_p, log_q, kind)).sum()


def in_reward(log_p, log_q, kind):
    """The expected loss of REINFORCE with the reward -k."""
    return (log_p.detach().exp() * losses.kl_estimate(log_p, log_q, kind) * log_p).sum()


def test_every_link_names_its_target():
    links = re.findall(r"\[`(\w+)`\]\((\.\./[\w/]+\.py)\)", PAGE.read_text())
    assert len(links) > 60 and len(re.findall(r"\]\(\.\./", PAGE.read_text())) == len(links)
    for name, path in links:
        assert re.search(rf"^def {name}\(", (PAGE.parent / path).read_text(), re.M), f"{path} has no {name}"
    for path in re.findall(r"\]\(([\w.]+\.(?:md|png))", PAGE.read_text()):
        assert (PAGE.parent / path).is_file(), path


def test_the_objective_is_a_constant_less_the_kl_from_its_optimum(one):
    """E[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || ref exp(r / beta) / Z), in value and gradient."""
    theta, log_p, log_q = one
    reward, beta = torch.randn(V, dtype=F64), 0.3
    tilted = log_q + reward / beta
    objective = (log_p.exp() * reward).sum() - beta * losses.categorical_kl(log_p, log_q)
    other = beta * tilted.logsumexp(0) - beta * losses.categorical_kl(log_p, tilted.log_softmax(0))
    close(objective, other)
    close(grad(objective, theta), grad(other, theta))


def test_k3_as_a_loss_has_the_forward_kls_gradient(one):
    theta, log_p, log_q = one
    close(grad(as_loss(log_p, log_q, "k3"), theta), grad(losses.categorical_kl(log_q, log_p), theta))


def test_k3_in_the_reward_is_the_reverse_kl_less_the_forward(one):
    theta, log_p, log_q = one
    expected = losses.categorical_kl(log_p, log_q) - losses.categorical_kl(log_q, log_p)
    close(grad(in_reward(log_p, log_q, "k3"), theta), grad(expected, theta))


def test_abs_as_a_loss_is_the_distance_of_probabilities(one):
    theta, log_p, log_q = one
    close(grad(as_loss(log_p, log_q, "abs"), theta), grad((log_p.exp() - log_q.exp()).abs().sum(), theta))


@pytest.mark.parametrize("kind", ("k2", "k3"))
def test_a_non_negative_estimate_in_the_reward_has_no_first_order_gradient(kind, seed):
    theta, direction = torch.randn(V, dtype=F64, requires_grad=True), torch.randn(V, dtype=F64)
    log_p, sizes = theta.log_softmax(-1), []
    for distance in (1e-3, 1e-2):
        log_q = (theta.detach() + distance * direction).log_softmax(-1)
        sizes.append(grad(in_reward(log_p, log_q, kind), theta).norm() / distance**2)
    assert sizes[0] / sizes[1] == pytest.approx(1, abs=0.2)


@pytest.mark.filterwarnings("ignore:fused_po. k1 as a loss")
def test_k1_as_a_loss_lowers_the_sampled_token(one):
    """The gradient is 1[y] - p for any reference. For draws of another policy the mean step moves away from it."""
    theta, log_p, log_q = one
    p = log_p.exp().detach()
    steps = -torch.stack([grad(losses.kl_loss(log_p, log_q, "k1")[y], theta) for y in range(V)])
    close(steps, p - torch.eye(V, dtype=F64))
    assert (steps.diagonal() < 0).all()
    close(p @ steps, torch.zeros(V, dtype=F64))
    close((p[:, None] * steps.square()).sum(), 1 - p.square().sum())
    other = torch.randn(V, dtype=F64).softmax(-1)
    close(other @ steps, p - other)


def test_the_bases_are_the_gradients(one):
    """The closed forms of the page against autograd through the KLs, and against the fused op."""
    theta, log_p, log_q = one
    p, q, w = log_p.exp().detach(), log_q.exp(), 0.3
    m = w * q + (1 - w) * p

    def basis(log_ratio):
        return p * (log_ratio - (p * log_ratio).sum())

    expected = {
        ("reverse", 0.5): (losses.categorical_kl(log_p, log_q), basis((p / q).log())),
        ("forward", 0.5): (losses.categorical_kl(log_q, log_p), p - q),
        ("js", w): (losses.generalized_jsd(theta, log_q, beta=w), (1 - w) * basis((p / m).log())),
    }
    for (direction, weight), (value, in_closed_form) in expected.items():
        close(grad(value, theta), in_closed_form)
        fused = fused_po.kl_from_logits(theta, log_q, direction=direction, js_weight=weight).kl
        close(fused, value)
        close(grad(fused, theta), in_closed_form)
    assert expected["js", w][0] <= math.log(2)
    entropy = -(log_p.exp() * log_p).sum()
    close(grad(entropy, theta), -p * (log_p.detach() + entropy.detach()))


class TwoTokens:
    """Answers of two tokens. Policy and reference have logits [V] for the first token and [V, V] for the second."""

    def __init__(self):
        self.logits = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in ((V,), (V, V))]
        self.first, self.second = (z.log_softmax(-1) for z in self.logits)
        self.ref_first, self.ref_second = (torch.randn(s, dtype=F64).log_softmax(-1) for s in ((V,), (V, V)))
        self.joint, ref = self.first[:, None] + self.second, self.ref_first[:, None] + self.ref_second
        self.kl = losses.categorical_kl(self.joint.flatten(), ref.flatten())

    def grads(self, value):
        return torch.autograd.grad(value, self.logits, retain_graph=True)


def test_the_sequences_kl_is_the_mean_of_the_sums_of_its_tokens(seed):
    """Both for the exact KLs and for k1."""
    t = TwoTokens()
    p = t.joint.exp()
    exact = losses.categorical_kl(t.first, t.ref_first) + losses.categorical_kl(t.second, t.ref_second)[:, None]
    k1 = (t.first - t.ref_first)[:, None] + t.second - t.ref_second
    close((p * exact).sum(), t.kl)
    close((p * k1).sum(), t.kl)


def test_the_kl_to_come_belongs_to_the_gradient(seed):
    """k1 in the reward, summed from each token on, has the gradient of the answers' KL; per-token losses do not."""
    t = TwoTokens()
    p = t.joint.exp().detach()
    k1_first, k1_second = (t.first - t.ref_first).detach()[:, None], (t.second - t.ref_second).detach()
    to_come = (k1_first + k1_second) * t.first[:, None] + k1_second * t.second
    expected = t.grads(t.kl)
    for a, b in zip(t.grads((p * to_come).sum()), expected):
        close(a, b)
    second = losses.categorical_kl(t.second, t.ref_second)
    of_tokens = losses.categorical_kl(t.first, t.ref_first) + (t.first.detach().exp() * second).sum()
    k2 = losses.kl_loss(t.first, t.ref_first, "k2")[:, None] + losses.kl_loss(t.second, t.ref_second, "k2")
    close(of_tokens, t.kl)
    missing = t.grads((t.first.exp() * second.detach()).sum() + 0 * t.second.sum())
    for exact, sampled, whole, rest in zip(t.grads(of_tokens), t.grads((p * k2).sum()), expected, missing):
        close(exact, sampled)
        close(exact + rest, whole)
    assert missing[0].abs().max() > 1e-3
