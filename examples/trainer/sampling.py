"""Answers drawn from a model, the share of correct ones, and preference pairs made of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import torch

from . import comparisons, parallel, tokenization
from .errors import fail
from .formats import COLUMNS, text_of
from .scoring import autocast, evaluating

BATCH = 300  # answers drawn at once


def end_ids(model, tokenizer) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's, and the model's own (chat models have several)."""
    named = model.generation_config.eos_token_id
    named = [] if named is None else named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *named} - {None})


@contextlib.contextmanager
def plain_draws(model, ends: list[int]) -> Iterator[None]:
    """Inside, `generate` samples from the model's own probabilities, without penalties from its generation config."""
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
    """Draw one answer for each row.

    Args:
        rows: with prompt_ids, or generation_ids where they differ (see tokenization.py).
        longest: limit of an answer in tokens.
        temperature: 0 takes the most probable token (greedy).
        seed: seeds these draws and leaves torch's generator unchanged. None: use the generator as it is.

    Returns:
        The rows with answer_ids, which end with the end-of-sequence token if it was drawn, and answer_text.
    """
    options = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {"do_sample": False}
    answered, ends, limit = [], end_ids(model, tokenizer), tokenization.learned_positions(model)
    with torch.random.fork_rng(enabled=seed is not None), evaluating(model), autocast(args), plain_draws(model, ends):
        if seed is not None:
            torch.manual_seed(seed)
        for begin in range(0, len(rows), BATCH):
            part = [
                {**row, "prompt_ids": row.get("generation_ids", row["prompt_ids"])}
                for row in rows[begin : begin + BATCH]
            ]
            prompts = tokenizer.pad({"input_ids": [row["prompt_ids"] for row in part]}, return_tensors="pt")
            prompts = {name: prompts[name].to(args.device) for name in ("input_ids", "attention_mask")}
            room = longest if limit is None else min(longest, limit - prompts["input_ids"].shape[1])
            out = model.generate(**prompts, max_new_tokens=room, pad_token_id=tokenizer.pad_token_id, **options)
            for row, ids in zip(part, out[:, prompts["input_ids"].shape[1] :].tolist()):
                ids = ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]
                text = tokenizer.decode(ids, skip_special_tokens=True)
                answered.append({**row, "answer_ids": ids, "answer_text": text})
    return answered


def share_correct(model, tokenizer, rows: list[dict], args, longest: int = 24) -> float:
    """The share of greedy answers that are correct, over the rows that `comparisons.is_correct` can check; or NaN.

    The ranks share the rows; each needs all weights (`Engine.gathered`).
    """
    known = [row for row in rows if comparisons.is_question(text_of(row["prompt"]))]
    answered = sample(model, tokenizer, parallel.deal(known, args), args, longest, temperature=0)
    right = sum(comparisons.is_correct(text_of(row["prompt"]), row["answer_text"]) for row in answered)
    return parallel.total({"right": right}, args)["right"] / len(known) if known else math.nan


def as_answer(tokenizer, row: dict) -> str | list[dict]:
    """A drawn answer in the form of a data set: the text that continues the prompt, or a list with one message."""
    if not isinstance(row["prompt"], str):
        return [{"role": "assistant", "content": row["answer_text"]}]
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    prompt, whole = decode(row["prompt_ids"]), decode(row["prompt_ids"] + row["answer_ids"])
    return whole[len(prompt) :] if whole.startswith(prompt) else row["answer_text"]


def sampled_pairs(model, tokenizer, rows: list[dict], args, *, samples: int, longest: int, seed: int) -> list[dict]:
    """Preference rows made of the model's own answers: a correct one is chosen, a wrong one rejected.

    For each prompt, `samples` answers are drawn at temperature 1. Each answer is in at most one pair.
    """
    pairs = []
    drawn = [sample(model, tokenizer, rows, args, longest, seed=seed + i) for i in range(samples)]
    for answers in zip(*drawn):
        prompt, own = answers[0]["prompt"], answers[0].get(COLUMNS, {})
        settings = {name: own[name] for name in tokenization.SETTINGS if name in own}
        right, wrong = [], []
        for row in answers:
            correct = comparisons.is_correct(text_of(prompt), row["answer_text"])
            (right if correct else wrong).append(as_answer(tokenizer, row))
        both = [(good, bad) for good, bad in zip(right, wrong) if text_of(bad).strip()]
        pairs += [{"prompt": prompt, "chosen": good, "rejected": bad, **settings} for good, bad in both]
    if not pairs:
        fail(f"no pair: of {len(rows)} prompts none got both a right and a wrong answer in {samples} samples")
    return pairs
