"""Tiny models of transformers' architectures, with the special features of each head and loss switched on."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
V = 97
BASE = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = BASE | dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
GEMMA = LLAMA | dict(head_dim=8)
MOE = LLAMA | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
DROPOUT = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
ROUTER = dict(output_router_logits=True, router_aux_loss_coef=0.5)

# name: (arguments of its config, (logit scale, softcap) as in its source)
MODELS = {
    "Llama": (LLAMA, (1.0, None)),
    "Qwen2": (LLAMA, (1.0, None)),
    "Qwen3": (LLAMA | dict(head_dim=8), (1.0, None)),
    "Qwen3Moe": (MOE | ROUTER, (1.0, None)),
    "Mixtral": (LLAMA | ROUTER | dict(num_local_experts=4), (1.0, None)),
    "Gemma": (GEMMA, (1.0, None)),
    "Gemma2": (GEMMA | dict(final_logit_softcapping=0.7), (1.0, 0.7)),
    "Gemma3": (GEMMA | dict(final_logit_softcapping=0.5), (1.0, 0.5)),
    "Mistral": (LLAMA, (1.0, None)),
    "Phi": (LLAMA, (1.0, None)),  # the head has a bias
    "Phi3": (LLAMA, (1.0, None)),
    "Granite": (LLAMA | dict(logits_scaling=8.0), (1 / 8, None)),
    "Cohere": (LLAMA | dict(logit_scale=0.0625), (0.0625, None)),
    "Cohere2": (LLAMA | dict(logit_scale=0.3), (0.3, None)),
    "FalconH1": (LLAMA | MAMBA | dict(lm_head_multiplier=0.4), (0.4, None)),
    "Olmo": (LLAMA, (1.0, None)),
    "Olmo2": (LLAMA, (1.0, None)),
    "GPTNeoX": (BASE | dict(intermediate_size=48, num_attention_heads=4, max_position_embeddings=64), (1.0, None)),
    "GPT2": (GPT2 | DROPOUT, (1.0, None)),
    "OPT": (
        BASE | dict(ffn_dim=48, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16),
        (1, None),
    ),
}


def causal_lm(name, seed=0, **more):
    """A tiny ...ForCausalLM. Its head's weights are large enough for scales and softcaps to matter."""
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    config = getattr(transformers, config_name)(**MODELS[name][0] | more)
    config._experts_implementation = "eager"  # the other implementations do not support float64 on a CPU
    return spread(getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"), config, seed)


def spread(kind, config, seed=0):
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.4)
    return model.eval()


def vision_model(name, seed):
    """(a tiny vision-language model, its inputs beside ids for two images of 4 patches each, its image token)."""
    image = V - 1
    if name == "Llava":
        vision = dict(VISION, model_type="clip_vision_model", projection_dim=16)
        text = dict(LLAMA, model_type="llama")
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-1, image_seq_length=4
        )
        return (
            spread(transformers.LlavaForConditionalGeneration, config, seed),
            dict(pixel_values=torch.randn(2, 3, 8, 8)),
            image,
        )
    vision = dict(depth=1, embed_dim=16, num_heads=2, mlp_ratio=2, patch_size=2, hidden_size=32, spatial_merge_size=2)
    text = LLAMA | dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4))
    tokens = dict(image_token_id=image, video_token_id=V - 2, vision_start_token_id=V - 3, vision_end_token_id=V - 4)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    more = dict(pixel_values=torch.randn(32, 3 * 2 * 2 * 2), image_grid_thw=torch.tensor([[1, 4, 4]] * 2))
    more["mm_token_type_ids"] = torch.zeros(2, 12, dtype=torch.long)
    more["mm_token_type_ids"][:, 1:5] = 1
    return spread(transformers.Qwen2VLForConditionalGeneration, config, seed), more, image


def batch(seed, rows=2, length=12):
    """(ids, labels); prompts and some padding are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V - 3, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3], labels[0, -2:] = -100, -100
    return ids, labels
