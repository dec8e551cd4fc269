"""Models of the examples: building, LoRA, references, log-probs and rewards of batches, answers, saving."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import comparisons
import dataset
import dropout
import parallel
import tokens
import torch
from common import fail, write_whole
from formats import COLUMNS
from torch import Tensor

import fused_po
from fused_po.integrations import lm_head, packing, probe

MASKED = ("sdpa", "eager", "flex_attention")  # attention that keeps packed sequences apart by a mask
FLASH = ("flash_attention_2", "flash_attention_3")  # and by cu_seqlens, which transformers reads off the positions


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512):
    """A BPE tokenizer of the texts' own words and numbers, as transformers wants it."""
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
    """transformers, without bars and news of new heads."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def load(kind: str, path: str | Path, args, flag: str = "--model", **how):
    """A pretrained model of transformers' Auto class `kind`, in fp32, on `parallel.home(args)`.

    None of its own code is run. flag: which gave the path, for the error.
    """
    how = dict(dtype=torch.float32, trust_remote_code=False, **how)
    try:
        model = getattr(quiet(), kind).from_pretrained(path, **how).to(parallel.home(args))
    except Exception as error:  # whatever a hub, a network, a damaged file or transformers may raise
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
    """Ends the program if --model names no model with a tokenizer, before anything else is read."""
    if args.model:
        try:
            quiet().AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        except Exception as error:
            fail(f"--model: {str(args.model)!r} cannot be loaded ({type(error).__name__}: {error})")
        load_tokenizer(args.model)


def load_tokenizer(path: str | Path, flag: str = "--model"):
    """A pretrained tokenizer; it pads on the left, for `sample`."""
    try:
        tokenizer = quiet().AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
    except Exception as error:
        fail(f"{flag}: the tokenizer of {str(path)!r} cannot be loaded ({type(error).__name__}: {error})")
    if tokenizer.eos_token is None:
        fail(f"{flag}: the tokenizer of {str(path)!r} has no eos_token, which ends an answer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def build(args, texts: list[str]):
    """(model, tokenizer): the ones of --model, or a tiny Llama with a tokenizer trained on the texts."""
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
        model = transformers.LlamaForCausalLM(config).to(parallel.home(args))
    return prepared(model, args), tokenizer


def prepared(model, args):
    """The model as it trains: checked, without dropout, recomputing activations with --gradient-checkpointing.

    Decides --padding-free where it is None: sequences are packed if the model keeps them apart.
    """
    if has_head(model):
        head(model)
    if not args.keep_dropout:
        dropout.switch_off(model, lambda ids: run(model, input_ids=ids).hidden)
    if args.padding_free is not False:
        mixed = why_mixed(model, args)
        if mixed and args.padding_free:
            fail(f"--padding-free: {mixed}; leave it out")
        if mixed and parallel.first():
            print(f"sequences are padded, not packed: {mixed}", file=sys.stderr)
        args.padding_free = not mixed
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def adapt(model, args):
    """The model, or with --lora adapters on all its linear layers but the LM head, everything else frozen."""
    if not args.lora:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        fail("--lora takes peft: pip install peft")
    torch.manual_seed(args.seed)
    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    how = dict(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear", task_type=task)
    return get_peft_model(model, LoraConfig(**how))


def freeze(model, args):
    """The reference: a frozen copy of the model, or None with --lora, where it is the model without its adapters."""
    return None if args.lora else copy.deepcopy(model).requires_grad_(False)


@contextlib.contextmanager
def reference(model, frozen) -> Iterator:
    """What `freeze` stands for, without gradients: the frozen copy, or the model with its adapters switched off."""
    scorer = model if frozen is None else frozen
    with torch.no_grad(), evaluating(scorer), scorer.disable_adapter() if frozen is None else contextlib.nullcontext():
        yield scorer


@contextlib.contextmanager
def evaluating(model) -> Iterator:
    """model.eval() inside, as it was after."""
    was = model.training
    model.eval()
    yield
    model.train(was)


def autocast(args):
    """bf16 under --bf16."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def pack(lengths: list[int], room: int) -> list[list[int]]:
    """Sequences' numbers in rows of at most `room` tokens: the longest first, each where it first fits."""
    rows, left = [], []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((i for i, free in enumerate(left) if free >= lengths[number]), None)
        if at is None:
            at = len(rows)
            rows.append([])
            left.append(room)
        rows[at].append(number)
        left[at] -= lengths[number]
    return rows


