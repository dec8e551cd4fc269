"""`fuse_lm_head` under PEFT: adapters on the body, on the head, several at once, full copies, prompt tuning."""

import copy
import warnings

import counting
import pytest
import torch
from test_transformers import batches_of, check, token_logps
from tiny_models import batch, causal_lm

import fused_po
from fused_po.integrations.transformers import fuse_lm_head

peft = pytest.importorskip("peft")


def adapted(model, targets=("q_proj", "lm_head"), name="default", **more):
    """The model with LoRA, where B is not zero."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=list(targets), **more)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, name)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if "lora_B" in parameter:
                value.normal_(std=0.2)
    return model.eval()


KINDS = {
    "body": dict(targets=("q_proj", "down_proj")),
    "head": dict(targets=("lm_head",)),
    "body and head": {},
    "bias of the adapter": dict(lora_bias=True),
    "head trained in full": dict(targets=("q_proj",), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("first", ("fuse", "adapt"))
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_against_float64(kind, first, seed):
    """Loss, log-probs and the gradients of A, B and all trained parameters, for fusing before or after PEFT."""
    model = causal_lm("Llama", seed)
    if first == "adapt":
        check(adapted(model, **kind), batches_of(seed=seed))
    else:
        check(adapted(fuse_lm_head(model), **kind), batches_of(seed=seed), fuse=lambda fused: fused)


@pytest.mark.parametrize("name", ("Gemma2", "Cohere", "Phi"))
def test_lora_on_other_heads(name, seed):
    """Heads with a softcap, a scale or a bias."""
    check(adapted(causal_lm(name, seed, tie_word_embeddings=False)), batches_of(seed=seed))


def test_bf16_with_adapters_in_fp32(seed):
    check(adapted(causal_lm("Llama", seed).bfloat16()), batches_of(seed=seed))


def test_two_adapters_at_once(seed):
    model = adapted(adapted(causal_lm("Llama", seed)), ("lm_head",), "other")
    model.base_model.set_adapter(["default", "other"])
    head = model.get_base_model().lm_head
    assert head.active_adapters == ["default", "other"]
    check(model, batches_of(seed=seed))


def test_dropout_draws_as_peft_does(seed):
    model = fuse_lm_head(adapted(causal_lm("Llama"), lora_dropout=0.5)).train()
    ids, labels = batch(0)
    losses = []
    for fused in (False, True, True):
        torch.manual_seed(seed)
        losses.append(model(input_ids=ids, labels=labels, fused=fused).loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(losses[1], losses[2])
    assert not torch.equal(losses[2], model(input_ids=ids, labels=labels, fused=True).loss)


def test_merged_disabled_and_switched(seed):
    """Every call reads the current head, with all changes that PEFT has made."""
    model, (inputs, labels) = adapted(fuse_lm_head(causal_lm("Llama"))), batches_of(1)[0]

    def agrees():
        out = model(**inputs, labels=labels, fused=True)
        torch.testing.assert_close(out.token_stats.logps, token_logps(model, inputs, labels), rtol=2e-5, atol=2e-5)
        return out.loss.detach()

    own = agrees()
    with model.disable_adapter():
        without = agrees()
    model.merge_adapter()
    merged = agrees()
    model.unmerge_adapter()
    torch.testing.assert_close(own, merged, rtol=1e-5, atol=1e-6)
    assert abs(own - without) > 1e-3 and torch.allclose(own, agrees())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_adapters_after_fusing_compute_no_logits(kind):
    """PEFT's modules_to_save copies a head together with our hook."""
    v = 4096
    model = adapted(fuse_lm_head(causal_lm("Llama", vocab_size=v), schedule=fused_po.Schedule(tile_bytes=1)), **kind)
    ids, labels = batch(0, rows=4, length=40)
    with warnings.catch_warnings(), counting.LargestTensor() as seen:
        warnings.filterwarnings("error", "fused: this call computes all its logits")
        model(input_ids=ids, labels=labels, fused=True).loss.backward()
    assert seen.elements < ids.numel() * v


@pytest.mark.parametrize("share", (0, 1))
def test_lora_on_the_head_computes_no_merged_head_and_no_logits(share, seed):
    """No operator in forward and backward returns as many elements as the head or the logits; plain ones do."""
    v, h = 4096, 32
    model = adapted(causal_lm("Llama", vocab_size=v), ("lm_head",))
    ids, labels = batch(0, rows=4, length=40)
    rows = 16
    fuse_lm_head(model, schedule=fused_po.Schedule(tile_bytes=4 * v * rows, logits_budget=share * 4 * v * rows))
    largest = {}
    for fused in (False, True):
        with counting.LargestTensor() as seen:
            model(input_ids=ids, labels=labels, fused=fused).loss.backward()
        largest[fused] = seen.elements
    assert largest[True] <= v * rows < min(v * h, ids.numel() * v) <= largest[False]


def test_prompt_learning(seed):
    """Virtual tokens lengthen the sequence; PEFT lengthens the labels."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(causal_lm("Llama"), config).eval()
    plain = copy.deepcopy(model)
    fuse_lm_head(model)
    ids, labels = batch(0)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    ours, theirs = model(**inputs, fused=True), plain(**inputs)
    assert ours.token_stats.logps.shape == (2, 15) and (ours.token_stats.logps[:, :3] == 0).all()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    grads = [
        torch.autograd.grad(out.loss, list(m.prompt_encoder.parameters()))[0]
        for m, out in ((model, ours), (plain, theirs))
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_costs_two_gemms(seed):
    """LoRA on the head: the forward and D W. The gradient of the frozen weight is not computed."""
    v, h, r = 4096, 32, 4
    model = fuse_lm_head(adapted(causal_lm("Llama", vocab_size=v), ("lm_head",)))
    ids, labels = batch(0, rows=4, length=40)
    scored = int((fused_po.shift_labels(labels) != -100).sum())
    unit, thin = 2 * scored * h * v, 2 * scored * r * v

    def flops(fused):
        out = []
        forward = counting.flops(lambda: out.append(model(input_ids=ids, labels=labels, fused=fused)))
        return forward + counting.flops(lambda: out[0].loss.backward())

    bodies = flops(True) - (2 * unit + 3 * thin)
    small = adapted(causal_lm("Llama", vocab_size=v), ("lm_head",)).get_base_model().model
    body = counting.flops(lambda: small(ids).last_hidden_state)
    lora_a = 2 * ids.numel() * h * r
    assert bodies == body + 2 * lora_a, "the frozen body runs one forward; A runs a forward and its gradient"


def test_refused(seed):
    ids, labels = batch(0)
    model = fuse_lm_head(causal_lm("Llama"))
    dora = adapted(copy.deepcopy(model), use_dora=True)
    with pytest.raises(TypeError, match=r"lm_head: got a variant of LoRA"):
        dora(input_ids=ids, labels=labels, fused=True)
    with pytest.raises(TypeError, match=r"lm_head: got a variant of LoRA"):
        fuse_lm_head(dora)
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(
        TypeError, match=r"lm_head: got peft\.tuners\.ia3.*, expected a plain head or one with PEFT's LoRA"
    ):
        fuse_lm_head(peft.get_peft_model(causal_lm("Llama"), config))
    mixed = adapted(model)
    with pytest.raises(TypeError, match=r"lm_head was called with \['adapter_names'\]"):
        mixed(input_ids=ids, labels=labels, fused=True, adapter_names=["default", "__base__"])
