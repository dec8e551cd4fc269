"""The LM head that a configuration describes: by hand, through transformers, and for every transformers model."""

import json
import socket
import sys
import threading
import warnings

import pytest
import torch

from fused_po.planner import model
from fused_po.planner.model import head_of, read_head

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "dtype": "bfloat16",
    "text_config": {"model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2560},
    "vision_config": {"hidden_size": 1152, "vocab_size": 32000},
}
THINKER = {"text_config": {"vocab_size": 152064, "hidden_size": 3584}, "audio_config": {"d_model": 1280}}


@pytest.mark.parametrize(
    "config, expected",
    [
        (LLAMA, dict(vocab=128256, hidden=4096, dtype=torch.bfloat16, tied=False, softcap=None, bias=False, note="")),
        (GEMMA3, dict(vocab=262208, hidden=2560, dtype=torch.bfloat16, tied=None)),
        ({"vocab_size": 50257, "n_embd": 768, "dtype": "float32"}, dict(vocab=50257, hidden=768, dtype=torch.float32)),
        ({"vocab_size": 50272, "hidden_size": 1024, "word_embed_proj_dim": 512}, dict(hidden=512)),
        ({"vocab_size": 32128, "d_model": 512, "tie_word_embeddings": True}, dict(hidden=512, tied=True)),
        ({"thinker_config": THINKER, "talker_config": {"vocab_size": 8448, "hidden_size": 896}}, dict(vocab=152064)),
        (LLAMA | {"final_logit_softcapping": 30.0}, dict(softcap=30.0)),
        (LLAMA | {"model_type": "phi"}, dict(bias=True)),
        (LLAMA | {"lm_head_bias": True}, dict(bias=True)),
        (LLAMA | {"torch_dtype": "float8_e4m3fn"}, dict(dtype=None)),
        (LLAMA | {"architectures": ["LlamaModel"]}, dict(note="LlamaModel may have no LM head; this plan assumes one")),
        (LLAMA | {"architectures": ["ChatModel"], "auto_map": {}}, dict(note="")),
    ],
)
def test_by_hand(config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        found = read_head(str(path))._asdict()
        assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"config.json is not JSON \(Expecting property name"),
        ("[1]", "holds a list, expected a model's config.json, an object"),
        ('{"model_type": "vit", "hidden_size": 768}', r"\(model_type 'vit'\) has no LM head: no part of .* vocab_size"),
        ('{"vocab_size": "many", "hidden_size": 768}', "has no LM head"),
        (
            json.dumps(LLAMA | {"architectures": ["LlamaForSequenceClassification"]}),
            "LlamaForSequenceClassification, w",
        ),
    ],
)
def test_models_without_a_head(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"^--model: .*{message}") as caught:
        read_head(str(tmp_path))
    if "Expecting" not in message and "list" not in message:
        assert str(caught.value).endswith("--vocab and --hidden plan any head")


def test_missing_configurations(tmp_path, monkeypatch):
    for path in (str(tmp_path / "config.json"), str(tmp_path), "./nowhere", "some/config.json"):
        with pytest.raises(ValueError, match=r"^--model: got .* but there is no file .*--vocab and --hidden"):
            read_head(path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"^--model: got 'org/name', .* needs transformers: pip install transformers"):
        read_head("org/name")


def test_a_hub_id_asks_the_cache_first(monkeypatch):
    transformers = pytest.importorskip("transformers")
    asked, config = [], transformers.LlamaConfig(vocab_size=1000, hidden_size=64)

    def from_pretrained(name, local_files_only=False, trust_remote_code=None):
        assert trust_remote_code is False
        asked.append(local_files_only)
        if name == "org/nothing" or (name == "org/remote" and local_files_only):
            raise OSError(f"{name} is not there\nand more")
        return config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(model, "unreachable", lambda: None)
    for name, expected in (("org/cached", [True]), ("org/remote", [True, False])):
        asked.clear()
        assert read_head(name)[:3] == (name, 1000, 64) and asked == expected
    with pytest.raises(ValueError, match=r"^--model: got 'org/nothing', .*\(org/nothing is not there\); pass the path"):
        read_head("org/nothing")
    monkeypatch.setattr(model, "unreachable", lambda: "there is no network")
    assert read_head("org/cached")[1] == 1000
    asked.clear()
    with pytest.raises(ValueError, match=r"\(it is not in the cache, and there is no network\); pass the path"):
        read_head("org/remote")
    assert asked == [True]


def silent(*_, **__):
    """A server that accepts connections and never answers."""
    threading.Event().wait(3)
    raise TimeoutError


def test_an_unreachable_hub_is_reported_within_seconds(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(model, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert model.unreachable() is None
    assert model.unreachable().startswith("127.0.0.1 cannot be reached: ")
    monkeypatch.setattr(model, "PATIENCE", 0.2)
    monkeypatch.setattr(socket, "create_connection", silent)
    assert model.unreachable() == "127.0.0.1 does not answer in 0.2 s"
    monkeypatch.setattr(model, "getproxies", lambda: {"https": "http://proxy"})
    assert model.unreachable() is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model.unreachable() == "HF_HUB_OFFLINE is set"


def shallow(config):
    """The configuration reduced to one layer."""
    parts = [config, config.get_text_config(), *(v for v in vars(config).values() if hasattr(v, "model_type"))]
    for part in parts:
        for name in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 1)
    return config


@pytest.mark.slow
def test_every_model_of_transformers():
    """The head of each model that can be built here without weights."""
    modeling = pytest.importorskip("transformers.models.auto.modeling_auto")
    mappings = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM")
    warnings.simplefilter("ignore")
    wrong, right = [], 0
    for mapping in (getattr(modeling, f"{name}_MAPPING") for name in mappings):
        for config_class in mapping:
            try:
                config = shallow(config_class())
                model_class = mapping[config_class]
                with torch.device("meta"):
                    made = (model_class[0] if isinstance(model_class, tuple) else model_class)(config)
                head = made.get_output_embeddings()
                sizes = *head.weight.shape, getattr(head, "bias", None) is not None
            except Exception:  # the default configuration builds no model, or a package it needs is not installed
                continue
            found = head_of(config.to_dict(), config_class.__name__)
            right += (found.vocab, found.hidden, found.bias) == sizes
            if (found.vocab, found.hidden, found.bias) != sizes:
                wrong.append((config_class.__name__, found[1:3], found.bias, sizes))
    assert not wrong and right > 200, (wrong, right)
