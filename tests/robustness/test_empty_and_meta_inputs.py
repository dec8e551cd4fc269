"""Nothing to score, width 0, a vocabulary of one token, every integer dtype, and meta and fake tensors."""

import math
import warnings

import public_calls
import pytest
import torch
from numerics import BACKENDS, DEVICE
from torch.utils._pytree import tree_leaves, tree_map

import fused_po
from fused_po import Schedule, checks, losses

ALL = ("logps", "entropy", "lse", "mean_logits", "is_top1", "log_sum_sq_probs")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
SHAPES = {"no rows": (0,), "B = 0": (0, 6), "T = 0": (4, 0), "0 in the middle": (2, 0, 3), "0-dim": (), "one": (1, 1)}
HEADS = {"kept": Schedule(), "recomputed": Schedule(logits_budget=0), "all rows": Schedule(compact=False)}


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=DEVICE)


def gradients(values, leaves) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(sum(v.sum() for v in values), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_statistics_and_heads(name, backend, seed):
    shape, v, h = SHAPES[name], 7, 3
    labels, on = zeros(*shape), {"backend": backend}
    for inplace in (False, True):
        x = leaf(*shape, v)
        stats = fused_po.logps_from_logits(x * 1.0, labels, outputs=ALL, inplace_backward=inplace, **on)
        kl = fused_po.kl_from_logits(x * 2.0, x.detach(), labels, inplace_backward=inplace, **on)
        assert all(value.shape == shape for value in (*stats, *kl))
        (grad,) = gradients((stats.logps, stats.entropy, stats.lse, kl.kl), (x,))
        assert grad.shape == x.shape and grad.isfinite().all()
    for schedule in HEADS.values():
        hidden, weight, bias = leaves = leaf(*shape, h), leaf(v, h), leaf(v)
        stats = fused_po.linear_logps(hidden, weight, labels, bias, outputs=ALL, schedule=schedule, **on)
        kl = fused_po.linear_kl(hidden, weight, hidden * 2, weight, labels, bias=bias, schedule=schedule, **on)
        assert all(value.shape == shape for value in (*stats, *kl))
        grads = gradients((stats.logps, stats.entropy, kl.kl), leaves)
        assert all(g.shape == v.shape and g.isfinite().all() for g, v in zip(grads, leaves))
        if not labels.numel():
            assert all((g == 0).all() for g in grads)
    loss = fused_po.chunked_loss(lambda stats, rows: stats.logps.sum(), hidden, weight, labels, labels, bias, **on)
    assert loss.shape == () and all(g.shape == v.shape for g, v in zip(gradients((loss,), leaves), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("b, t", [(0, 6), (4, 0), (2, 1)])
def test_shapes_of_losses(b, t, backend, seed):
    v, h, on, labels = 7, 3, {"backend": backend}, zeros(b, t)
    for kl in (None, "k3", "full"):
        x, hidden, weight = leaf(b, t, v), leaf(b, t, h), leaf(v, h)
        out = fused_po.dpo_from_logits(x, labels, x * 2, kl=kl, **on)
        of_heads = fused_po.linear_dpo(hidden, weight, labels, hidden * 2, weight, kl=kl, **on)
        for some in (out, of_heads):
            assert some.losses.shape == some.margins.shape == (b // 2,) and some.loss.isfinite()
            assert kl is None or some.kl_per_token.shape == (b, t)
            torch.testing.assert_close(some.losses, torch.full_like(some.losses, math.log(2))) if t == 0 else None
        grads = gradients((out.loss, of_heads.loss), (x, hidden, weight))
        assert all(g.isfinite().all() for g in grads)
    for loss_type in ("ppo", "gspo", "sft"):
        for inplace in (False, True):
            x, a = leaf(b, t, v), None if loss_type == "sft" else torch.randn(b, device=DEVICE)
            old = None if loss_type == "sft" else torch.randn(b, t, device=DEVICE)
            how = {"loss_type": loss_type, "inplace_backward": inplace, **on}
            out = fused_po.policy_loss_from_logits(x * 1.0, labels, a, old, **how)
            assert out.losses.shape == (b, t) and out.loss.isfinite()
            assert gradients((out.loss,), (x,))[0].isfinite().all()
    rewards = torch.randn(b, t, device=DEVICE)
    for mask, last in ((None, None), (torch.ones(b, t, device=DEVICE), torch.ones(b, device=DEVICE))):
        assert all(x.shape == (b, t) for x in fused_po.gae(rewards, rewards, mask, last, **on))
    for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):
        assert fused_po.aggregate(rewards, mode=mode).isfinite()
        assert fused_po.token_weights(rewards, mode).shape == (b, t)
    assert fused_po.sequence_logps(rewards, average=True).shape == (b,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_width_zero_gives_the_uniform_distribution(backend, seed):
    """hidden [..., 0] @ weight [V, 0].T is 0, as in torch; with a bias the probabilities are its softmax."""
    labels, bias = torch.tensor([[0, 4, -100], [2, 2, 6]], device=DEVICE), leaf(7)
    for schedule in HEADS.values():
        hidden, weight = leaf(2, 3, 0), leaf(7, 0)
        how = {"outputs": ("logps", "entropy"), "schedule": schedule, "backend": backend}
        stats = fused_po.linear_logps(hidden, weight, labels, **how)
        scored = (labels != -100).float()
        torch.testing.assert_close(stats.logps, -math.log(7) * scored)
        torch.testing.assert_close(stats.entropy, math.log(7) * scored)
        assert [g.shape for g in gradients(stats[:2], (hidden, weight))] == [hidden.shape, weight.shape]
        stats = fused_po.linear_logps(hidden, weight, labels, bias, **how)
        expected = bias.log_softmax(0)[labels.clamp(min=0)] * scored
        torch.testing.assert_close(stats.logps, expected)
        (ours,), (theirs,) = (torch.autograd.grad(v.sum(), bias) for v in (stats.logps, expected))
        torch.testing.assert_close(ours, theirs)
    out = fused_po.linear_kl(hidden, weight, torch.randn(2, 3, 0, device=DEVICE), weight, labels, backend=backend)
    assert (out.kl == 0).all()
    with pytest.raises(ValueError, match="hidden: got shape"):
        fused_po.linear_dpo(torch.zeros(2, 3, 0), torch.zeros(7, 0), zeros(2, 3).cpu(), ref_logps=torch.zeros(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_is_certain(backend, seed):
    x, labels = leaf(2, 3, 1), zeros(2, 3)
    stats = fused_po.logps_from_logits(x, labels, outputs=ALL, backend=backend)
    assert (stats.logps == 0).all() and (stats.entropy == 0).all() and stats.is_top1.all()
    assert (stats.log_sum_sq_probs == 0).all() and torch.equal(stats.mean_logits, x.detach()[..., 0])
    (grad,) = gradients((stats.logps, stats.entropy), (x,))
    assert (grad == 0).all()
    hidden, weight = leaf(2, 3, 4), leaf(1, 4)
    logps = fused_po.linear_logps(hidden, weight, labels, backend=backend).logps
    assert (logps == 0).all() and all((g == 0).all() for g in gradients((logps,), (hidden, weight)))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_shift_labels(dtype):
    """Also for shapes without tokens. A dtype that cannot hold ignore_index is converted to int64."""
    kept = dtype if torch.iinfo(dtype).min <= -100 else torch.int64
    shifted = fused_po.shift_labels(torch.tensor([[1, 2, 3], [4, 5, 6]]).to(dtype))
    assert shifted.dtype == kept and shifted.tolist() == [[2, 3, -100], [5, 6, -100]]
    assert fused_po.shift_labels(torch.tensor([1, 2]).to(dtype), 7).dtype == dtype
    for shape in ((4, 0), (0, 3), (0,), (2, 0, 0), (1,), (3, 1)):
        labels = torch.zeros(shape, dtype=torch.int64).to(dtype)
        assert fused_po.shift_labels(labels).shape == shape
    labels = torch.arange(12).view(3, 4).to(dtype)
    assert torch.equal(fused_po.shift_labels(labels.t()).long(), fused_po.shift_labels(labels.t().contiguous()).long())
    if dtype in (torch.int64, torch.int32):
        assert fused_po.shift_labels(labels.to("meta")).shape == (3, 4)


def test_shift_labels_of_masks():
    with pytest.raises(TypeError, match=r"labels: got dtype torch\.bool"):
        fused_po.shift_labels(torch.ones(2, 3, dtype=torch.bool))
    assert fused_po.shift_labels(torch.ones(1, 3, dtype=torch.bool), 0).tolist() == [[True, True, False]]
    assert checks.INTEGERS == INTEGERS


# Meta and fake tensors: every public function gives the shapes and dtypes of the real call.

NEEDS_NUMBERS = {"RunningMean.update": "rewards", "bradley_terry_mle": "wins"}
TARGETS = [target for target in public_calls.every_target() if target.name != "backends"]


def shapes(out) -> list:
    return [(tuple(v.shape), v.dtype) for v in tree_leaves(out) if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_meta_and_fake_tensors(target):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def fake(value):
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    mode = FakeTensorMode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = shapes(target.call(**target.good))
        needs = NEEDS_NUMBERS.get(target.name)
        if needs:
            for form in (meta, fake):
                with pytest.raises(ValueError, match=f"^{needs}: got a tensor without values"):
                    target.call(**tree_map(form, target.good))
            return
        assert shapes(target.call(**tree_map(meta, target.good))) == expected
        with mode:
            assert shapes(target.call(**tree_map(fake, target.good))) == expected


def test_gradients_on_meta():
    for schedule in (*HEADS.values(), Schedule(num_scored=2)):
        hidden, weight = (torch.empty(s, device="meta", requires_grad=True) for s in ((2, 3, 5), (7, 5)))
        labels = torch.zeros(2, 3, dtype=torch.int64, device="meta")
        logps = fused_po.linear_logps(hidden, weight, labels, schedule=schedule).logps
        grads = torch.autograd.grad(logps.sum(), (hidden, weight))
        assert [(g.device.type, g.shape) for g in grads] == [("meta", hidden.shape), ("meta", weight.shape)]
    with pytest.raises(ValueError, match="backend: 'triton' cannot run on a meta tensor"):
        fused_po.linear_logps(hidden, weight, labels, backend="triton")
    assert losses.dpo(*torch.empty(4, 3, device="meta")).shape == (3,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softcap_gives_a_masked_token_a_probability(backend):
    """As in the formula, -inf becomes -softcap."""
    z, label = torch.tensor([[0.0, 1.0, -torch.inf]], device=DEVICE), torch.tensor([2], device=DEVICE)
    assert fused_po.logps_from_logits(z, label, backend=backend).logps.item() == -torch.inf
    got = fused_po.logps_from_logits(z, label, softcap=2.0, backend=backend).logps
    torch.testing.assert_close(got, (2 * torch.tanh(z / 2)).log_softmax(-1)[:, 2])
