"""The probe for packed rows: which models it accepts and refuses, its dtype, and that it does not change the model."""

import copy

import pytest
import torch
import transformers
from tiny_models import GPT2, LLAMA, MAMBA, MOE, V, spread

from fused_po.integrations import packing

WINDOWS = dict(head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
HYBRID = LLAMA | dict(layer_types=["linear_attention", "full_attention"]) | LINEAR
APART = {
    "Llama": LLAMA,
    "GPT2": GPT2,  # learned positions, dropout
    "Qwen3Moe": MOE,
    "Gemma3": LLAMA | WINDOWS,
    "Mistral": LLAMA | dict(sliding_window=6),
    "Llama4": LLAMA | dict(head_dim=8, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48),
}
MIXED = {
    "OPT": dict(vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
    "Bloom": dict(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
    "Mpt": dict(vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "Falcon": dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    "GptOss": LLAMA | dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
    "Mamba2": dict(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=4,
    ),
    "RecurrentGemma": LLAMA | dict(lru_width=32, attention_window_size=16, num_hidden_layers=3),
    "Qwen3Next": HYBRID | MOE | dict(layer_types=HYBRID["layer_types"], shared_expert_intermediate_size=8),
    "Lfm2": LLAMA
    | dict(layer_types=["conv", "full_attention"]),  # leaks 3e-4 of the norm over a distance of two tokens
    "FalconH1": LLAMA | MAMBA,
    "OlmoHybrid": HYBRID,
}
SLOW = ("Bloom", "Mpt", "Falcon", "Mamba2", "RecurrentGemma", "OlmoHybrid")


def model_of(kind: str, dtype=torch.float32, **more):
    name = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}.get(kind, kind)
    config = getattr(transformers, f"{name}Config")(**(APART | MIXED)[kind] | more)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=more.get("attn_implementation"))
    return made.to(dtype)


def check(model, row_length=80, rows=1, calls=None):
    def run(ids, positions):
        if calls is not None:
            calls.append(tuple(ids.shape))
        given = {} if positions is None else {"position_ids": positions}
        decoder = model.base_model if model.base_model is not model else model.model
        return decoder(input_ids=ids, use_cache=False, **given).last_hidden_state

    packing.check_kept_apart(model, run, row_length, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", APART)
def test_models_that_keep_sequences_apart(kind, dtype):
    for rows in (1, 2):
        check(model_of(kind, dtype), rows=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in MIXED])
def test_models_that_mix_sequences_are_refused(kind, dtype):
    with pytest.raises(ValueError, match=rf"model: {kind}ForCausalLM with attn_implementation=.* position_ids; "):
        check(model_of(kind, dtype))


@pytest.mark.parametrize("positions", [False, True], ids=["another sequence", "place in the row"])
def test_one_part_in_a_thousand_is_refused(positions):
    """A layer that mixes tokens weakly, in bf16 below the rounding, is found."""

    class Little(torch.nn.Module):
        def forward(self, hidden, *args, **how):
            out = layer(hidden, *args, **how)
            place = torch.linspace(0, 1, out.shape[1], dtype=out.dtype)[None, :, None]
            more = 1e-3 * (out * place if positions else out.roll(1, 1).tril())
            return out + more

    for dtype in (torch.float32, *([] if positions else [torch.bfloat16])):  # positions have no gradient
        model = model_of("Llama", dtype)
        check(model)
        layer = model.model.layers[0].mlp
        model.model.layers[0].mlp = Little()
        vars(model).pop(packing.PASSED)
        with pytest.raises(ValueError, match=r"rounding explains|gradients with respect to the embeddings"):
            check(model)


def test_probing_does_not_change_the_model():
    """Modes, gradients, hooks, generators and weights are unchanged; dropout is off during the probe."""
    model = spread(transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2), 0).train()
    model.transformer.h[1].eval()
    model.transformer.wte.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before, state, grads = copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.is_grad_enabled()
    check(model)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled() == grads
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.transformer.wte.weight.requires_grad
    with torch.no_grad():
        check(copy.deepcopy(model))


def test_adapters_and_a_frozen_model():
    from peft import LoraConfig, get_peft_model

    model = model_of("Llama")
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM"))
    check(wrapped.get_base_model())
    check(model_of("Llama").requires_grad_(False))


@pytest.mark.parametrize("size", [dict(vocab_size=6), dict(max_position_embeddings=2), dict(max_position_embeddings=1)])
def test_small_vocabularies_and_few_positions(size):
    config = transformers.GPT2Config(
        **GPT2 | {{"max_position_embeddings": "n_positions"}.get(k, k): v for k, v in size.items()}
    )
    check(transformers.GPT2LMHeadModel(config))


def test_measured_once_and_again_beyond_the_window():
    """A row longer than the attention window is measured again, with a sequence longer than the window."""
    model, calls = model_of("Gemma3", sliding_window=40, max_position_embeddings=9999), []
    for row_length, longest in ((30, 24), (40, None), (41, 49), (5000, None), (64, None)):
        calls.clear()
        check(model, row_length, calls=calls)
        single = [length for rows, length in calls if length in (24, 49)]
        assert (single == [longest]) if longest else not calls, (row_length, calls)
    check(copy.deepcopy(model), calls=calls)
    assert not calls  # a reference, before an engine shards it


def test_a_mask_that_mixes_sequences_beyond_its_window():
    """A mask that is wrong only for sequences longer than the window is found before such a row is trained on."""
    model = model_of("Mistral", sliding_window=30)
    inner = model.model.forward

    def forward(input_ids, position_ids=None, **how):
        if position_ids is not None and int(position_ids.max()) >= 30:
            position_ids = None
        return inner(input_ids=input_ids, position_ids=position_ids, **how)

    model.model.forward = forward
    check(model, row_length=20)
    with pytest.raises(ValueError, match="does not separate the sequences"):
        check(model, row_length=100)


def test_a_failing_forward_is_refused():
    model = model_of("Llama")
    inner = model.model.forward
    model.model.forward = lambda input_ids, use_cache: inner(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(ValueError, match=r"its forward fails on packed rows: TypeError: .*position_ids"):
        check(model)
