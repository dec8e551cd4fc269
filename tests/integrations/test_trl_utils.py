"""TRL's functions of logits and its fused head under the patch, as its own tests of trl.trainer.utils check them.

Also the line that `patch` logs, and `is_patched`.
"""

import logging

import pytest
import torch
from trl.trainer import utils

from fused_po import Schedule
from fused_po.integrations.trl import is_patched, patch, patched, unpatch

LOW = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *LOW)


@pytest.fixture(autouse=True)
def restored():
    yield
    unpatch()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((48,), (7, 48), (2, 7, 48), (2, 2, 3, 48)), ids=str)
def test_the_dtype_of_the_logits(dtype, shape, seed):
    """Results have the dtype of the logits; on a CPU low-precision results are bitwise TRL's own."""
    logits, index = torch.randn(shape).to(dtype) * 3, torch.randint(0, 48, shape[:-1])
    mask = torch.rand(shape[:-1]) < 0.7
    calls = {"entropy": lambda: utils.entropy_from_logits(logits, chunk_size=4)}
    if len(shape) > 1:
        calls["log-probs"] = lambda: utils.selective_log_softmax(logits, index)
        calls["masked"] = lambda: utils.selective_log_softmax(logits, index, temperature=0.7, row_mask=mask)
        calls["top"] = lambda: utils.selective_log_softmax(logits, index[..., None].expand(*index.shape, 2))
        calls["both"] = lambda: torch.stack(utils.selective_log_softmax_and_entropy(logits, index, row_mask=mask))
    stock = {name: call() for name, call in calls.items()}
    with patched():
        ours = {name: call() for name, call in calls.items()}
    for name, value in stock.items():
        assert ours[name].dtype == value.dtype == dtype and ours[name].shape == value.shape, name
        if dtype in LOW:
            assert torch.equal(ours[name], value), name
        else:
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


def test_low_precision_gradients_are_trls(seed):
    logits, index = torch.randn(2, 5, 48).bfloat16(), torch.randint(0, 48, (2, 5))
    grads = []
    for context in (None, patched):
        leaf = logits.clone().requires_grad_()
        if context is not None:
            patch()
        logps, entropy = utils.selective_log_softmax_and_entropy(leaf, index)
        (logps.sum() + 0.3 * entropy.sum()).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].dtype == torch.bfloat16


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_bf16_gradients_of_the_head_err_less_than_trls(temperature):
    """Compared with float64, our bf16 gradients have a third of the error of TRL's.

    TRL's own test compares its head with bf16 logits at a tolerance of 1e-2. There 1 to 9% of our gradients are
    outside; with float64 as the target as many of TRL's are outside, and none of ours.
    """
    for seed in range(42, 46):
        torch.manual_seed(seed)
        hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(128, 32).bfloat16()
        labels = torch.randint(0, 128, (64,))

        def gradients(score, dtype, hidden=hidden, weight=weight):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
            score(*leaves).sum().backward()
            return [leaf.grad.double() for leaf in leaves]

        def plain(h, w, labels=labels):
            return ((h @ w.T) / temperature).log_softmax(-1).gather(-1, labels[:, None])

        def head(h, w, labels=labels):
            return utils._ChunkedLogProbFunction.apply(h, w, None, labels, temperature, 32)[0]

        truth, stock = gradients(plain, torch.float64), gradients(head, torch.bfloat16)
        with patched():
            ours = gradients(head, torch.bfloat16)
        for exact, theirs, mine in zip(truth, stock, ours):
            errors = [(value - exact).square().mean().sqrt() for value in (theirs, mine)]
            assert errors[1] < 0.5 * errors[0]
            outside = [((v - exact).abs() > 1e-2 + 1e-2 * exact.abs()).double().mean() for v in (theirs, mine)]
            assert outside[1] == 0 < outside[0]


def test_is_patched():
    assert not is_patched()
    patch()
    assert is_patched()
    with patched():
        assert is_patched()
    assert is_patched()
    unpatch()
    assert not is_patched()
    with patched():
        assert is_patched()
    assert not is_patched()


def test_patch_logs_one_line(caplog):
    """Each call of patch logs schedule, backend and trainers; restoring logs nothing."""
    caplog.set_level(logging.INFO, logger="fused_po.integrations.trl")
    patch()
    patch(Schedule(logits_budget=123))
    with patched():
        pass
    unpatch()
    lines = [record.getMessage() for record in caplog.records if record.name == "fused_po.integrations.trl"]
    assert len(lines) == 3 and all("\n" not in line for line in lines)
    assert "logits_budget=None" in lines[0] and "logits_budget=123" in lines[1]
    for part in ("TRL 1.", "reference on CPU", "DPO, KTO, SFT, GRPO, RLOO", "A2POTrainer", "ORPOTrainer", "TPOTrainer"):
        assert part in lines[0]
    assert {record.levelno for record in caplog.records if record.name == "fused_po.integrations.trl"} == {logging.INFO}


def test_a_failing_patch_logs_nothing(caplog, monkeypatch):
    import trl

    caplog.set_level(logging.INFO, logger="fused_po.integrations.trl")
    monkeypatch.setattr(trl, "__version__", "1.2.0")
    with pytest.raises(RuntimeError, match=r"got version 1\.2\.0"):
        patch()
    assert not is_patched() and not caplog.records
