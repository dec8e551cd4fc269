"""A head that changes after `fuse_lm_head` (hooks, other forwards, other settings): fused and plain calls agree."""

import functools
import pickle
import warnings

import pytest
import torch
from tiny_models import V, batch, causal_lm
from torch import nn
from torch.nn.utils import prune

from fused_po.integrations.transformers import fuse_lm_head, unfuse_lm_head

peft = pytest.importorskip("peft")
MASK = torch.zeros(V).index_fill_(0, torch.arange(0, V, 3), -3.0)


def results(model, **how):
    """Loss, log-probs of the scored tokens and the gradients of all parameters."""
    ids, labels = batch(0)
    model.zero_grad()
    out = model(ids, labels=labels, **how)
    out.loss.backward()
    if how:
        logps = out.token_stats.logps[:, :-1]
    else:
        logps = out.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        logps = torch.where(labels[:, 1:] == -100, 0, logps)
    return [out.loss.detach(), logps.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def agree(model, warns):
    """Check that fused and plain calls agree; returns whether the call warned that it computed logits."""
    plain = results(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fused = results(model, fused=True)
    warned = [str(w.message) for w in seen if "computes all its logits" in str(w.message)]
    assert bool(warned) == warns, warned
    assert len(plain) == len(fused)
    for a, b in zip(fused, plain):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    return warned


def double(module, args, out):
    return out * 2


class Shift:
    def __call__(self, module, args):
        return (args[0] + 0.5,)

    def after(self, module, args, out):
        return out + MASK


def replaced(head):
    stock = head.forward

    @functools.wraps(stock)
    def forward(hidden):
        return stock(hidden) + MASK

    return forward


# (a change to the head, whether a fused call has to compute logits)
CHANGES = {
    "pre-hook": (lambda head: head.register_forward_pre_hook(lambda m, a: (a[0] * 1.5,)), False),
    "pre-hook with kwargs": (
        lambda head: head.register_forward_pre_hook(lambda m, a, k: ((a[0] * 1.5,), k), with_kwargs=True),
        False,
    ),
    "pre-hook, a callable": (lambda head: head.register_forward_pre_hook(Shift()), False),
    "pre-hook, prepended": (lambda head: head.register_forward_pre_hook(Shift(), prepend=True), False),
    "hook": (lambda head: head.register_forward_hook(double), True),
    "hook, a method": (lambda head: head.register_forward_hook(Shift().after), True),
    "hook, a partial": (lambda head: head.register_forward_hook(functools.partial(double)), True),
    "hook with kwargs": (
        lambda head: head.register_forward_hook(lambda m, a, k, out: out + MASK, with_kwargs=True),
        True,
    ),
    "hook that only looks": (lambda head: head.register_forward_hook(lambda m, a, out: None), True),
    "backward hook": (lambda head: head.register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,)), True),
    "backward pre-hook": (lambda head: head.register_full_backward_pre_hook(lambda m, go: (go[0] * 3,)), True),
    "forward of the instance": (lambda head: setattr(head, "forward", replaced(head)), True),
    "weight_norm": (nn.utils.parametrizations.weight_norm, False),
    "orthogonal": (lambda head: nn.utils.parametrizations.spectral_norm(head.eval()), False),
    "weight_norm by a hook": (nn.utils.weight_norm, False),
    "prune": (lambda head: prune.l1_unstructured(head, "weight", 0.5), False),
    "gradient of the weight": (lambda head: head.weight.register_hook(lambda g: g * 2), False),
    "bias": (lambda head: setattr(head, "bias", nn.Parameter(MASK.clone())), False),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_changes_to_the_head_after_fusing(name):
    change, warns = CHANGES[name]
    model = fuse_lm_head(causal_lm("Gemma2", tie_word_embeddings=False))
    before = results(model, fused=True)
    change(model.lm_head)
    agree(model, warns)
    after = results(model, fused=True)
    if name != "hook that only looks":
        assert any(
            not torch.allclose(a, b, rtol=1e-3, atol=1e-4)
            for a, b in zip(before[:2] + before[-2:], after[:2] + after[-2:])
        )


@pytest.mark.parametrize("hook", ("forward", "full_backward"))
def test_hooks_on_all_modules(hook):
    model = fuse_lm_head(causal_lm("Llama"))
    register = getattr(nn.modules.module, f"register_module_{hook}_hook")
    if hook == "forward":
        handle = register(lambda m, args, out: out * 0.5 if type(m) is nn.Linear else None)
    else:
        handle = register(lambda m, gi, go: (gi[0] * 0.5,) if type(m) is nn.Linear else None)
    try:
        agree(model, True)
    finally:
        handle.remove()
    agree(model, False)


def test_pre_hooks_on_all_modules():
    model = fuse_lm_head(causal_lm("Llama"))
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda m, args: (args[0] * 0.5,) if type(m) is nn.Linear else None
    )
    try:
        agree(model, False)
    finally:
        handle.remove()


