"""Every fused loss inside checkpoints and under saved-tensor hooks; token weights in closed form."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fused_po
from fused_po.reduce import MODES, aggregate, token_weights

B, T, V, H = 4, 6, 9, 5
GROUPS = torch.arange(B)[:, None].expand(B, T)


@pytest.fixture
def tensors(seed):
    weight, ref = torch.randn(V, H), torch.randn(B, T, H)
    labels = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.2, -100)
    return torch.randn(B, T, H), weight, labels, ref, torch.randn(B)


LOSSES = {
    "policy_loss_from_logits": lambda h, w, y, ref, a: (
        fused_po.policy_loss_from_logits(h @ w.T, y, a, loss_type="grpo").loss
    ),
    "policy_loss_from_logits, in place": lambda h, w, y, ref, a: (
        fused_po.policy_loss_from_logits(h @ w.T, y, a, loss_type="dapo", inplace_backward=True).loss
    ),
    "policy_loss_from_logits, an answer's ratio": lambda h, w, y, ref, a: (
        fused_po.policy_loss_from_logits(h @ w.T, y, a, loss_type="gspo").loss
    ),
    "weights of tokens": lambda h, w, y, ref, a: (
        token_weights(y != -100, "seq-mean-token-mean") * fused_po.linear_logps(h, w, y).logps
    ).sum(),
    "linear_logps": lambda h, w, y, ref, a: fused_po.linear_logps(h, w, y, outputs=("entropy",)).entropy.sum(),
    "linear_dpo": lambda h, w, y, ref, a: fused_po.linear_dpo(h, w, y, ref, w, kl="k3", kl_coef=0.1).loss,
    "linear_kl": lambda h, w, y, ref, a: fused_po.linear_kl(h, w, ref, w, y).kl.sum(),
    "dpo_from_logits": lambda h, w, y, ref, a: (
        fused_po.dpo_from_logits(h @ w.T, y, ref @ w.T, kl="full", kl_coef=0.1, inplace_backward=True).loss
    ),
    "chunked_loss": lambda h, w, y, ref, a: fused_po.chunked_loss(
        lambda stats, rows: (stats.logps.exp() * stats.logps).sum(), h, w, y, GROUPS
    ),
}
INSIDE = {
    "checkpoint": lambda run, hidden: checkpoint(run, hidden, use_reentrant=False),
    "reentrant checkpoint": lambda run, hidden: checkpoint(run, hidden, use_reentrant=True),
    "save_on_cpu": lambda run, hidden: under(save_on_cpu(), run, hidden),
    "hooks that copy": lambda run, hidden: under(saved_tensors_hooks(torch.clone, torch.clone), run, hidden),
}


def under(hooks, run, hidden):
    with hooks:
        return run(hidden)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", LOSSES)
def test_the_same_gradients(name, inside, tensors):
    hidden, *rest = tensors
    grads = []
    for wrap in (lambda run, h: run(h), INSIDE[inside]):
        leaf = hidden.clone().requires_grad_()
        wrap(lambda h: LOSSES[name](h, *rest), leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("counts", [{}, {"num_tokens": 11, "num_sequences": torch.tensor(7), "world_size": 3}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_weights_are_the_gradient_of_aggregate(mode, counts, packed, seed):
    mask = torch.rand(B, T) < 0.6
    mask[1] = False
    how = counts | ({"max_length": 5.0} if mode == "seq-mean-token-sum-norm" else {})
    if packed:
        mask, how["cu_seqlens"] = mask.flatten(), torch.tensor([0, 6, 12, 12, 15, B * T])
    loss = torch.randn(mask.shape, requires_grad=True)
    (want,) = torch.autograd.grad(aggregate(loss, mask, mode, **how), loss)
    for given in (mask, mask.long(), mask.double()):
        got = token_weights(given, mode, **how)
        assert got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close((got * loss).sum(), aggregate(loss, mask, mode, **how))


def test_weights_of_empty_masks_are_zeros():
    for mode in MODES[:3]:
        assert token_weights(torch.zeros(2, 3), mode).tolist() == [[0.0] * 3] * 2
        assert token_weights(torch.zeros(0, 3), mode).shape == (0, 3)
