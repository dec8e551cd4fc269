"""The ops with PyTorch's features: gradcheck, opcheck, torch.compile, autocast, checkpointing, determinism."""

import copy

import pytest
import torch
from numerics import BACKENDS, DEVICE, IGNORE, no_inductor, random_labels
from registered_ops import dispatched, opcheck

import fused_po
from fused_po.backend.interface import Outputs, SavedRow, Scaling
from fused_po.lm_head.head import Head
from fused_po.lm_head.plan import Dtypes, Needs
from fused_po.lm_head.scored import Dropping
from fused_po.ops.dpo import DPOLogitsSettings, DPOLoss, DPOSettings
from fused_po.ops.logps import GradientSettings, LogpsSettings
from fused_po.parallel.vocab import WHOLE

STATS = ("logps", "entropy", "lse")
SMALL = fused_po.Schedule(tile_bytes=600)


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("softcap", (None, 4.0))
def test_gradcheck_logits(softcap, seed):
    labels = random_labels(6, 11).view(2, 3)

    def run(logits):
        how = dict(temperature=0.7, logit_scale=1.2, softcap=softcap, outputs=STATS, backend="reference")
        return fused_po.logps_from_logits(logits, labels, **how)[:3]

    assert torch.autograd.gradcheck(run, doubles((2, 3, 11)))


@pytest.mark.parametrize("softcap", (None, 4.0))
@pytest.mark.parametrize("schedule", (None, SMALL), ids=("one tile", "many tiles"))
def test_gradcheck_linear(softcap, schedule, seed):
    labels = random_labels(6, 23).view(2, 3)

    def run(hidden, weight, bias):
        how = dict(temperature=0.7, softcap=softcap, outputs=STATS, backend="reference", schedule=schedule)
        return fused_po.linear_logps(hidden, weight, labels, bias, **how)[:3]

    assert torch.autograd.gradcheck(run, doubles((2, 3, 5), (23, 5), (23,)))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_only_tensors_that_require_grad_get_one(needs, dtype, seed):
    tensors = [torch.randn(s, device=DEVICE).to(dtype) for s in ((7, 6), (40, 6), (40,))]
    labels = random_labels(7, 40)

    def grads(flags):
        inputs = [t.clone().requires_grad_(flag) for t, flag in zip(tensors, flags)]
        fused_po.linear_logps(inputs[0], inputs[1], labels, inputs[2]).logps.sum().backward()
        return [t.grad for t in inputs]

    every, some = grads((True, True, True)), grads(needs)
    for need, one, full in zip(needs, some, every):
        assert (one is not None) == need
        if need:
            torch.testing.assert_close(one, full)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_logits(backend, seed):
    logits = torch.randn(2, 3, 37, device=DEVICE, requires_grad=True)
    labels = random_labels(6, 37, "none")
    settings = LogpsSettings(Scaling(1.5), IGNORE, Outputs(*(True,) * 6), False, backend, WHOLE)
    opcheck("logps_fwd", logits, labels, settings)
    scaling = Scaling(1.5, 0.2)
    stats = dispatched("logps_fwd", logits.detach(), labels, settings._replace(scaling=scaling))
    g = torch.randn(6, device=DEVICE)
    saved = stats.saved[: SavedRow.COUNT], stats.entropy, g, g, None, GradientSettings(scaling, backend)
    opcheck("logps_bwd", logits.detach(), labels, *saved)
    opcheck("logps_bwd_", logits.detach(), labels, *saved)


