"""Triton's interpreter as users run it, in its own process: interpreted kernels round like hardware."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numerics import DEVICE

SCRIPT = """
import json, torch, fused_po
torch.manual_seed(0)
labels, errors = torch.randint(0, 50, (3,)), []
for offset in (0.0, 1e3, -1e4, 1e5):
    logits = torch.randn(3, 50) + offset
    exact = logits.double().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    ours = fused_po.logps_from_logits(logits, labels, backend="triton").logps
    plain = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    errors.append([float((v - exact).abs().max()) for v in (ours, plain)])
hidden, weight = torch.randn(6, 8).bfloat16(), torch.randn(40, 8).bfloat16()
low = (hidden.float() @ weight.float().T).bfloat16().requires_grad_()
fused_po.logps_from_logits(low, torch.arange(6), backend="triton").logps.sum().backward()
ours, low.grad = low.grad, None
fused_po.logps_from_logits(low, torch.arange(6), backend="reference").logps.sum().backward()
print(json.dumps([errors, float((ours.double() - low.grad.double()).abs().max() / low.grad.abs().max())]))
"""


def test_the_interpreter_rounds_like_hardware(tmp_path):
    """A large common offset loses no digits, and bf16 gradients are rounded to nearest instead of truncated."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    errors, bf16 = json.loads(done.stdout)
    unit = torch.finfo(torch.float32).eps
    for ours, plain in errors:
        assert ours <= 2 * plain + 8 * unit, errors
    assert bf16 <= torch.finfo(torch.bfloat16).eps / 2  # at most one of them rounds the other way


@pytest.mark.skipif(DEVICE == "cuda", reason="for interpreted kernels")
def test_fp32_to_bf16_is_torch_s(seed):
    """Random bits, NaN, infinities, ties, subnormals and the largest number."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    import fused_po

    assert fused_po.backends("cpu", torch.float32)["triton"].startswith("yes")
    bits = torch.randint(-(2**31), 2**31, (5000,)).to(torch.int32)
    special = [0, 1, 0x3F808000, 0x3F818000, 0x3F817FFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 0x7F800001, 0x00008000]
    bits = torch.cat(
        [bits, torch.tensor(special, dtype=torch.int32), torch.tensor(special, dtype=torch.int32) | -(2**31)]
    )
    values = bits.view(torch.float32)
    handle = TensorHandle(values.numpy(), tl.float32)
    got = InterpreterBuilder.create_fp_trunc(InterpreterBuilder(), handle, tl.bfloat16).data
    got, expected = torch.from_numpy(got.astype(np.int32)).to(torch.int16).view(torch.bfloat16), values.bfloat16()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int16), expected[~got.isnan()].view(torch.int16))