def packed_places(mask: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """(places, positions) [R, L] of packed rows: where each token stands in mask.flatten(), -1 for filling; and its

    number in its sequence. mask: [B, T], True on tokens."""
    tokens = [row.nonzero().squeeze(-1) + i * mask.shape[1] for i, row in enumerate(mask)]
    rows = [[tokens[i] for i in row] for row in pack([len(t) for t in tokens], room)]
    fill = torch.nn.utils.rnn.pad_sequence
    places = fill([torch.cat(row) for row in rows], batch_first=True, padding_value=-1)
    counts = [torch.cat([torch.arange(len(t), device=mask.device) for t in row]) for row in rows]
    return places, fill(counts, batch_first=True)


def has_head(model) -> bool:
    """Whether it is a causal LM, and not a reward model."""
    return model.get_output_embeddings() is not None


class States(NamedTuple):
    hidden: Tensor  # [B, T, H]: what the LM head would be given; of a reward model, what `score` would
    router_loss: Tensor  # 0-dim: what the model adds to a loss over these tokens, times its own coefficient; 0 if none


def run(model, **inputs: Tensor) -> States:
    """One forward of a model, by its own arguments, without logits."""
    if has_head(model):
        hidden, added = lm_head.head_input(model, **inputs)
    else:
        hidden, added = model.get_decoder()(**inputs, use_cache=False).last_hidden_state, None
    return States(hidden, torch.zeros((), device=hidden.device) if added is None else added)


def why_mixed(model, args, row_length: int = 0) -> str | None:
    """Why sequences packed into rows of this length would not be kept apart, or None."""
    attention = model.config._attn_implementation
    if attention not in MASKED + FLASH:
        return f"not with attention {attention!r}, which mixes packed sequences"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def hidden_of(ids: Tensor, positions: Tensor | None) -> Tensor:
        more = {} if positions is None else {"position_ids": positions}
        return run(base, input_ids=ids, **more).hidden

    try:
        with autocast(args):
            packing.check_kept_apart(base, hidden_of, row_length, rows=1 if attention in FLASH else 2)
    except ValueError as error:
        return str(error).removeprefix("model: ")
    return None


def forward(model, batch: dict[str, Tensor], args) -> States:
    """The states of a batch of `dataset.stack`; zeros on padding with --padding-free.

    With --padding-free the sequences lie end to end in rows, without padding, positions beginning anew with each:
    transformers keeps them apart by a block-diagonal mask, or by cu_seqlens in flash-attention; see `why_mixed`.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if not args.padding_free:
        with autocast(args):
            return run(model, input_ids=ids, attention_mask=batch["attention_mask"])
    # a mask costs the square of a row's length, flash-attention the sum of its sequences' squares; a router's loss is
    # a mean over all tokens of the rows, which must not be filled up
    flash = model.config._attn_implementation in FLASH
    one_row = flash or (has_head(model) and lm_head.adds_loss(model))
    places, positions = packed_places(mask, mask.numel() if one_row else max(mask.shape[1], 256))
    if mixed := why_mixed(model, args, places.shape[1]):
        fail(f"--padding-free: {mixed}; leave it out")
    with autocast(args):
        hidden, router_loss = run(model, input_ids=ids.flatten()[places.clamp(min=0)], position_ids=positions)
    there = places >= 0
    out = hidden.new_zeros(mask.numel(), hidden.shape[-1]).index_put((places[there],), hidden[there])
    return States(out.view(*mask.shape, -1), router_loss)


def hidden_states(model, batch: dict[str, Tensor], args) -> Tensor:
    """[B, T, H] of `forward`."""
    return forward(model, batch, args).hidden


def head(model) -> dict:
    """The LM head as `linear_logps` takes it: weight, bias, logit_scale, softcap; measured, once a model."""
    try:
        return lm_head.lm_head(model)._asdict()
    except TypeError as error:
        fail(f"--model: {str(error).removeprefix('model: ')}")


def token_stats(
    model, batch: dict[str, Tensor], args, outputs: tuple[str, ...] = ("logps",), states: States | None = None
) -> fused_po.TokenStats:
    """Log-probs (and what else `outputs` names) of a stacked batch's labels, [B, T], at the places that predict them.

    `fused_po.shift_labels(batch["labels"]) != dataset.IGNORE` is their mask. states: of `forward`, if it has run.
    """
    hidden = (states or forward(model, batch, args)).hidden
    labels = fused_po.shift_labels(batch["labels"])
    with autocast(args):
        return fused_po.linear_logps(hidden, labels=labels, outputs=outputs, **head(model))


def answer_logps(model, batch: dict[str, Tensor], args, average: bool = False) -> Tensor:
    """[B] log-probs of whole answers, or their means over tokens."""
    mask = fused_po.shift_labels(batch["labels"]) != dataset.IGNORE
    return fused_po.sequence_logps(token_stats(model, batch, args).logps, mask, average=average)


def scores(model, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """[B]: the scalar head `score` on the hidden state of each sequence's last token."""
    steps = torch.arange(hidden.shape[1], device=hidden.device)
    last = (batch["attention_mask"] * steps).argmax(1)
    ends = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return model.score(ends.to(model.score.weight.dtype)).squeeze(-1)


def check_scores(model, flag: str):
    """The reward model, or an error where its own forward makes other rewards of hidden states than `scores`."""
    ids = probe.text_ids(model, model.get_input_embeddings().weight.shape[0])
    with torch.no_grad(), evaluating(model):
        theirs = model(input_ids=ids).logits.flatten()
        try:
            ours = scores(model, run(model, input_ids=ids).hidden, {"attention_mask": torch.ones_like(ids)})
        except (AttributeError, TypeError):
            ours = theirs + math.nan
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5):
        fail(f"{flag}: {type(model).__name__} does more to its hidden states than one linear `score`; not served here")
    return model


