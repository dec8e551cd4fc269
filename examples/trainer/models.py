"""Loading and building models and tokenizers; LoRA adapters; the reference; saving."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from . import dropout, parallel, scoring
from .errors import fail
from .run_files import write_whole


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512):
    """Train a BPE tokenizer on texts; returns a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    split = [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    begin = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=begin)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def quiet():
    """transformers without progress bars and warnings."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def load(kind: str, path: str | Path, args, flag: str = "--model", **options):
    """Load a pretrained model in fp32 on `parallel.load_device(args)`. Code from the model's folder is never run.

    Args:
        kind: name of a transformers Auto class.
        flag: the flag that named the path, for error messages.
        options: further arguments of from_pretrained.
    """
    options = dict(dtype=torch.float32, trust_remote_code=False, **options)
    try:
        model = getattr(quiet(), kind).from_pretrained(path, **options).to(parallel.load_device(args))
    except Exception as error:  # the Hub, the network, a damaged file and transformers raise many types
        fail(f"{flag}: {str(path)!r} cannot be loaded ({type(error).__name__}: {error})")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        method = getattr(model.config, "quantization_config", None)
        fail(
            f"{flag}: {str(path)!r} is quantized ({method}), and transformers cannot save it after training; give a "
            "model without quantization_config in its config.json"
        )
    return model


def check(args) -> None:
    """End the program if --model has no configuration or no tokenizer, before other files are read."""
    if args.model:
        try:
            quiet().AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        except Exception as error:
            fail(f"--model: {str(args.model)!r} cannot be loaded ({type(error).__name__}: {error})")
        load_tokenizer(args.model)


def load_tokenizer(path: str | Path, flag: str = "--model"):
    """Load a pretrained tokenizer that pads on the left, as `sampling.sample` needs it."""
    try:
        tokenizer = quiet().AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
    except Exception as error:
        fail(f"{flag}: the tokenizer of {str(path)!r} cannot be loaded ({type(error).__name__}: {error})")
    if tokenizer.eos_token is None:
        fail(f"{flag}: the tokenizer of {str(path)!r} has no eos_token, which ends an answer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def build(args, texts: list[str]):
    """(model, tokenizer) of --model, or a tiny Llama with a tokenizer trained on the texts."""
    torch.manual_seed(args.seed)
    if args.model:
        model, tokenizer = load("AutoModelForCausalLM", args.model, args), load_tokenizer(args.model)
    else:
        tokenizer = train_tokenizer(texts)
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4)
        transformers = quiet()
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=args.max_length, **shape, **ends
        )
        model = transformers.LlamaForCausalLM(config).to(parallel.load_device(args))
    return prepared(model, args), tokenizer


def prepared(model, args):
    """Prepare a model for training: check its head, switch dropout off, set up packing and gradient checkpointing.

    Where args.padding_free is None, it becomes True if the model keeps packed sequences apart, otherwise False.
    """
    if scoring.has_head(model):
        scoring.head(model)
    if not args.keep_dropout:
        dropout.switch_off(model, lambda ids: scoring.run(model, input_ids=ids).hidden)
    if args.padding_free is not False:
        mixed = scoring.why_mixed(model, args)
        if mixed and args.padding_free:
            fail(f"--padding-free: {mixed}; leave it out")
        if mixed and parallel.first():
            print(f"sequences are padded, not packed: {mixed}", file=sys.stderr)
        args.padding_free = not mixed
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def adapt(model, args):
    """With --lora: the model with adapters on all linear layers except the LM head, its own weights frozen."""
    if not args.lora:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        fail("--lora requires peft: pip install peft")
    torch.manual_seed(args.seed)
    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    config = dict(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear", task_type=task)
    return get_peft_model(model, LoraConfig(**config))


def freeze(model, args):
    """The reference: a frozen copy of the model. With --lora None: the model without its adapters takes its place."""
    return None if args.lora else copy.deepcopy(model).requires_grad_(False)


@contextlib.contextmanager
def reference(model, frozen) -> Iterator:
    """Yields the reference of `freeze` for a forward pass without gradients; switches adapters off where it is None."""
    scorer = model if frozen is None else frozen
    adapters_off = scorer.disable_adapter() if frozen is None else contextlib.nullcontext()
    with torch.no_grad(), scoring.evaluating(scorer), adapters_off:
        yield scorer


def save(path: Path, model, tokenizer) -> None:
    """Save model and tokenizer in transformers' format. Adapters are merged into a copy of the weights first."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    with dropout.as_loaded(model):
        write_whole(path, lambda folder: [part.save_pretrained(folder) for part in (model, tokenizer)])
