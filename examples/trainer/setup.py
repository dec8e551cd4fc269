"""From flags to the model, its tokenizer and the encoded rows."""

from __future__ import annotations

from . import dataset, models, parallel, tokenization
from .formats import texts_of


def load_rows(args, want: str) -> tuple[list[dict], list[dict]]:
    """Read (training rows, held-out rows) as text, after checking that --model exists. want: see `dataset.read`."""
    models.check(args)
    return dataset.read_both(args, want)


def start(args, texts: tuple[list[dict], list[dict]]):
    """Build or load the policy and encode the rows of `load_rows`.

    Returns:
        (model, tokenizer, training rows, held-out rows).
    """
    if parallel.first():
        print(f"learning rate {args.lr:g}" + f", {args.sft_lr:g} in the supervised steps" * bool(args.sft_steps))
    model, tokenizer = models.build(args, texts_of(texts[0]))
    rows, held_out = (encode(rows, tokenizer, args) for rows in texts)
    tokenization.check_fits(model, tokenizer, rows + held_out, args)
    return model, tokenizer, rows, held_out


def encode(rows: list[dict], tokenizer, args) -> list[dict]:
    """Add token ids to the rows, within --max-prompt-length and --max-length."""
    return dataset.encode(rows, tokenizer, args.max_prompt_length, args.max_length)
