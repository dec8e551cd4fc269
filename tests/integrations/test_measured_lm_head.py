"""LM heads whose scaling is measured: log-probs of the model's own logits, its own added loss, and refusals."""

import copy
import threading

import pytest
import torch
import transformers
from numerics import assert_close
from tiny_models import GPT2, LLAMA, MAMBA, MODELS, ROUTER, V, batch, causal_lm, spread

import fused_po
from fused_po.integrations import lm_head
from fused_po.integrations.transformers import fuse_lm_head

MORE = {  # scalings that config.logit_scale, logits_scaling and final_logit_softcapping do not describe
    "HyperCLOVAX": LLAMA | dict(logits_scaling=0.125),  # multiplies, where Granite's divides
    "RecurrentGemma": LLAMA | dict(logits_soft_cap=2.0, lru_width=32, attention_window_size=16, num_hidden_layers=3),
    "ModernBertDecoder": LLAMA | dict(local_attention=8),  # a layer between the decoder and the head
    "Mpt": dict(
        vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, logit_scale=0.5
    ),  # the model does not read it
    "InklingText": LLAMA | dict(logits_mup_width_multiplier=4.0, num_hidden_layers=3),
    "FalconH1": LLAMA | MAMBA | dict(lm_head_multiplier=0.4),
}


def model_of(name, **more):
    if name in MODELS and not more:
        return causal_lm(name)
    config = getattr(transformers, f"{name}Config")(**MORE.get(name, LLAMA) | more)
    config._experts_implementation = "eager"
    return spread(getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM"), config, 0)


SLOW = ("InklingText",)  # a large configuration regardless of its widths


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in sorted({*MODELS, *MORE})]
)
def test_log_probs_match_the_models_logits(name, seed):
    """Over 16 sequences the error against float64 is at most twice that of the model in fp32."""
    model = model_of(name)
    exactly = copy.deepcopy(model).double()
    ids, _ = batch(seed, rows=16)
    at = fused_po.shift_labels(ids).clamp(min=0)[..., None]
    with torch.no_grad():
        hidden = lm_head.head_input(model, input_ids=ids).hidden
        ours = fused_po.linear_logps(hidden, labels=fused_po.shift_labels(ids), **lm_head.lm_head(model)._asdict())
        theirs, exact = (of(input_ids=ids).logits.log_softmax(-1).gather(-1, at)[:, :-1, 0] for of in (model, exactly))
    assert_close("logps", ours.logps[:, :-1], exact.double(), [(theirs, exact.double())])


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_the_added_loss_matches_the_models_own(name, seed):
    """Value and gradients of the model's own loss from logits; 0 where its coefficient is 0."""
    model = model_of(name)
    ids, labels = batch(seed)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels[1, -3:] = -100
    given = dict(input_ids=ids, attention_mask=mask)
    theirs = model(**given, labels=labels).loss
    found = lm_head.head_input(model, **given)
    shifted = fused_po.shift_labels(labels)
    logps = fused_po.linear_logps(found.hidden, labels=shifted, **lm_head.lm_head(model)._asdict()).logps
    ours = -logps.sum() / (shifted != -100).sum() + found.added_loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert found.added_loss > 0.1 and lm_head.adds_loss(model)
    named = dict(model.named_parameters())
    grads = (torch.autograd.grad(loss, list(named.values()), allow_unused=True) for loss in (ours, theirs))
    for key, a, b in zip(named, *grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=key)
    with torch.no_grad():
        assert lm_head.head_input(model, **given).added_loss is None
    for more in (dict(router_aux_loss_coef=0.0), dict(output_router_logits=False)):
        config = copy.deepcopy(model.config)
        for key, value in more.items():
            setattr(config, key, value)
        other = type(model)(config)
        assert not lm_head.adds_loss(other) and lm_head.head_input(other, **given).added_loss is None


