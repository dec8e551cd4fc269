"""`policy_loss_from_logits` with PyTorch's features: launches, in place, opcheck, torch.compile, errors."""

import math

import pytest
import torch
from numerics import BACKENDS, DEVICE, count_launches, random_labels
from policy_problems import given, problem
from registered_ops import opcheck

import fused_po
from fused_po.backend.interface import Form
from fused_po.ops.policy import PolicySettings


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_launch_forward_and_the_gradient_in_the_logits(backend, seed):
    t = problem(torch.bfloat16, 2, 3, 300)
    how = {"loss_type": "grpo", "entropy_coef": 0.1, "backend": backend}
    x = t["logits"].clone().requires_grad_()
    with count_launches() as forward:
        out = fused_po.policy_loss_from_logits(x, *given(t), **how)
    with count_launches() as backward:
        out.loss.backward()
    assert torch.equal(x.detach(), t["logits"])
    y = t["logits"].clone().requires_grad_() * 1
    with count_launches() as forward_:
        loss = fused_po.policy_loss_from_logits(y, *given(t), inplace_backward=True, **how).loss
    with count_launches() as backward_:
        grad = torch.autograd.grad(loss, y, retain_graph=True)[0]
    assert grad.data_ptr() == y.data_ptr()
    torch.testing.assert_close(grad, x.grad)
    if backend == "triton":
        assert forward == forward_ == ["policy_kernel"]
        assert (backward, backward_) == (["gradient_kernel"], ["scale_kernel"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_incoming_gradient_is_multiplied_in(backend, seed):
    """As under gradient accumulation or a loss scaler. For a power of two the product is exact in bf16."""
    t = problem(torch.bfloat16, 2, 3, 9001)
    grads = []
    for factor in (1.0, 0.25, 3.0):
        x = t["logits"].clone().requires_grad_()
        out = fused_po.policy_loss_from_logits(
            x * 1, *given(t), loss_type="dapo", inplace_backward=True, backend=backend
        )
        (out.loss * factor).backward()
        grads.append(x.grad)
    assert torch.equal(grads[1], grads[0] * 0.25) and torch.equal(grads[2], grads[0] * 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_gradients_are_scaled_before_rounding(backend, seed):
    t = problem(torch.float16, 2, 3, 300)
    weights = torch.full((2, 3), 1e-6, device=DEVICE)
    x = t["logits"].clone().requires_grad_()
    how = {"loss_type": "ppo", "weights": weights, "inplace_backward": True, "backend": backend}
    (fused_po.policy_loss_from_logits(x * 1, *given(t), **how).loss * 65536).backward()
    y = t["logits"].float().requires_grad_()
    fused_po.policy_loss_from_logits(
        y, *given(t), loss_type="ppo", weights=weights * 65536, backend=backend
    ).loss.backward()
    torch.testing.assert_close(x.grad, y.grad.half())
    assert ((x.grad != 0) == (y.grad.half() != 0)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gradient_nothing_is_overwritten(backend, seed):
    t = problem(torch.float32)
    before = t["logits"].clone()
    how = {"loss_type": "ppo", "inplace_backward": True, "backend": backend}
    out = fused_po.policy_loss_from_logits(t["logits"], *given(t), **how)
    with torch.no_grad():
        again = fused_po.policy_loss_from_logits(before.clone().requires_grad_(), *given(t), **how)
    assert torch.equal(t["logits"], before) and not out.loss.requires_grad and torch.equal(again.loss, out.loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, seed):
    logits = torch.randn(2, 3, 37, device=DEVICE, requires_grad=True)
    numbers = [torch.randn(6, device=DEVICE) for _ in range(4)]
    settings = PolicySettings(Form("clip", 0.8, 1.2, math.inf, "k3", 0.1, True, 0.2), 1.5, False, backend)
    first = random_labels(6, 37, "some"), *numbers, settings
    opcheck("policy_fwd", logits, *first)
    opcheck("policy_fwd_", logits.detach(), *first)
    opcheck("policy_scale_", logits.detach(), numbers[0].sum(), backend)
    link, without_autograd = torch.ops.fused_po.policy_link, ("test_schema", "test_faketensor")
    torch.library.opcheck(link, (logits, numbers[0].sum(), backend), test_utils=without_autograd)


@pytest.mark.parametrize(
    "backend, loss_type, inplace",
    (("reference", "grpo", False), ("reference", "gspo", True), ("reference", "grpo", True), ("triton", "grpo", True)),
)
def test_fullgraph_compile(backend, loss_type, inplace, seed):
    torch.compiler.reset()
    t = problem(torch.float32, kl="k3")
    hidden, head = torch.randn(3, 4, 6, device=DEVICE), torch.randn(70, 6, device=DEVICE)

    def run(hidden, head):
        how = {"loss_type": loss_type, "kl": "k3", "kl_coef": 0.1, "inplace_backward": inplace, "backend": backend}
        out = fused_po.policy_loss_from_logits(hidden @ head.T, *given(t), **how)
        return out.loss, out.logps

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss, logps = function(*leaves)
        (2 * loss).backward()
        results.append((loss, logps, *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


LOGITS, LABELS, A, REF = torch.randn(4, 3, 9), torch.zeros(4, 3, dtype=torch.long), torch.randn(4), torch.zeros(4, 3)


def call(x=LOGITS, y=LABELS, a=A, *more, loss_type="ppo", **how):
    return fused_po.policy_loss_from_logits(x, y, a, *more, loss_type=loss_type, **how)


BAD = [
    (lambda: call(LOGITS[0], LABELS[0]), ValueError, r"logits: got shape \(3, 9\), expected \[B, T, V\]"),
    (lambda: call(y=LABELS[:2]), ValueError, r"labels: got shape \(2, 3\), expected \(4, 3\)"),
    (lambda: call(y=LABELS + 9), ValueError, "labels: got 9 at flat position 0"),
    (lambda: call(a=A[:3]), ValueError, r"advantages: got shape \(3,\), expected \(4,\), one per answer"),
    (lambda: call(a=A * torch.nan), ValueError, "advantages: got nan at flat position 0"),
    (lambda: call(a=None), ValueError, "advantages: got None with loss_type='ppo'"),
    (lambda: call(loss_type="sft"), ValueError, "advantages: got a tensor with loss_type='sft'"),
    (lambda: call(LOGITS, LABELS, A, REF[:2]), ValueError, r"old_logps: got shape \(2, 3\)"),
    (lambda: call(LOGITS, LABELS, A, REF + torch.inf), ValueError, "old_logps: got inf at flat position 0"),
    (lambda: call(LOGITS, LABELS, A, REF, loss_type="reinforce"), ValueError, "old_logps: got a tensor, used only"),
    (lambda: call(LOGITS, LABELS, A, None, REF), ValueError, "ref_logps: got a tensor with kl=None"),
    (lambda: call(kl="k3"), ValueError, "ref_logps: got None with kl='k3'"),
    (lambda: call(LOGITS, LABELS, A, None, REF, kl="k1"), ValueError, "kl: got 'k1', allowed are None, 'k2', 'k3'"),
    (lambda: call(kl_coef=0.1), ValueError, "kl_coef: got 0.1 with kl=None; set kl to 'k2' or 'k3'"),
    (lambda: call(entropy_coef=-1), ValueError, "entropy_coef: got -1"),
    (lambda: call(LOGITS, LABELS, A, None, None, REF[:2]), ValueError, r"mask: got shape \(2, 3\)"),
    (lambda: call(weights=REF[:2]), ValueError, r"weights: got shape \(2, 3\)"),
    (lambda: call(loss_type="gmpo"), ValueError, "loss_type: got 'gmpo', allowed are 'ppo'"),
    (lambda: call(loss_type="dr_grpo"), ValueError, r"weights: got None with loss_type='dr_grpo'.*token_weights"),
    (lambda: call(clip=0.2), ValueError, "clip: got 0.2, not a setting of loss_type='ppo', which has epsilon"),
    (
        lambda: call(loss_type="grpo", dual_clip=3.0),
        ValueError,
        "dual_clip: got 3.0, not a setting of loss_type='grpo'",
    ),
    (
        lambda: call(a=None, loss_type="sft", epsilon=0.1),
        ValueError,
        "epsilon: got 0.1, not a setting of .*'sft', which has none",
    ),
    (lambda: call(epsilon=0.0), ValueError, "epsilon: got 0.0"),
    (lambda: call(dual_clip=3.0, delta=3.0), ValueError, "delta: got 3.0 with dual_clip"),
    (lambda: call(loss_type="sapo", sapo_temperature_neg=0.0), ValueError, "sapo_temperature_neg: got 0.0"),
    (lambda: call(loss_type="cispo", importance_sampling_level="sequence"), ValueError, "importance_sampling_level"),
    (lambda: call(use_bias_correction_kl=False), ValueError, "use_bias_correction_kl: got False, used only with kl"),
    (lambda: call(temperature=0.0), ValueError, "temperature: got 0.0"),
    (lambda: call(backend="tritn"), ValueError, "backend: got 'tritn'"),
]


@pytest.mark.parametrize("bad, error, message", BAD, ids=[row[2][:25] for row in BAD])
def test_bad_call(bad, error, message):
    with pytest.raises(error, match=message):
        bad()


def test_a_good_call_of_the_same_shapes():
    assert call(LOGITS, LABELS, A, REF, REF, REF == 0, kl="k3").loss.isfinite()