def decoder_head(model) -> dict:
    """`head` for hidden states of the decoder, which a reward model has; an error if the model changes those first."""
    ids, found = probe.text_ids(model, model.get_input_embeddings().weight.shape[0]), head(model)
    with torch.no_grad(), evaluating(model):
        given = run(model, input_ids=ids).hidden
        try:
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        except (AttributeError, TypeError):
            states = torch.full_like(given, math.nan)
    factor = float((given * states).sum() / states.square().sum()) if given.shape == states.shape else math.nan
    if not torch.allclose(given, factor * states, rtol=1e-3, atol=1e-5) or (
        abs(factor - 1) > 1e-5 and found["bias"] is not None
    ):
        fail(f"--lm-coef: {type(model).__name__} changes its hidden states before its LM head; give --lm-coef 0")
    return found | {"logit_scale": found["logit_scale"] * (factor if abs(factor - 1) > 1e-5 else 1.0)}


def rewards(model, batch: dict[str, Tensor], args) -> Tensor:
    """[B] rewards of whole sequences, prompt and answer with its end.

    model: transformers' ...ForSequenceClassification with one label. A run of reward.py saves one:
    `load("AutoModelForSequenceClassification", "runs/reward/model", args, num_labels=1)`.
    """
    return scores(model, hidden_states(model, batch, args), batch)


