"""PyTorch's sample inputs (OpInfo), with unusual shapes, strides and offsets, through our ops against float64."""

import pytest
import torch
from numerics import DEVICE

import fused_po

database = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations", reason="torch has no OpInfo samples here"
)
BACKENDS = ("reference", pytest.param("triton", marks=pytest.mark.slow))  # interpreted rows take time
SAMPLES = {"reference": 200, "triton": 6}  # samples of each operator


def samples(name: str, count: int):
    """float32 tensors and arguments of the first samples of an operator."""
    for op in (op for op in database.op_db if op.name == name):
        yield from zip(range(count), op.sample_inputs(DEVICE, torch.float32, requires_grad=False))


def assert_logps(
    what: str, logits: torch.Tensor, exact: torch.Tensor, ours: torch.Tensor, labels: torch.Tensor
) -> None:
    """The bound is twice float32 log_softmax's error in the row, plus one rounding of the row's largest number."""
    pick = labels.long()[..., None]
    expected = exact.log_softmax(-1).gather(-1, pick)[..., 0]
    plain = logits.log_softmax(-1).gather(-1, pick)[..., 0]
    scale = exact.abs().amax(-1) + expected.abs() + 1
    bound = 2 * (plain - expected).abs() + 4 * torch.finfo(torch.float32).eps * scale
    assert ours.shape == expected.shape and ((ours - expected).abs() <= bound).all(), what


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("log_softmax", "softmax", "logsumexp", "nn.functional.cross_entropy"))
def test_logits(name, backend, seed):
    tried = 0
    for number, sample in samples(name, SAMPLES[backend]):
        logits = sample.input
        if logits.ndim < 1 or not logits.numel():
            continue
        labels = torch.randint(0, logits.shape[-1], (*logits.shape[:-1], 2), device=DEVICE)[..., 0]  # strided
        ours = fused_po.logps_from_logits(logits, labels, backend=backend).logps
        assert_logps(f"{name} {number}", logits, logits.double(), ours, labels)
        tried += 1
    assert tried >= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads(backend, seed):
    tried = 0
    for number, sample in samples("nn.functional.linear", SAMPLES[backend]):
        hidden, (weight, *bias) = sample.input, sample.args
        if weight.ndim != 2 or not weight.numel() or not hidden.numel():
            continue
        bias = bias[0] if bias else sample.kwargs.get("bias")
        labels = torch.randint(0, len(weight), (*hidden.shape[:-1], 2), device=DEVICE)[..., 1]  # strided, offset
        ours = fused_po.linear_logps(hidden, weight, labels, bias, backend=backend).logps
        wide = None if bias is None else bias.double()
        exact = torch.nn.functional.linear(hidden.double(), weight.double(), wide)
        assert_logps(f"linear {number}", torch.nn.functional.linear(hidden, weight, bias), exact, ours, labels)
        tried += 1
    assert tried >= 3
