"""Every row of the zoo: values worked out by hand, an oracle in float64, gradcheck, extremes, coverage."""

import inspect

import pytest
import torch
from numerics import assert_close
from zoo import F64, TABLE, backward, tensors

from fused_po import losses

every_row = pytest.mark.parametrize("row", TABLE, ids=[row.id for row in TABLE])
DISTANCES = (0.0, 1.0, -1.0, 30.0, -30.0, 100.0, -100.0, 1e4, -1e4)


@every_row
def test_value_worked_out_by_hand(row):
    value = row.run(*tensors(row.values))
    torch.testing.assert_close(value, torch.tensor(row.expected, dtype=F64).expand_as(value), rtol=1e-12, atol=1e-12)


@every_row
def test_float64_against_the_oracle(row, seed):
    inputs = row.sample()
    value, grads = backward(row, row.run, inputs)
    exact, exact_grads = backward(row, row.oracle, inputs)
    torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-10)
    for i, (grad, expected) in enumerate(zip(grads, exact_grads)):
        if i in row.grads:
            torch.testing.assert_close(
                grad, expected, rtol=1e-9, atol=1e-9, msg=f"gradient {i}: {grad} is not {expected}"
            )
        else:
            assert grad is None or not grad.any(), f"input {i} must get no gradient"


@every_row
def test_fp32_errs_no_more_than_plain_pytorch(row, seed):
    problems, ours = [], []
    for i in range(256):
        inputs = [v.float() if v.is_floating_point() else v for v in row.sample()]
        exactly = [v.double() if v.is_floating_point() else v for v in inputs]
        exact = row.oracle(*exactly)
        problems.append((row.oracle(*inputs), exact))
        if i < 4:
            ours.append((row.run(*inputs), exact))
    assert_close(row.id, *(torch.cat([pair[i].flatten() for pair in ours]) for i in (0, 1)), problems)


@pytest.mark.parametrize("row", [r for r in TABLE if r.true_gradient], ids=[r.id for r in TABLE if r.true_gradient])
def test_gradcheck(row, seed):
    inputs = [v.requires_grad_(i in row.grads) for i, v in enumerate(row.sample())]
    assert torch.autograd.gradcheck(row.run, inputs)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("row", [r for r in TABLE if r.extremes], ids=[r.id for r in TABLE if r.extremes])
def test_extremes_stay_finite(row, distance):
    value, grads = backward(row, row.run, row.extremes(distance))
    assert value.isfinite().all(), value
    for i in row.grads:
        assert grads[i].isfinite().all(), grads[i]


def test_every_loss_has_a_row_that_names_its_peers():
    """Every function that `losses` exports is in the table or in NOT_LOSSES, and every row names its peers."""
    rows = {row.name for row in TABLE}
    functions = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    missing = functions - rows - set(NOT_LOSSES)
    assert not missing, f"no row for {sorted(missing)}"
    assert set(NOT_LOSSES) <= functions, "NOT_LOSSES names functions that do not exist"
    assert rows <= functions
    silent = [row.id for row in TABLE if not row.peers]
    assert not silent, f"no peers given: {silent}"


# Functions in `losses` that are not losses, and the tests that cover them.
NOT_LOSSES: dict[str, str] = {
    "importance_weights": "test_policy.py",
    "off_policy_sequence_mask": "test_policy.py",
    "policy_metrics": "test_policy.py",
    "top_entropy_mask": "test_policy.py",
    "alphapo_reward": "the alphapo rows",
    "bradley_terry_mle": "test_reward.py",
    "f_divergence_score": "test_pairwise.py",
    "group_advantages": "test_advantages.py",
    "kl_estimate": "test_divergence.py",
    "kl_in_reward": "test_divergence.py",
    "kto_kl": "test_unpaired.py",
    "leave_one_out_advantages": "test_advantages.py",
    "log_odds_ratio": "the orpo rows",
    "masked_mean": "test_pairwise.py",
    "odds_ratio_metrics": "test_pairwise.py",
    "preference_metrics": "test_pairwise.py",
    "reinforce_plus_plus_advantages": "test_advantages.py",
    "reinforce_plus_plus_baseline_advantages": "test_advantages.py",
    "reward_metrics": "test_reward.py",
    "token_metrics": "test_pairwise.py",
    "udm_weights": "test_unpaired.py",
    "unpaired_metrics": "test_unpaired.py",
    "whiten": "test_advantages.py",
    "wpo_weights": "test_pairwise.py",
}
