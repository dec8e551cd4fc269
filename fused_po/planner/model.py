"""The LM head of a model, read from its configuration: a config.json, a folder with one, or a Hub id."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from pathlib import Path
from typing import NamedTuple, Optional
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
# Where models of several parts keep the language model's configuration, or the decoder's.
NESTED = ("text_config", "language_config", "llm_config", "thinker_config", "decoder", "decoder_config")
# Names of the head's two sizes in configurations; the first one found is used.
VOCABS = ("padded_vocab_size", "vocab_size", "tgt_vocab_size")
WIDTHS = (
    "output_embedding_size",
    "embedding_size",
    "word_embed_proj_dim",
    "hidden_size",
    "n_embd",
    "d_model",
    "emb_dim",
    "embed_dim",
)
# Whose head has a bias, though no field says so; tests/planner/test_model_config.py holds them to transformers' models.
BIASED = {
    "bert", "bert-generation", "big_bird", "camembert", "codegen", "ctrl", "data2vec-text", "electra", "ernie", "git",
    "gptj", "megatron-bert", "modernbert-decoder", "phi", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip
WITHOUT_HEAD = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|\w*Embedding|RewardModel)$")
PATIENCE = 5  # seconds to wait for a connection to the Hub
INSTEAD = "--vocab and --hidden plan any head"


class HeadShape(NamedTuple):
    """An LM head [vocab, hidden]."""

    name: str
    vocab: int
    hidden: int
    dtype: Optional[torch.dtype]  # None where nothing says
    bias: bool = False
    tied: Optional[bool] = None  # with the embedding; None where nothing says
    softcap: Optional[float] = None
    note: str = ""


def read_head(model: str) -> HeadShape:
    """The head of `model`: a path to a config.json, to a folder with one, or the id of a model on the Hub.

    Paths need only torch. An id needs transformers, which reads its cache before it asks the Hub.

    Raises:
        ValueError: nothing there, nothing that can be read, or no LM head. Names the flag and the way out.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path /= "config.json"
    if not path.exists():
        if path.name == "config.json" or path.suffix == ".json" or model.startswith((".", "/", "~")):
            raise ValueError(f"--model: got {model!r}, but there is no file {path}; {INSTEAD}")
        return head_of(_from_hub(model), model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--model: {path} is not JSON ({error}); expected a model's config.json") from None
    if not isinstance(config, dict):
        raise ValueError(f"--model: {path} holds a {type(config).__name__}, expected a model's config.json, an object")
    return head_of(config, model)


def _from_hub(model: str) -> dict:
    """The configuration of a model on the Hub, or in transformers' cache."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError(
            f"--model: got {model!r}, which is not a file or folder; a Hub id needs transformers: pip install "
            f"transformers, or pass the path of its config.json; {INSTEAD}"
        ) from None
    try:
        try:
            return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False).to_dict()
        except OSError:
            reason = unreachable()
            if reason is not None:
                raise ConnectionError(f"it is not in the cache, and {reason}") from None
            return AutoConfig.from_pretrained(model, trust_remote_code=False).to_dict()
    except Exception as error:  # the Hub's, the network's and transformers' errors are of many types
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model: got {model!r}, which is not a file or folder, and transformers cannot load its config "
            f"({first}); pass the path of its config.json; {INSTEAD}"
        ) from None


def unreachable() -> Optional[str]:
    """Why the Hub cannot be asked, within seconds: transformers would go on trying for half a minute."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    if getproxies():  # who speaks to the Hub for us
        return None
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    place = hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)
    answers: list[Optional[str]] = []

    def connect() -> None:
        try:
            socket.create_connection(place, timeout=PATIENCE).close()
            answers.append(None)
        except OSError as error:
            answers.append(f"{place[0]} cannot be reached: {error}")

    waiting = threading.Thread(target=connect, daemon=True)  # a name server that is silent has no other timeout
    waiting.start()
    waiting.join(PATIENCE)
    return answers[0] if answers else f"{place[0]} does not answer in {PATIENCE} s"


def head_of(config: dict, name: str) -> HeadShape:
    """The LM head that a configuration describes."""
    architectures = [a for a in config.get("architectures") or [] if isinstance(a, str)]
    headless = [a for a in architectures if WITHOUT_HEAD.search(a)]
    if headless:
        raise ValueError(f"--model: {name} is a {headless[0]}, which has no LM head; {INSTEAD}")
    text = _language_part(config)
    if text is None:
        kind = config.get("model_type", "unknown")
        raise ValueError(
            f"--model: {name} (model_type {kind!r}) has no LM head: no part of its configuration has both one of "
            f"{', '.join(VOCABS)} and one of {', '.join(WIDTHS)}; {INSTEAD}"
        )
    bare = [a for a in architectures if a.endswith("Model") and "LMHead" not in a and "auto_map" not in config]
    note = f"{bare[0]} may have no LM head; this plan assumes one" if bare else ""
    dtype = next((c[k] for c in (config, text) for k in ("dtype", "torch_dtype") if isinstance(c.get(k), str)), None)
    tied = next((c["tie_word_embeddings"] for c in (text, config) if "tie_word_embeddings" in c), None)
    bias = text.get("model_type") in BIASED or bool(text.get("lm_head_bias", False))
    return HeadShape(name, *_sizes(text), NAMES.get(dtype), bias, tied, text.get("final_logit_softcapping"), note)


def _sizes(config: dict) -> tuple[int, int]:
    """(vocabulary, hidden width), 0 for what is absent."""
    sizes = (next((config[key] for key in names if config.get(key)), 0) for names in (VOCABS, WIDTHS))
    return tuple(s if isinstance(s, int) and not isinstance(s, bool) and s > 0 else 0 for s in sizes)


def _language_part(config: dict) -> Optional[dict]:
    """The part that has a vocabulary and a width: nested ones first, since a whole may repeat only some fields."""
    for key in NESTED:
        if isinstance(config.get(key), dict):
            found = _language_part(config[key])
            if found is not None:
                return found
    return config if all(_sizes(config)) else None