def head_settings(dtype, keep, backend):
    """With a gradient of the entropy, and memory for the bases of 3 rows."""
    outputs = Outputs(logps=True, entropy=True)
    return Head(Scaling(1.5), Dtypes(dtype, torch.float32), IGNORE, outputs, keep, 1 << 20, 700, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", ("nothing", "product", "basis"))
@pytest.mark.parametrize("compact", (True, False))
@pytest.mark.parametrize("rank", (0, pytest.param(2, marks=pytest.mark.slow)))
def test_opcheck_linear(backend, keep, compact, rank, seed):
    shapes = (6, 5 + rank), (37, 5), (37,), (37, rank)
    hidden, *head = (torch.randn(s, device=DEVICE, requires_grad=True) for s in shapes)
    if keep == "product":
        head = [t.detach() for t in head]
    weight, bias, low = head if rank else (*head[:2], None)
    labels = random_labels(6, 37, "some")
    rows = None if compact else torch.tensor([0, 3], device=DEVICE)
    settings, dropping = head_settings(torch.float32, keep, backend), Dropping(compact, False)
    opcheck("linear_logps_fwd", hidden, weight, bias, low, labels, rows, settings, dropping)
    capped = settings._replace(scaling=Scaling(1.5, 0.2), outputs=Outputs(logps=True))
    opcheck("linear_logps_fwd", hidden, weight, None, low, labels, rows, capped, dropping)
    operands = [None if t is None else t.detach() for t in (hidden, weight, bias, low)]
    made = dispatched("linear_logps_fwd", *operands, labels, rows, settings, dropping)
    g = torch.randn(6, device=DEVICE)
    saved = made.saved[: SavedRow.COUNT], made.entropy, made.kept, g, None, g
    needs = Needs(True, *(keep != "product" and t is not None for t in operands[1:]))
    opcheck("linear_logps_bwd", *operands, labels, rows, *saved, settings, dropping, needs)


@pytest.mark.parametrize("keep", ("product", "basis"))
def test_unneeded_gradients_have_the_dtype_and_device_of_the_head(keep, seed):
    """Empty tensors stand in for them; a compiler plans with their dtype and device."""
    hidden, weight = torch.randn(6, 5, device=DEVICE), torch.randn(37, 5, device=DEVICE, dtype=torch.bfloat16)
    labels = random_labels(6, 37, "some")
    settings, dropping = head_settings(torch.bfloat16, keep, "reference"), Dropping(True, False)
    operands = (hidden, weight, weight[:, 0].float(), None, labels, None)
    made = dispatched("linear_logps_fwd", *operands, settings, dropping)
    saved = made.saved[: SavedRow.COUNT], made.entropy, made.kept, torch.randn(6, device=DEVICE), None, None
    needed = [(True, False, False)] + [(True, True, False), (False, True, True)] * (keep == "basis")
    for needs in needed:
        opcheck("linear_logps_bwd", *operands, *saved, settings, dropping, Needs(*needs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl", (None, "k3"))
def test_opcheck_dpo(backend, kl, seed):
    logits = torch.randn(4, 3, 37, device=DEVICE, requires_grad=True)
    labels = random_labels(12, 37, "some").view(4, 3)
    loss = DPOLoss(0.1, 0.1, kl, 0.3 if kl else 0.0)
    settings = DPOLogitsSettings(loss, Scaling(), IGNORE, False, backend)
    opcheck("dpo_logits_fwd", logits, labels, logits.detach() + 1, None, settings)
    logps = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    opcheck("dpo_fwd", logps, labels, logps.detach() + 1, DPOSettings(loss, IGNORE, backend))


def compilers():
    yield "aot_eager"
    if no_inductor() is None:
        yield "inductor"


@pytest.mark.parametrize("compiler", list(compilers()))
@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(compiler, backend, seed):
    torch.compiler.reset()
    labels = random_labels(8, 50).view(4, 2)
    tensors = [torch.randn(s, device=DEVICE) for s in ((4, 2, 6), (50, 6), (4, 2, 50))]

    def run(hidden, weight, ref_logits):
        stats = fused_po.linear_logps(hidden, weight, labels, outputs=("logps", "entropy"), backend=backend)
        logits = hidden @ weight.T
        dense = fused_po.logps_from_logits(logits, labels, backend=backend)
        dpo = fused_po.dpo_from_logits(logits, labels, ref_logits, kl="k3", kl_coef=0.1, backend=backend)
        linear = fused_po.linear_dpo(hidden, weight, labels, ref_logps=dense.logps.detach() - 1, backend=backend)
        loss = (stats.logps * dense.logps).sum() + stats.entropy.sum() + dpo.loss + linear.loss
        return loss, dpo.margins, linear.accuracy

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=compiler)):
        hidden, weight = (t.clone().requires_grad_() for t in tensors[:2])
        out = function(hidden, weight, tensors[2])
        out[0].backward()
        results.append((*out, hidden.grad, weight.grad))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_backward_writes_over_the_logits(backend, seed, poison):
    base = torch.randn(3, 5, 41, device=DEVICE)
    labels = random_labels(12, 41).view(3, 4)
    views = [
        lambda t: t[:, :4].clone(),
        lambda t: t[:, 1:] * 1.0,
        lambda t: (t * 1.0)[:, :4],
        lambda t: (t * 1.0)[:, 1:],
    ]
    views.append(lambda t: t[:, :4].transpose(1, 2).contiguous().transpose(1, 2))  # columns not side by side
    for view in views:
        grads = []
        for inplace in (False, True):
            logits = view(base.clone().requires_grad_())
            stats = fused_po.logps_from_logits(logits, labels, inplace_backward=inplace, backend=backend)
            grad = torch.autograd.grad(stats.logps.sum(), logits)[0]
            assert (grad.data_ptr() == logits.data_ptr()) == inplace
            grads.append(grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_in_place_backward_raises(backend, seed):
    logits = torch.randn(3, 41, device=DEVICE, requires_grad=True) * 1.0
    loss = fused_po.logps_from_logits(logits, random_labels(3, 41), inplace_backward=True, backend=backend).logps.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_backward_equals_the_first(backend, seed):
    hidden, weight = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((6, 5), (37, 5)))
    labels = random_labels(6, 37)
    loss = fused_po.linear_logps(hidden, weight, labels, backend=backend).logps.sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_second_derivatives_are_refused(seed):
    logits = torch.randn(3, 41, device=DEVICE, requires_grad=True)
    hidden, weight = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((3, 5), (41, 5)))
    labels = random_labels(3, 41, "none")
    losses = [
        (fused_po.logps_from_logits(logits, labels).logps, logits),
        (fused_po.linear_logps(hidden, weight, labels).logps, hidden),
        (
            fused_po.dpo_from_logits(logits[:2, None], labels[:2, None], ref_logps=torch.zeros(2, device=DEVICE)).loss,
            logits,
        ),
    ]
    for loss, of in losses:
        (grad,) = torch.autograd.grad(loss.sum(), of, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_head_block_by_block(backend, seed):
    hidden, weight = torch.randn(9, 16, device=DEVICE), torch.randn(300, 16, device=DEVICE)
    labels = random_labels(9, 300)
    results = []
    for h, w, autocast in ((hidden, weight, True), (hidden.bfloat16(), weight.bfloat16(), False)):
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            logps = fused_po.linear_logps(h, w, labels, backend=backend, schedule=SMALL).logps
        logps.sum().backward()
        assert logps.dtype == torch.float32
        assert h.grad.dtype == h.dtype
        assert w.grad.dtype == w.dtype
        results.append((logps, h.grad.float(), w.grad.float()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for a, b in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored_is_a_differentiable_zero(backend, seed, poison):
    hidden, weight = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((6, 5), (37, 5)))
    labels = torch.full((6,), IGNORE, device=DEVICE)
    logits = torch.randn(6, 37, device=DEVICE, requires_grad=True)
    total = sum(s.sum() for s in fused_po.linear_logps(hidden, weight, labels, outputs=STATS, backend=backend)[:3])
    total = total + fused_po.logps_from_logits(logits, labels, backend=backend).logps.sum()
    total.backward()
    assert total.item() == 0
    assert all((t.grad == 0).all() for t in (hidden, weight, logits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_equal_whichever_inputs_require_grad(backend, seed):
    """Policy and reference with equal weights and labels give a log-ratio of exactly 0; two runs are bitwise equal."""
    hidden, weight = torch.randn(40, 16, device=DEVICE), torch.randn(203, 16, device=DEVICE)
    labels = random_labels(40, 203)
    trained = [t.clone().requires_grad_() for t in (hidden, weight)]
    policy = fused_po.linear_logps(*trained, labels, backend=backend).logps
    with torch.no_grad():
        reference = fused_po.linear_logps(hidden, weight, labels, backend=backend).logps
    assert torch.equal(policy, reference)
    grads = [torch.autograd.grad(policy.sum(), trained, retain_graph=True) for _ in range(3)]
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(other, grads[0]))


def test_inside_checkpoint_and_saved_tensor_hooks(seed):
    from torch.utils.checkpoint import checkpoint

    hidden, weight = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((6, 5), (37, 5)))
    labels = random_labels(6, 37)

    def run(h, w):
        return fused_po.linear_logps(h, w, labels).logps.sum()

    expected = torch.autograd.grad(run(hidden, weight), (hidden, weight))
    inside = torch.autograd.grad(checkpoint(run, hidden, weight, use_reentrant=False), (hidden, weight))
    with torch.autograd.graph.save_on_cpu():
        hooked = torch.autograd.grad(run(hidden, weight), (hidden, weight))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, inside, hooked))


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedules_agree(backend, seed, poison):
    hidden, weight = torch.randn(33, 16, device=DEVICE), torch.randn(203, 16, device=DEVICE)
    labels = random_labels(33, 203)
    results = []
    for schedule in (None, SMALL, fused_po.Schedule(compact=False), fused_po.Schedule(tile_bytes=1)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        stats = fused_po.linear_logps(h, w, labels, outputs=STATS, backend=backend, schedule=schedule)
        (stats.logps.sum() + stats.entropy.sum()).backward()
        results.append((*stats[:3], h.grad, w.grad))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_low_precision_tiles_are_noisier(seed):
    hidden, weight = torch.randn(64, 64, device=DEVICE).bfloat16(), torch.randn(999, 64, device=DEVICE).bfloat16()
    labels = random_labels(64, 999, "none")
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    errors = []
    for dtype in (None, torch.bfloat16):
        got = fused_po.linear_logps(hidden, weight, labels, schedule=fused_po.Schedule(logits_dtype=dtype)).logps
        errors.append((got - exact).abs().max().item())
    assert errors[0] < 1e-4 < 1e-3 < errors[1]


def test_entropy_grad_can_be_switched_off(seed):
    hidden, weight = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((6, 5), (37, 5)))
    how = dict(outputs=("logps", "entropy"), schedule=fused_po.Schedule(entropy_grad=False))
    stats = fused_po.linear_logps(hidden, weight, random_labels(6, 37), **how)
    assert stats.logps.requires_grad
    assert not stats.entropy.requires_grad


