"""fused_po.integrations.verl in the installed verl: `make integrations`. Its CUDA kernels are replaced by float64."""

import pytest
import torch
from numerics import DEVICE

from fused_po import losses
from fused_po.integrations import verl as fused

torch_functional = pytest.importorskip("verl.utils.torch_functional")

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils.experimental import torch_functional as experimental  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

N, T, H, V = 3, 7, 16, 53


@pytest.fixture
def installed():
    fused.install()
    yield
    fused.uninstall()


def inputs(dtype=torch.float32):
    hidden, weight = torch.randn(N, T, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    labels = torch.randint(0, V, (N, T), device=DEVICE)
    return [v.to(dtype).requires_grad_() for v in (hidden, weight)], labels


def truth(hidden, weight, labels, temperature):
    """float64 log-probs and entropies, and the gradients of their sum in hidden and weight."""
    leaves = [v.detach().double().requires_grad_() for v in (hidden, weight)]
    log_p = (leaves[0] @ leaves[1].T / temperature).log_softmax(-1)
    logps = log_p.gather(-1, labels[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logps, entropy, torch.autograd.grad((logps * FACTOR(logps) + entropy).sum(), leaves)


def FACTOR(values):
    return torch.linspace(-1, 2, values.numel(), dtype=values.dtype, device=values.device).view_as(values)


def test_install_replaces_earlier_and_later_imports(installed):
    import verl.workers.engine.utils  # noqa: F401
    from verl.models.transformers import dense_common
    from verl.utils.torch_functional import logprobs_from_logits

    assert logprobs_from_logits is fused.logprobs_from_logits
    assert experimental.FusedLinearForPPO is fused.FusedLinearForPPO
    assert dense_common.forward_with_torch_backend is not None
    fused.install()
    fused.uninstall()
    assert torch_functional.logprobs_from_logits is not fused.logprobs_from_logits
    fused.uninstall()


def test_logprobs_from_logits(seed):
    leaf = torch.randn(N, T, V, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, V, (N, T), device=DEVICE)
    results = []
    for function in (fused.logprobs_from_logits, torch_functional.logprobs_from_logits):
        value = function(leaf * 1, labels)
        results.append((value, torch.autograd.grad((value * FACTOR(value)).sum(), leaf)[0]))
    torch.testing.assert_close(*results)
    assert fused.logprobs_from_logits(leaf.detach().bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_fused_linear_for_ppo(temperature, seed):
    """Compared with verl's torch backend, with chunks of our own and with verl's."""
    (hidden, weight), labels = inputs()
    exact = truth(hidden, weight, labels, temperature)
    theirs = experimental.FusedLinearForPPO(chunk_size=4)(hidden, weight, labels, temperature)
    for chunk_size in (None, 2):
        ours = fused.FusedLinearForPPO(chunk_size=chunk_size)(hidden, weight, labels, temperature)
        assert ours[0].shape == labels.shape and ours[1].shape == labels.shape
        for mine, other, right in zip(ours, theirs, exact[:2]):
            torch.testing.assert_close(mine, other.view_as(mine), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad((ours[0] * FACTOR(ours[0]) + ours[1]).sum(), (hidden, weight))
        for mine, right in zip(grads, exact[2]):
            torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_linear_cross_entropy(reduction, seed):
    """verl's own function needs CUDA, so ours is compared with float64."""
    (hidden, weight), labels = inputs()
    logps, entropy, _ = truth(hidden, weight, labels, 0.7)
    expected = logps.flatten() if reduction == "none" else getattr(logps, reduction)()
    got = fused.linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), entropy.flatten(), rtol=1e-5, atol=1e-5)


def test_a_models_forward_uses_ours(installed, seed, monkeypatch):
    """verl's forward of a dense model with its two fused backends, which call our functions."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers import dense_common

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **shape)).to(DEVICE)
    ids = torch.randint(0, V, (1, T), device=DEVICE)
    logits = model(ids).logits.double()
    rolled = ids.roll(-1, -1)
    expected = (logits / 0.7).log_softmax(-1).gather(-1, rolled[..., None]).squeeze(-1)
    calls = []
    monkeypatch.setattr(fused, "_score", lambda *a, real=fused._score, **how: calls.append(1) or real(*a, **how))
    for forward in (dense_common.forward_with_torch_backend, dense_common.forward_with_triton_backend):
        out = forward(model, input_ids=ids, temperature=0.7, return_dict=True)
        torch.testing.assert_close(out.log_probs.view(1, T).double(), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("agg", ("token-mean", "seq-mean-token-mean"))
@pytest.mark.parametrize("weighed", (False, True))
@pytest.mark.parametrize("name, verls", [("ppo", "vanilla"), ("gspo", "gspo"), ("cispo", "cispo"), ("sapo", "sapo")])
def test_policy_losses_are_verls(name, verls, weighed, agg, installed, seed):
    agg = "seq-mean-token-mean" if name == "sapo" else agg  # verl's SAPO has no other mode
    logps = (-torch.rand(N, T)).requires_grad_()
    old, advantages = logps.detach() + 0.3 * torch.randn(N, T), torch.randn(N, T)
    mask = torch.arange(T) < torch.tensor([[7], [3], [5]])
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.1)
    weights = torch.rand(N, T) if weighed else None
    results = []
    for key in (f"fused_po_{name}", verls):
        function = core_algos.get_policy_loss_fn(key)
        loss, metrics = function(
            old_log_prob=old,
            log_prob=logps,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=agg,
            config=config,
            rollout_is_weights=weights,
        )
        results.append((loss, torch.autograd.grad(loss, logps)[0], metrics))
    torch.testing.assert_close(results[0][:2], results[1][:2])
    for metric in results[0][2]:
        if (name, metric) not in {("cispo", "actor/pg_clipfrac")}:  # verl counts tokens clipped on either side
            assert results[0][2][metric] == pytest.approx(results[1][2][metric], abs=1e-6), metric


def test_losses_that_verl_does_not_have(installed, seed):
    logps = (-torch.rand(N, T)).requires_grad_()
    old, advantages, mask = logps.detach() + 0.1, torch.randn(N, 1).expand(N, T), torch.ones(N, T, dtype=torch.bool)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    for name in set(fused.POLICY_LOSSES) - {"ppo", "gspo", "cispo", "sapo"}:
        function, settings = fused.POLICY_LOSSES[name]
        expected = function(logps, old, advantages, mask, **settings(config)).expand(N, T).mean()
        got, _ = core_algos.get_policy_loss_fn(f"fused_po_{name}")(old, logps, advantages, mask, "token-mean", config)
        torch.testing.assert_close(got, expected)
        assert hasattr(losses, name)


BAD = [
    (lambda: fused.FusedLinearForPPO(impl_backend="cce"), "impl_backend: got 'cce', allowed are 'torch', 'liger'"),
    (lambda: fused.FusedLinearForPPO(0), "chunk_size: got 0, allowed are integers > 0"),
    (lambda: fused.linear_cross_entropy(*inputs()[0], inputs()[1], 1.0, "max"), "reduction: got 'max'"),
    (lambda: fused._policy_loss("ppo", None)(*torch.zeros(4, N, T)), "config: got None"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[row[1][:25] for row in BAD])
def test_bad_call(call, message):
    with pytest.raises(ValueError, match=message):
        call()
