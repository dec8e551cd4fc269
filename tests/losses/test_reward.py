"""Reward-model losses beyond their rows in the zoo: rankings, strengths from a table of wins, metrics, bad input."""

import ast
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from trl_source import execute, function, trainer

from fused_po import losses

F64 = torch.float64


def table(n: int, **games: tuple[float, float]) -> torch.Tensor:
    """Wins [n, n] from results such as AB=(8, 4): A beat B 8 times, and B beat A 4 times."""
    wins = torch.zeros(n, n, dtype=F64)
    for pair, (first, second) in games.items():
        i, j = (ord(letter) - ord("A") for letter in pair)
        wins[i, j], wins[j, i] = first, second
    return wins


def test_plackett_luce_of_two_is_bitwise_bradley_terry(seed):
    chosen, rejected = torch.randn(2, 100) * 30
    assert torch.equal(losses.plackett_luce(torch.stack([chosen, rejected], 1)), losses.bradley_terry(chosen, rejected))


@pytest.mark.parametrize("answers", (0, 1))
def test_nothing_to_rank_costs_nothing(answers):
    rewards = torch.randn(3, answers, requires_grad=True)
    loss = losses.plackett_luce(rewards)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3)) and not rewards.grad.any()


def test_plackett_luce_is_a_distribution_over_rankings(seed):
    """The probabilities of the 24 rankings of four answers add up to 1."""
    rewards = torch.randn(4, dtype=F64)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    total = torch.exp(-losses.plackett_luce(rewards[orders])).sum()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