def test_results_are_named_and_copyable(seed):
    stats = fused_po.logps_from_logits(torch.randn(3, 9, device=DEVICE), random_labels(3, 9))
    assert stats.entropy is None and stats.is_top1 is None
    assert torch.equal(copy.deepcopy(stats).logps, stats.logps)


@pytest.mark.parametrize("leading", ((), (5,), (2, 3), (2, 1, 3)))
def test_any_leading_shape(leading, seed):
    labels = random_labels(torch.Size(leading).numel(), 19, "none").view(leading)
    hidden, weight = torch.randn(*leading, 4, device=DEVICE), torch.randn(19, 4, device=DEVICE)
    linear = fused_po.linear_logps(hidden, weight, labels).logps
    dense = fused_po.logps_from_logits(hidden @ weight.T, labels).logps
    assert linear.shape == dense.shape == torch.Size(leading)
    torch.testing.assert_close(linear, dense)


def test_shift_labels():
    labels = torch.tensor([[1, 2, 3], [4, 5, IGNORE]])
    assert fused_po.shift_labels(labels).tolist() == [[2, 3, IGNORE], [5, IGNORE, IGNORE]]


@pytest.mark.parametrize("dynamic", (True, None))
def test_compiled_sizes_and_numbers_may_change(dynamic, seed):
    """The number of tokens, the temperature and beta change between calls, on the device of the tests."""
    torch.compiler.reset()
    weight = torch.randn(50, 6, device=DEVICE)

    def run(hidden, labels, number):
        logps = fused_po.linear_logps(hidden, weight, labels, temperature=number).logps
        dpo = fused_po.dpo_from_logits(hidden @ weight.T, labels, ref_logps=logps.detach() - 1, beta=number)
        return logps.sum() + dpo.loss

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, number in ((2, 0.7), (3, 0.9), (5, 1.1)):
        hidden, labels = torch.randn(4, length, 6, device=DEVICE), random_labels(4 * length, 50).view(4, length)
        found = []
        for function in (run, compiled):
            leaf = hidden.clone().requires_grad_()
            value = function(leaf, labels, number)
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(found[1], found[0])
