"""inplace_backward where the gradient cannot be written over the logits: every backend raises in the forward."""

import pytest
import torch
from numerics import BACKENDS, DEVICE

import fused_po
from fused_po import checks
from fused_po.integrations import verl

LABELS = torch.tensor([[0, 3, 1], [2, 4, 4]], device=DEVICE)
REF = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
ROWS = torch.randn(2, 3, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def policy(loss_type: str):
    old = None if loss_type == "reinforce" else ROWS
    return lambda z, **how: fused_po.policy_loss_from_logits(z, LABELS, ROWS, old, loss_type=loss_type, **how).loss


OPS = {
    "logps_from_logits": lambda z, **how: (fused_po.logps_from_logits(z, LABELS, **how).logps * ROWS).sum(),
    "kl_from_logits": lambda z, **how: (fused_po.kl_from_logits(z, REF, **how).kl * ROWS).sum(),
    "dpo_from_logits": lambda z, **how: fused_po.dpo_from_logits(z, LABELS, REF, **how).loss,
    "dpo_from_logits full": lambda z, **how: fused_po.dpo_from_logits(z, LABELS, REF, kl="full", kl_coef=1, **how).loss,
    "policy ppo": policy("ppo"),
    "policy gspo": policy("gspo"),
    "policy reinforce": policy("reinforce"),
}
SHARED = {  # views of a leaf as [2, 3, 5] logits whose elements share memory
    "expanded": ((2, 1, 5), lambda x: x.expand(2, 3, 5)),
    "one row for all": ((5,), lambda x: x.expand(2, 3, 5)),
    "columns expanded": ((2, 3, 1), lambda x: x.expand(2, 3, 5)),
    "sliding windows": ((2, 7), lambda x: x.unfold(1, 5, 1)),
    "sliding windows of rows": ((4, 5), lambda x: x.unfold(0, 3, 1).transpose(1, 2)),
    "as_strided": ((40,), lambda x: x.as_strided((2, 3, 5), (4, 10, 1))),
}
VIEWS = {  # and as logits whose elements do not share memory
    "transposed": ((3, 2, 5), lambda x: x.transpose(0, 1)),
    "columns first": ((5, 2, 3), lambda x: x.permute(1, 2, 0)),
    "sliced": ((4, 4, 9), lambda x: x[1:3, :3, 2:7]),
    "stepped": ((4, 9, 10), lambda x: x[::2, ::3, ::2]),
    "windows side by side": ((2, 15), lambda x: x.unfold(1, 5, 5)),
    "a diagonal": ((2, 3, 3, 5), lambda x: x.diagonal(dim1=1, dim2=2).transpose(1, 2)),
    "with an offset": ((35,), lambda x: x[5:].view(2, 3, 5)),
}


def logits_of(shape, view):
    leaf = torch.randn(shape, device=DEVICE, requires_grad=True)
    return leaf, view(leaf * 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_elements_that_share_memory_are_refused_in_the_forward(name, backend, seed):
    for shape, view in SHARED.values():
        with pytest.raises(
            ValueError, match=r"^inplace_backward: .*share memory.*pass False, or logits\.contiguous\(\)"
        ):
            OPS[name](logits_of(shape, view)[1], inplace_backward=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_without_in_place_they_are_accepted(name, backend, seed):
    for shape, view in list(SHARED.values())[:: 1 if backend == "reference" else 3]:
        leaf, logits = logits_of(shape, view)
        OPS[name](logits, backend=backend).backward()
        copy = leaf.detach().clone().requires_grad_()
        OPS[name](view(copy * 1.0).contiguous(), backend=backend).backward()
        torch.testing.assert_close(leaf.grad, copy.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_views_without_shared_elements_are_accepted_in_place(name, backend, seed):
    for shape, view in list(VIEWS.values())[:: 1 if backend == "reference" else 3]:
        grads = []
        leaf = torch.randn(shape, device=DEVICE)
        for inplace in (False, True):
            x = leaf.clone().requires_grad_()
            OPS[name](view(x * 1.0), inplace_backward=inplace, backend=backend).backward()
            grads.append(x.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def test_overlap_against_the_address_of_every_element(seed):
    """Random layouts: every layout with a shared address is refused; a nested layout without one is accepted."""
    generator, found = torch.Generator().manual_seed(0), {True: 0, False: 0}
    for _ in range(3000):
        shape = torch.randint(1, 5, (3,), generator=generator).tolist()
        strides = torch.randint(0, 20, (3,), generator=generator).tolist()
        addresses = torch.arange(500).as_strided(shape, strides).flatten().tolist()
        shared = len(set(addresses)) < len(addresses)
        found[shared] += 1
        assert checks._overlap(shape, strides) >= shared, (shape, strides)
    for _ in range(300):  # layouts that slices, steps and permutations of a dense tensor can have
        base = torch.empty(torch.randint(1, 7, (4,), generator=generator).tolist())
        order = torch.randperm(4, generator=generator).tolist()
        cuts = torch.randint(1, 4, (2, 4), generator=generator).tolist()
        view = base[tuple(slice(min(a - 1, n - 1), None, step) for a, step, n in zip(*cuts, base.shape))].permute(order)
        assert not checks._overlap(view.shape, view.stride())
    assert min(found.values()) > 300


WITH_REF = {
    "kl_from_logits": lambda z, ref, **how: (fused_po.kl_from_logits(z, ref, LABELS, **how).kl * ROWS).sum(),
    "dpo_from_logits": lambda z, ref, **how: fused_po.dpo_from_logits(z, LABELS, ref, kl="k3", kl_coef=1, **how).loss,
    "dpo_from_logits full": lambda z, ref, **how: (
        fused_po.dpo_from_logits(z, LABELS, ref, kl="full", kl_coef=1, **how).loss
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_REF)
def test_a_reference_in_the_same_memory(name, backend, seed):
    """A reference that the gradient would overwrite is refused. The same view, or interleaved memory, is accepted."""
    call, how = WITH_REF[name], {"inplace_backward": True, "backend": backend}
    x = torch.randn(6, 3, 5, device=DEVICE, requires_grad=True)
    y = x * 1.0
    for logits, ref in ((y[:2], y[1:3]), (y[:4:2], y[:2]), (y[:2], y[:1].expand(2, 3, 5))):
        with pytest.raises(ValueError, match=r"^inplace_backward: .*ref_logits that share memory.*clone"):
            call(logits, ref, **how)
    for pick in (lambda v: (v[:2], v[:2]), lambda v: (v[::3], v[1::3]), lambda v: (v[:2], v[2:4])):
        grads = []
        for how_ in ({"backend": backend}, how):
            x = torch.linspace(-2, 2, 90, device=DEVICE).sin().mul(3).view(6, 3, 5).requires_grad_()
            logits, ref = pick(x * 1.0)
            call(logits, ref.detach(), **how_).backward()
            grads.append(x.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_a_leaf_is_refused_and_unchanged(name, backend, seed):
    leaf = torch.randn(2, 3, 5, device=DEVICE, requires_grad=True)
    before = leaf.detach().clone()
    for logits in (leaf, leaf[:], leaf.view(2, 3, 5)):
        with pytest.raises(ValueError, match=r"^inplace_backward: got logits that are a leaf that requires grad"):
            OPS[name](logits, inplace_backward=True, backend=backend)
    with torch.no_grad():
        OPS[name](leaf, inplace_backward=True, backend=backend)
    OPS[name](leaf.detach(), inplace_backward=True, backend=backend)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_another_result_that_needs_the_logits_raises(name, backend, seed):
    """It raises PyTorch's error about a tensor that was modified in place."""
    leaf = torch.randn(2, 3, 5, device=DEVICE, requires_grad=True)
    logits = leaf * 1.0
    other = logits.square().sum() + fused_po.logps_from_logits(logits, LABELS, backend=backend).logps.sum()
    OPS[name](logits, inplace_backward=True, backend=backend).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_the_default_of_verl_does_not_overwrite_a_leaf(seed):
    leaf = torch.randn(2, 3, 5, device=DEVICE, requires_grad=True)
    before = leaf.detach().clone()
    (verl.logprobs_from_logits(leaf, LABELS) * ROWS).sum().backward()
    (expected,) = torch.autograd.grad((leaf.log_softmax(-1).gather(-1, LABELS[..., None])[..., 0] * ROWS).sum(), leaf)
    assert torch.equal(leaf, before)
    torch.testing.assert_close(leaf.grad, expected)
