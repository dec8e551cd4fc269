"""`fuse_lm_head` on every causal LM of transformers that can be made tiny by setting a few sizes."""

import inspect

import pytest
import torch
from numerics import IGNORE
from tiny_models import V

from fused_po.integrations.transformers import fuse_lm_head

pytest.importorskip("transformers")
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

pytestmark = pytest.mark.slow

# The names of sizes in configurations; each configuration takes the ones it has.
SIZES = {
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts",
    32: "hidden_size n_embd d_model mamba_d_ssm",
    48: "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim",
    64: "max_position_embeddings n_positions",
    8: "head_dim kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim state_size",
    16: "moe_intermediate_size",
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
TINY |= dict(num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, bos_token_id=1, pad_token_id=0)
TINY |= dict(mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, vocab_size=V, is_decoder=True)

# Models whose forward computes the cross-entropy itself, or does not predict one token per position.
REFUSED = {"Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "CpmAnt", "Marian", "MBart", "Mvp", "Pegasus"}
REFUSED |= {"PLBart", "ProphetNet", "TrOCR", "Whisper", "XLNetLMHeadModel"}


def built(config_class, kind):
    """A tiny model whose plain forward runs, or None if these sizes do not fit together."""
    known = set(inspect.signature(config_class.__init__).parameters) | set(config_class.__dataclass_fields__)
    ids = torch.randint(3, V - 10, (2, 9))
    try:
        config = config_class(**{name: value for name, value in TINY.items() if name in known})
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(config).parameters())
        if size > 3e7:
            return None
        model = kind(config).eval()
        loss = model(input_ids=ids, labels=ids).loss
    except Exception:
        return None
    return model, ids, loss


def test_every_causal_lm(seed):
    fused, refused, wrong = [], set(), []
    for config_class, kinds in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        kind = kinds[0] if isinstance(kinds, tuple) else kinds
        found = built(config_class, kind)
        if found is None:
            continue
        model, ids, loss = found
        try:
            fuse_lm_head(model)
        except TypeError:
            refused.add(kind.__name__.removesuffix("ForCausalLM"))
            continue
        out = model(input_ids=ids, labels=ids, fused=True)
        fused.append(kind.__name__)
        tokens = int((ids != IGNORE).sum())
        if not abs(out.loss - loss) <= 4 * tokens * torch.finfo(torch.float32).eps * loss:
            wrong.append((kind.__name__, float(out.loss), float(loss)))
    print(f"{len(fused)} fused: {' '.join(fused)}; refused: {' '.join(sorted(refused))}")
    assert not wrong and len(fused) >= 100 and refused <= REFUSED, (wrong, len(fused), refused - REFUSED)