def test_a_measured_hook_is_unchanged():
    """A hook that exists before fusing is measured: an observer stays, and a hook that changes logits is refused."""
    model = causal_lm("Llama")
    model.lm_head.register_forward_hook(lambda m, args, out: None)
    agree(fuse_lm_head(model), False)
    model.lm_head.register_forward_hook(double)
    warned = agree(model, True)
    assert "since double of test_transformers_hooks is a hook on lm_head" in warned[0]
    with pytest.raises(TypeError, match="cannot be fused"):
        fuse_lm_head(model)
    other = causal_lm("Llama")
    other.lm_head.register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    agree(fuse_lm_head(other), True)  # a forward does not show its effect


def test_hooks_are_found_inside_decorators():
    """The wrapper of no_grad is part of torch; the hook inside it is not."""
    model = fuse_lm_head(causal_lm("Llama"))
    handle = model.lm_head.register_forward_hook(torch.no_grad()(double))
    with pytest.warns(UserWarning, match="since double of test_transformers_hooks is a hook on lm_head"):
        model(*batch(0)[:1], labels=batch(0)[1], fused=True)
    handle.remove()
    agree(model, False)


class Sharp(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * 2


@pytest.mark.parametrize("what", ("Linear", "with a hook", "Sharp", "Sequential"))
def test_another_head(what):
    """Another Linear as the head is used; another module is refused by name."""
    model = fuse_lm_head(causal_lm("Llama", tie_word_embeddings=False))
    other = {"Sharp": Sharp}.get(what, nn.Linear)(32, V)
    if what == "with a hook":
        other.register_forward_hook(double)
    model.lm_head = nn.Sequential(other) if what == "Sequential" else other
    if what in ("Linear", "with a hook"):
        agree(model, what != "Linear")
    else:
        ids, labels = batch(0)
        with pytest.raises(TypeError, match=f"lm_head: got .*{what}"):
            model(ids, labels=labels, fused=True)
        assert model(ids, labels=labels).loss.isfinite()


@pytest.mark.parametrize("where", ("head", "base_layer", "lora_A", "lora_B"))
@pytest.mark.parametrize("kind", ("forward_pre", "forward"))
def test_hooks_under_lora(where, kind):
    """LoRA added after fusing, with hooks on its layers.

    Hooks on parts that are not called make the call use logits.
    """
    model = fuse_lm_head(causal_lm("Llama", tie_word_embeddings=False))
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval().get_base_model()
    agree(model, False)
    head = model.lm_head
    layer = {"head": head, "base_layer": head.base_layer, "lora_A": head.lora_A.default, "lora_B": head.lora_B.default}
    change = (lambda m, args: (args[0] * 1.5,)) if kind == "forward_pre" else double
    getattr(layer[where], f"register_{kind}_hook")(change)
    agree(model, (where, kind) != ("head", "forward_pre"))


def test_settings_changed_after_fusing():
    """A softcap or scale of the config or the model that changes after fusing."""
    for name, owner, key, value in (
        ("Gemma2", "config", "final_logit_softcapping", 0.3),
        ("Gemma2", "config", "final_logit_softcapping", None),
        ("Granite", "config", "logits_scaling", 2.0),
        ("Cohere", "model", "logit_scale", 1.0),
    ):
        model = fuse_lm_head(causal_lm(name))
        target = model if owner == "model" else model.config
        model.config.pad_token_id, model.config.use_cache = 1, False
        agree(model, False)
        setattr(target, key, value)
        warned = agree(model, True)
        assert key in warned[0]
        agree(fuse_lm_head(model), False)


def test_another_loss_is_refused():
    model, (ids, labels) = fuse_lm_head(causal_lm("Llama")), batch(0)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.raises(TypeError, match="if it was replaced later, call fuse_lm_head"):
        model(ids, labels=labels, fused=True)


def test_unfusing_leaves_hooks():
    model = fuse_lm_head(causal_lm("Llama"))
    model.lm_head.register_forward_pre_hook(Shift())
    results(model, fused=True)
    unfuse_lm_head(model)
    assert [type(h) for h in model.lm_head._forward_pre_hooks.values()] == [Shift]
    assert "forward" not in vars(model) and pickle.dumps(model)
