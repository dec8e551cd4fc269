"""Results do not depend on torch.set_default_dtype or torch.set_default_device."""

import warnings

import public_calls
import pytest
import torch
from public_calls import B, T, V, labels, normal
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fused_po
from fused_po import Schedule, losses, modules, selfcheck

TARGETS = [target for target in public_calls.every_target() if target.name != "RunningMean.update"]  # has a state


# Created on import, before any default changes.
ONE, TOKENS, HIDDEN, GROUPS = normal(B), normal(B, T), normal(B, T, 5), labels(B, T)
LOGITS, HEAD, SCORED = normal(B, T, V), normal(V, 5), torch.where(labels(B, T) > 2, labels(B, T), -100)
COUNTS = torch.arange(2000, 2007)


def running_mean() -> tuple:
    running = losses.RunningMean()
    return running.mean, running.update(ONE), running.update(ONE + 1)


def gradients(loss, *leaves: Tensor) -> tuple:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    value = loss(*leaves)
    return value, torch.autograd.grad(value, leaves)


def of_sequences() -> tuple:
    loss = modules.PolicyLoss(is_correction_level="seq", is_correction_threshold=(0.9, 1.1))
    return loss(TOKENS, TOKENS + 0.1, ONE, None, TOKENS.flip(0))


MORE = {
    "RunningMean": running_mean,
    "PolicyLoss of sequences": of_sequences,
    "masked_mean of integers": lambda: (
        losses.masked_mean(COUNTS),
        losses.masked_mean(SCORED, SCORED > 0),
    ),
    "default weights": lambda: gradients(
        lambda z: fused_po.policy_loss_from_logits(z, SCORED, ONE, loss_type="grpo").loss, LOGITS
    ),
    "default weights in place": lambda: gradients(
        lambda z: fused_po.policy_loss_from_logits(z * 1, SCORED, ONE, loss_type="dapo", inplace_backward=True).loss,
        LOGITS,
    ),
    "linear_logps": lambda: gradients(
        lambda h, w: fused_po.linear_logps(
            h, w, SCORED, outputs=("logps", "entropy"), schedule=Schedule(num_scored=B * T)
        ).logps.sum(),
        HIDDEN,
        HEAD,
    ),
    "linear_logps, frozen head": lambda: gradients(
        lambda h: fused_po.linear_logps(h, HEAD, SCORED).logps.sum(), HIDDEN
    ),
    "linear_kl": lambda: gradients(
        lambda h, w: fused_po.linear_kl(h, w, HIDDEN + 1, HEAD, SCORED, direction="js").kl.sum(),
        HIDDEN,
        HEAD + 1,
    ),
    "chunked_loss": lambda: gradients(
        lambda h, w: fused_po.chunked_loss(lambda stats, rows: stats.logps.sum(), h, w, SCORED, GROUPS),
        HIDDEN,
        HEAD,
    ),
    "dpo_from_logits": lambda: gradients(
        lambda z: fused_po.dpo_from_logits(z, SCORED, ref_logits=LOGITS + HEAD[:, 0], kl="k3", kl_coef=0.1).loss, LOGITS
    ),
}
CALLS = {target.name: lambda target=target: target.call(**target.good) for target in TARGETS} | MORE


def results(call) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = call()
    found = list(found.state_dict().values()) if isinstance(found, nn.Module) else tree_leaves(found)
    return [value for value in found if isinstance(value, Tensor)]


@pytest.fixture
def defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert [(v.dtype, v.device) for v in got] == [(v.dtype, v.device) for v in want]
    for ours, expected in zip(got, want):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_defaults_change_nothing(name, defaults):
    want = results(CALLS[name])
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        assert_equal(results(CALLS[name]), want)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    assert_equal(results(CALLS[name]), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_selfcheck_draws_the_same_problem(dtype, defaults):
    size = selfcheck.Size(2 * selfcheck.PAIRS, 7, 5)
    want = selfcheck.problem(size, torch.float32, "cpu", 3)
    torch.set_default_dtype(dtype)
    got = selfcheck.problem(size, torch.float32, "cpu", 3)
    assert_equal([*got.values()], [*want.values()])
