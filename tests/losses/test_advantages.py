"""Advantages without a value function: values worked out by hand, loops over groups, TRL's formulas, bad input."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_po import losses

F64 = torch.float64
FEW = settings(max_examples=60, deadline=None)


def f64(*values):
    return torch.tensor(values, dtype=F64)


@st.composite
def grouped(draw):
    """(rewards, group ids) in float64; groups have any size and order."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    names = draw(st.lists(st.integers(-(2**40), 2**40), min_size=len(sizes), max_size=len(sizes), unique=True))
    ids = draw(st.permutations([name for name, size in zip(names, sizes) for _ in range(size)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards = torch.randn(len(ids), generator=generator, dtype=F64)
    if draw(st.booleans()):
        rewards = rewards.round()  # some of them equal
    return rewards, torch.tensor(ids)


def members(rewards, ids, i):
    return [float(r) for r, g in zip(rewards, ids) if g == ids[i]]


@FEW
@given(grouped(), st.sampled_from(("group", "batch", "none")))
def test_group_advantages_against_the_loop(case, scale):
    rewards, ids = case
    eps = None if scale == "none" else 1e-3
    for i, got in enumerate(losses.group_advantages(rewards, ids, scale=scale, eps=eps)):
        group = members(rewards, ids, i)
        spread = {"group": group, "batch": rewards.tolist(), "none": []}[scale]
        std = statistics.stdev(spread) + eps if len(spread) > 1 else 1.0
        expected = (float(rewards[i]) - statistics.mean(group)) / std if len(group) > 1 else 0.0
        assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@FEW
@given(grouped())
def test_leave_one_out_against_the_loop(case):
    rewards, ids = case
    for i, got in enumerate(losses.leave_one_out_advantages(rewards, ids)):
        group = members(rewards, ids, i)
        others = (sum(group) - float(rewards[i])) / max(1, len(group) - 1)
        expected = float(rewards[i]) - others if len(group) > 1 else 0.0
        assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_by_hand():
    # mean 2, std sqrt((1 + 0 + 1) / 2) = 1: (r - 2) / (1 + 1e-4)
    got = losses.group_advantages(f64(1, 2, 3, 5, 5, 5), 3)
    torch.testing.assert_close(got, f64(-1, 0, 1, 0, 0, 0) / 1.0001, rtol=1e-12, atol=0)
    # 1 - (2 + 3) / 2, 2 - (1 + 3) / 2, 3 - (1 + 2) / 2
    assert losses.leave_one_out_advantages(f64(1, 2, 3), 3).tolist() == [-1.5, 0.0, 1.5]
    # mean 2, variance 1 (of n - 1) or 2 / 3 (of n)
    torch.testing.assert_close(losses.whiten(f64(1, 2, 3), eps=0.0), f64(-1, 0, 1))
    torch.testing.assert_close(losses.whiten(f64(1, 2, 3), unbiased=False, eps=0.0), f64(-1, 0, 1) * math.sqrt(1.5))
    torch.testing.assert_close(losses.whiten(f64(1, 2, 3), eps=3.0, shift_mean=False), f64(1.5, 2, 2.5))


def test_a_group_size_means_consecutive_ids(seed):
    rewards = torch.randn(12)
    for function in (losses.group_advantages, losses.leave_one_out_advantages):
        assert torch.equal(function(rewards, 4), function(rewards, torch.arange(12) // 4 * 7 - 100))


@pytest.mark.parametrize("scale", ("group", "batch"))
def test_group_advantages_equal_trls(scale, seed):
    """TRL's grpo_trainer: (rewards - group mean) / (std with n - 1 + 1e-4)."""
    rewards = torch.randn(24, dtype=F64)
    groups = rewards.view(-1, 4)
    std = groups.std(1, keepdim=True) if scale == "group" else rewards.std()
    expected = ((groups - groups.mean(1, keepdim=True)) / (std + 1e-4)).flatten()
    torch.testing.assert_close(losses.group_advantages(rewards, 4, scale=scale), expected)


@pytest.mark.parametrize("reward", (0.1, -7.3, 1e4, 1 / 3))
@pytest.mark.parametrize("eps", (1e-4, 1e-9, 0.0))
def test_equal_rewards_give_exactly_0(reward, eps):
    """The mean of seven equal fp32 numbers is rarely that number; its error divided by eps would be an advantage."""
    rewards = torch.full((21,), reward)
    assert not losses.group_advantages(rewards, 7, eps=eps).any()
    assert not losses.group_advantages(rewards, 7, scale="batch", eps=eps).any()
    assert not losses.leave_one_out_advantages(rewards, 7).any()
    assert not losses.whiten(rewards, eps=eps).any()
    assert torch.equal(losses.whiten(rewards, shift_mean=False, eps=eps), rewards)


def test_single_answers_give_0():
    rewards = torch.tensor([3.0, -2.0])
    for scale in ("group", "batch", "none"):
        assert losses.group_advantages(rewards, 1, scale=scale).tolist() == [0, 0]
    assert losses.leave_one_out_advantages(rewards, torch.tensor([5, 9])).tolist() == [0, 0]
    assert losses.whiten(rewards, torch.tensor([True, False])).tolist() == [0, 0]


def test_nothing():
    none = torch.zeros(0)
    for scale in ("group", "batch", "none"):
        assert losses.group_advantages(none, 4, scale=scale).shape == (0,)
    assert losses.leave_one_out_advantages(none, none.long()).shape == (0,)
    assert losses.whiten(torch.zeros(2, 0)).shape == (2, 0)
    assert losses.whiten(torch.full((2, 3), torch.nan), torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    assert losses.reinforce_plus_plus_advantages(torch.zeros(2, 0)).shape == (2, 0)


def discounted(rewards, mask, gamma):
    """Rewards-to-go over the unmasked tokens, token by token."""
    out = torch.zeros_like(rewards)
    for row, m, target in zip(rewards, mask, out):
        running = 0.0
        for t in reversed(m.nonzero().flatten().tolist()):
            running = float(row[t]) + gamma * running
            target[t] = running
    return out


@pytest.mark.parametrize("gamma", (1.0, 0.9, 0.0))
@pytest.mark.parametrize("unbiased", (True, False))
@pytest.mark.parametrize("masked", (True, False))
def test_reinforce_plus_plus(gamma, unbiased, masked, seed):
    rewards = torch.randn(4, 37, dtype=F64)
    mask = torch.rand(4, 37) < (0.6 if masked else 2.0)
    mask[2] &= not masked
    expected = discounted(rewards, mask, gamma)
    expected = (expected - expected[mask].mean()) / (expected[mask].var(unbiased=unbiased) + 1e-8).sqrt()
    given_mask = mask if masked else None
    broken = torch.where(mask, rewards, torch.nan)
    got = losses.reinforce_plus_plus_advantages(broken, given_mask, gamma=gamma, unbiased=unbiased)
    torch.testing.assert_close(got, torch.where(mask, expected, 0))


def test_reinforce_plus_plus_baseline(seed):
    rewards, mask = torch.randn(6, dtype=F64), torch.rand(6, 9) < 0.5
    centred = (rewards.view(2, 3) - rewards.view(2, 3).mean(1, keepdim=True)).flatten()[:, None].expand(6, 9)
    expected = (centred - centred[mask].mean()) / (centred[mask].var() + 1e-8).sqrt()
    got = losses.reinforce_plus_plus_baseline_advantages(rewards, 3, mask)
    torch.testing.assert_close(got, torch.where(mask, expected, 0))


CALLS = {
    "group_advantages": lambda r: losses.group_advantages(r[:, 0], 2),
    "batch": lambda r: losses.group_advantages(r[:, 0], torch.tensor([3, 1, 3, 1]), scale="batch"),
    "leave_one_out": lambda r: losses.leave_one_out_advantages(r[:, 0], 2),
    "whiten": lambda r: losses.whiten(r, torch.ones(4, 5)),
    "reinforce_plus_plus": lambda r: losses.reinforce_plus_plus_advantages(r, gamma=0.9),
    "baseline": lambda r: losses.reinforce_plus_plus_baseline_advantages(r[:, 0], 2, torch.ones(4, 5)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_constants_in_fp32_that_compile(call, seed):
    torch.compiler.reset()
    rewards = torch.randn(4, 5, requires_grad=True)
    value = call(rewards)
    assert not value.requires_grad
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(rewards), value)
    assert call(rewards.bfloat16()).dtype == torch.float32
    assert call(rewards.double()).dtype == F64


R, M = torch.zeros(6), torch.ones(6, 3)
NAN = torch.tensor([0.0, torch.nan, 0.0, 0.0])
BAD = [
    (lambda: losses.group_advantages(R, 4), ValueError, "groups: got size 4 for 6 rewards, expected a divisor"),
    (lambda: losses.group_advantages(R, 0), ValueError, "groups: got size 0"),
    (lambda: losses.group_advantages(R, True), TypeError, "groups: got bool, expected an integer size or a tensor"),
    (lambda: losses.group_advantages(R, R), TypeError, "groups: got dtype torch.float32"),
    (
        lambda: losses.group_advantages(R, torch.zeros(5).long()),
        ValueError,
        r"groups: got shape \(5,\), expected \(6,\)",
    ),
    (lambda: losses.group_advantages(R, 2, scale="grup"), ValueError, "scale: got 'grup'.*did you mean 'group'"),
    (lambda: losses.group_advantages(R, 2, scale="none", eps=1e-4), ValueError, "eps: got 0.0001, expected None"),
    (lambda: losses.group_advantages(R, 2, eps=-1.0), ValueError, "eps: got -1.0, allowed are numbers >= 0"),
    (lambda: losses.group_advantages(M, 2), ValueError, r"rewards: got shape \(6, 3\), expected \[B\]"),
    (lambda: losses.group_advantages(NAN, 2), ValueError, "rewards: got nan at flat position 1"),
    (lambda: losses.leave_one_out_advantages(NAN, 2), ValueError, "rewards: got nan at flat position 1"),
    (lambda: losses.whiten(NAN), ValueError, "values: got nan at flat position 1"),
    (lambda: losses.whiten(R, R[:2]), ValueError, r"mask: got shape \(2,\), expected \(6,\)"),
    (lambda: losses.whiten(R, eps=-1.0), ValueError, "eps: got -1.0"),
    (lambda: losses.reinforce_plus_plus_advantages(R), ValueError, r"rewards: got shape \(6,\), expected \[B, T\]"),
    (
        lambda: losses.reinforce_plus_plus_advantages(M, gamma=1.1),
        ValueError,
        "gamma: got 1.1, allowed are numbers from 0",
    ),
    (lambda: losses.reinforce_plus_plus_baseline_advantages(R, 2, M[:2]), ValueError, r"mask: got shape \(2, 3\)"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[row[2] for row in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