def end_ids(model, tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model names (chat models have several)."""
    named = model.generation_config.eos_token_id
    named = [] if named is None else named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *named} - {None})


@contextlib.contextmanager
def plain_draws(model, ends: list[int]) -> Iterator[None]:
    """Inside, `generate` draws from the model's own probabilities, whatever penalties its generation_config has."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept, base.generation_config = base.generation_config, GenerationConfig(eos_token_id=ends)
    try:
        yield
    finally:
        base.generation_config = kept


@torch.no_grad()
def sample(
    model, tokenizer, rows: list[dict], args, longest: int, *, temperature: float = 1.0, seed: int | None = None
) -> list[dict]:
    """The rows with an answer each: its ids up to and with its end (answer_ids), and its text (answer_text).

    Args:
        rows: with prompt_ids, or generation_ids where they differ (see tokens.py).
        longest: tokens of an answer. temperature: 0 takes the most probable tokens.
        seed: of the draws, which then leave the generator as it was; None: they go on from where it is.
    """
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    answered, ends, limit = [], end_ids(model, tokenizer), tokens.learned_positions(model)
    with torch.random.fork_rng(enabled=seed is not None), evaluating(model), autocast(args), plain_draws(model, ends):
        if seed is not None:
            torch.manual_seed(seed)
        for begin in range(0, len(rows), 300):
            part = [
                {**row, "prompt_ids": row.get("generation_ids", row["prompt_ids"])} for row in rows[begin : begin + 300]
            ]
            prompts = tokenizer.pad({"input_ids": [row["prompt_ids"] for row in part]}, return_tensors="pt")
            prompts = {name: prompts[name].to(args.device) for name in ("input_ids", "attention_mask")}
            room = longest if limit is None else min(longest, limit - prompts["input_ids"].shape[1])
            out = model.generate(**prompts, max_new_tokens=room, pad_token_id=tokenizer.pad_token_id, **how)
            for row, ids in zip(part, out[:, prompts["input_ids"].shape[1] :].tolist()):
                ids = ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]
                text = tokenizer.decode(ids, skip_special_tokens=True)
                answered.append({**row, "answer_ids": ids, "answer_text": text})
    return answered


def share_correct(model, tokenizer, rows: list[dict], args, longest: int = 24) -> float:
    """Of the questions that the checking program knows, how many the most probable answers get right; or NaN.

    The ranks share the rows; each needs all weights (`Engine.gathered`).
    """
    known = [row for row in rows if comparisons.is_question(dataset.text_of(row["prompt"]))]
    answered = sample(model, tokenizer, parallel.deal(known, args), args, longest, temperature=0)
    right = sum(comparisons.is_correct(dataset.text_of(row["prompt"]), row["answer_text"]) for row in answered)
    return parallel.total({"right": right}, args)["right"] / len(known) if known else math.nan


def behind_prompt(tokenizer, row: dict) -> str | list[dict]:
    """A sampled answer as a row of a data set has it: a text with its space behind the prompt, or a message."""
    if not isinstance(row["prompt"], str):
        return [{"role": "assistant", "content": row["answer_text"]}]
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    prompt, whole = decode(row["prompt_ids"]), decode(row["prompt_ids"] + row["answer_ids"])
    return whole[len(prompt) :] if whole.startswith(prompt) else row["answer_text"]


def sampled_pairs(model, tokenizer, rows: list[dict], args, *, samples: int, longest: int, seed: int) -> list[dict]:
    """Preference rows from the model's own answers, as the checking program judges them.

    Of each prompt `samples` answers are drawn at temperature 1; every wrong one is paired with a right one, both once.
    """
    pairs = []
    drawn = [sample(model, tokenizer, rows, args, longest, seed=seed + i) for i in range(samples)]
    for answers in zip(*drawn):
        prompt, own = answers[0]["prompt"], answers[0].get(COLUMNS, {})
        settings = {name: own[name] for name in tokens.SETTINGS if name in own}
        right, wrong = [], []
        for row in answers:
            correct = comparisons.is_correct(dataset.text_of(prompt), row["answer_text"])
            (right if correct else wrong).append(behind_prompt(tokenizer, row))
        both = [(good, bad) for good, bad in zip(right, wrong) if dataset.text_of(bad).strip()]
        pairs += [{"prompt": prompt, "chosen": good, "rejected": bad, **settings} for good, bad in both]
    if not pairs:
        fail(f"no pair: of {len(rows)} prompts none got a right answer and a wrong one in {samples} samples")
    return pairs


def save(path: Path, model, tokenizer) -> None:
    """Model and tokenizer as transformers loads them; adapters are merged into the weights (of a copy)."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    with dropout.as_loaded(model):
        write_whole(path, lambda folder: [part.save_pretrained(folder) for part in (model, tokenizer)])