def test_measuring_does_not_change_the_model():
    """Logits, loss function, hooks, modes and generator are unchanged; a copy of the model keeps the measurement."""
    model = causal_lm("GPT2", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1).train()
    ids, _ = batch(0)
    state, loss = torch.get_rng_state(), model.loss_function
    lm_head.lm_head(model)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    lm_head.head_input(model, input_ids=ids)
    assert model.loss_function is loss and "_loss_function" not in vars(model)
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks
    assert model(input_ids=ids).logits.shape == (2, 12, V)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    assert torch.equal(lm_head.lm_head(copied).weight, 2 * lm_head.lm_head(model).weight)


def test_adapters_below_the_head():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(causal_lm("Gemma2"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    found = lm_head.lm_head(model)
    assert found.softcap == 0.7 and not found.weight.requires_grad
    lm_head.head_input(model, input_ids=batch(0)[0]).hidden.sum().backward()
    assert any(p.grad is not None for name, p in model.named_parameters() if "lora_A" in name)


class Twice(transformers.LlamaForCausalLM):
    def forward(self, input_ids, **how):
        out = super().forward(input_ids=input_ids, **how)
        self.lm_head(torch.zeros(1, 32))
        return out


class Squared(transformers.LlamaForCausalLM):
    def forward(self, input_ids, **how):
        out = super().forward(input_ids=input_ids, **how)
        out.logits = out.logits.square()
        return out


class RouterApart(transformers.MixtralForCausalLM):
    """A model with a router loss beside a loss that needs logits."""

    def forward(self, input_ids, labels=None, **how):
        out = super().forward(input_ids=input_ids, **how)
        if labels is not None:
            out.loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return out


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_a_fused_model(name, seed):
    model = model_of(name)
    ids, _ = batch(seed)
    before = lm_head.head_input(model, input_ids=ids)
    after = lm_head.head_input(fuse_lm_head(model, always=True), input_ids=ids)
    assert torch.equal(before.hidden, after.hidden)
    assert before.added_loss is None if name == "Llama" else torch.equal(before.added_loss, after.added_loss)


def test_a_call_of_another_thread_has_its_own_logits_and_loss(seed):
    """The second call runs while the first thread's call has its hook on the head and its loss in the model."""
    model = model_of("Mixtral")
    ids, labels = batch(seed)
    plain = model(input_ids=ids, labels=labels)
    found = lm_head.head_input(model, input_ids=ids)
    others = []

    def meanwhile(*_):
        if not others:
            others.append(None)
            thread = threading.Thread(target=lambda: others.append(model(input_ids=ids, labels=labels)))
            thread.start()
            thread.join()

    model.model.register_forward_hook(meanwhile)
    again = lm_head.head_input(model, input_ids=ids)
    assert torch.equal(again.hidden, found.hidden) and torch.equal(again.added_loss, found.added_loss)
    assert torch.equal(others[1].logits, plain.logits) and torch.equal(others[1].loss, plain.loss)


def test_refusals():
    llama = transformers.LlamaConfig(**LLAMA)
    with pytest.raises(TypeError, match="the scale and softcap of Twice's logits cannot be measured"):
        lm_head.lm_head(spread(Twice, llama))
    with pytest.raises(TypeError, match="more than a scale > 0 and a softcap"):
        lm_head.lm_head(spread(Squared, llama))
    with pytest.raises(TypeError, match="LlamaModel has no LM head; expected a causal LM"):
        lm_head.lm_head(transformers.LlamaModel(llama))
    mixtral = transformers.MixtralConfig(**LLAMA | ROUTER | dict(num_local_experts=4))
    with pytest.raises(TypeError, match=r"has a router loss that cannot be computed.*output_router_logits"):
        lm_head.lm_head(spread(RouterApart, mixtral))
    mixtral.output_router_logits = False
    assert not lm_head.adds_loss(spread(RouterApart, mixtral))
    gpt2 = spread(transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2))
    gpt2.lm_head = torch.nn.Sequential(gpt2.lm_head)
    with pytest.raises(TypeError, match=r"lm_head: got .*Sequential, expected torch\.nn\.Linear"):
        lm_head.lm_head(gpt2)