def test_masked_answers_may_be_nan(seed):
    rewards = torch.tensor([[1.0, 0.5, math.nan], [0.2, math.nan, math.inf]], requires_grad=True)
    loss = losses.plackett_luce(rewards, torch.tensor([[True, True, False], [True, False, False]]))
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([math.log1p(math.exp(-0.5)), 0.0]))
    # d/dr_1 = -(1 - s(0.5)) = -s(-0.5)
    slope = 1 / (1 + math.exp(0.5))
    torch.testing.assert_close(rewards.grad, torch.tensor([[-slope, slope, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("margin", (None, "a pair"))
def test_against_trls_reward_trainer(margin, seed):
    body = function(trainer("trainer/reward_trainer.py"), "compute_loss").body
    start = next(i for i, node in enumerate(body) if "rewards_chosen, rewards_rejected" in ast.unparse(node))
    statements = body[start : start + 3]
    assert "center_rewards_coefficient" in ast.unparse(statements[-1])
    rewards, margins = torch.randn(8), torch.rand(4)
    inputs = {} if margin is None else {"margin": margins}
    args = SimpleNamespace(args=SimpleNamespace(center_rewards_coefficient=0.01))
    theirs = execute(
        statements, self=args, inputs=inputs, outputs=SimpleNamespace(logits=rewards[:, None]), nn=torch.nn
    ).loss
    ours = losses.bradley_terry(*rewards.chunk(2), margin=None if margin is None else margins, centering=0.01)
    torch.testing.assert_close(ours.mean(), theirs)


def test_metrics_by_hand():
    chosen, rejected = torch.tensor([1.0, 2.0, 4.0, 2.0], requires_grad=True), torch.tensor([0.0, 5.0, 2.0, 0.0])
    metrics = losses.reward_metrics(chosen, rejected)
    expected = {"min_reward": 0.0, "mean_reward": 2.0, "max_reward": 5.0, "accuracy": 0.75, "margin": 0.5}
    assert {name: value.item() for name, value in metrics.items()} == expected
    assert not any(value.requires_grad for value in metrics.values())
    assert all(value.isfinite() for value in losses.reward_metrics(torch.zeros(0), torch.zeros(0)).values())


# Strengths from a table of wins.


def test_strengths_from_two_pairs():
    """Results 8:4 and 3:5. The games form a tree, so every pair's own odds are fitted exactly."""
    fit = losses.bradley_terry_mle(table(3, AB=(8, 4), AC=(3, 5)))
    exactly = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fit.strengths, torch.tensor([1, 1 / 2, 5 / 3], dtype=F64), **exactly)
    assert fit.win_probability[1, 2].item() == pytest.approx(3 / 13, rel=1e-12)  # (1/2) / (1/2 + 5/3) = 0.2308
    # the variance of log-odds: 1 / wins + 1 / losses
    errors = torch.tensor([0, 1 / 8 + 1 / 4, 1 / 3 + 1 / 5], dtype=F64).sqrt()
    torch.testing.assert_close(fit.standard_errors, errors, **exactly)
    assert fit.strengths.dtype == fit.standard_errors.dtype == fit.win_probability.dtype == F64


def test_strengths_from_all_pairs():
    """Results 3:1, 1:1 and 1:1: the expected wins equal the actual 4, 2 and 2."""
    wins = table(3, AB=(3, 1), AC=(1, 1), BC=(1, 1))
    fit = losses.bradley_terry_mle(wins)
    torch.testing.assert_close(fit.strengths, torch.tensor([1, 0.4320, 0.6573], dtype=F64), rtol=0, atol=5e-5)
    expected = ((wins + wins.T) * fit.win_probability).sum(1)
    torch.testing.assert_close(expected, wins.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(fit.win_probability + fit.win_probability.T, torch.ones(3, 3, dtype=F64))


def test_strengths_maximise_the_likelihood(seed):
    """At the strengths the gradient of the likelihood is 0, and its curvature gives the standard errors."""
    n = 6
    wins = torch.randint(1, 30, (n, n)).double().fill_diagonal_(0)
    fit = losses.bradley_terry_mle(wins)

    def negative_log_likelihood(rest):
        scores = torch.cat([torch.zeros(1, dtype=F64), rest])
        return -(wins * torch.log(torch.sigmoid(scores[:, None] - scores[None]))).sum()

    rest = fit.strengths.log()[1:]
    slope = torch.autograd.functional.jacobian(negative_log_likelihood, rest)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9 * wins.sum().item())
    curvature = torch.autograd.functional.hessian(negative_log_likelihood, rest)
    torch.testing.assert_close(fit.standard_errors[1:], torch.linalg.inv(curvature).diagonal().sqrt())


def test_strengths_are_recovered_in_any_order(seed):
    n = 8
    truth = torch.exp(2 * torch.randn(n, dtype=F64))
    probability = truth[:, None] / (truth[:, None] + truth[None])
    fit = losses.bradley_terry_mle((probability * 100).fill_diagonal_(0))  # wins equal their expectation, without noise
    torch.testing.assert_close(fit.strengths, truth / truth[0], rtol=1e-9, atol=0)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(n - 1)])
    wins = torch.randint(1, 9, (n, n)).fill_diagonal_(0)
    first, second = losses.bradley_terry_mle(wins), losses.bradley_terry_mle(wins[order][:, order])
    torch.testing.assert_close(first.strengths[order], second.strengths, rtol=1e-11, atol=0)
    torch.testing.assert_close(first.standard_errors[order], second.standard_errors, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("games", (1e-6, 1.0, 1e9))
@pytest.mark.parametrize("odds", (1.0, 1e9))
def test_uneven_tables(games, odds):
    fit = losses.bradley_terry_mle(table(2, AB=(odds * games, games)))
    torch.testing.assert_close(fit.strengths, torch.tensor([1, 1 / odds], dtype=F64), rtol=1e-9, atol=0)


def test_one_player():
    fit = losses.bradley_terry_mle(torch.zeros(1, 1))
    assert (fit.strengths.item(), fit.standard_errors.item(), fit.win_probability.item()) == (1.0, 0.0, 0.5)


BAD = [
    (table(2, AB=(3, 0)), "A never lost to B, .*such as 0.5 to both"),
    (table(3, AB=(1, 1), AC=(1, 0), BC=(2, 0)), "C never beat A, B"),
    (table(3, AB=(1, 1)), "A, B never played C"),
    (table(4, AB=(1, 1), CD=(1, 1)), "A, B never played C, D"),
    (table(4, AB=(1, 1), CD=(1, 1), CA=(2, 0)), "C, D never lost to A, B"),
    (table(2, AB=(-1, 1)), r"wins: got -1.0 at \(0, 1\), allowed are finite numbers >= 0"),
    (table(2, AB=(math.nan, 1)), r"wins: got nan at \(0, 1\)"),
    (torch.ones(2, 3), r"wins: got shape \(2, 3\), expected \[n, n\]"),
    (torch.ones(2, 2), "on the diagonal, expected zeros"),
]


@pytest.mark.parametrize("wins, message", BAD, ids=[row[1][:30] for row in BAD])
def test_tables_without_strengths(wins, message):
    with pytest.raises(ValueError, match=message):
        losses.bradley_terry_mle(wins, names="ABCD"[: len(wins)])


def test_adding_a_little_to_all_counts_gives_strengths():
    fit = losses.bradley_terry_mle(table(2, AB=(3.5, 0.5)))
    assert fit.strengths[1].item() == pytest.approx(1 / 7)


CALLS = [
    (lambda: losses.bradley_terry(torch.zeros(2), torch.zeros(3)), "rejected_rewards: got shape"),
    (lambda: losses.bradley_terry(torch.zeros(2), torch.zeros(2), margin=torch.zeros(3)), "margin: got shape"),
    (lambda: losses.bradley_terry(torch.zeros(2), torch.zeros(2), margin=math.nan), "margin: got nan"),
    (lambda: losses.bradley_terry(torch.zeros(2), torch.zeros(2), centering=-1.0), "centering: got -1.0"),
    (lambda: losses.plackett_luce(torch.zeros(2)), r"rewards: got shape \(2,\), expected \[B, K\]"),
    (lambda: losses.plackett_luce(torch.zeros(2, 3), torch.ones(2)), "mask: got shape"),
    (lambda: losses.bradley_terry_mle(torch.zeros(2, 2), names=["A"]), "names: got length 1, expected 2"),
]


@pytest.mark.parametrize("call, message", CALLS, ids=[row[1][:30] for row in CALLS])
def test_bad_call(call, message):
    with pytest.raises(ValueError, match=message):
        call()
