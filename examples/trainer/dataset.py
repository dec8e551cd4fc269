"""Data of a run: rows in TRL's formats, held-out rows, token ids, the rows of a step, padded batches."""

from __future__ import annotations

import json
import math
import random
import sys

import torch
from torch import Tensor

from . import comparisons, row_files, tokenization
from .errors import fail
from .formats import ANSWERS, COLUMNS, rows_of, wanted

IGNORE = -100  # the label of tokens that are not scored


def read(source: str, split: str, want: str = "preference", config: str | None = None) -> list[dict]:
    """Read the rows of a file, a folder or a Hub id. Texts may also be lists of messages; other columns are kept.

    Args:
        want: the kind of rows, by their fields.
            "preference": prompt, chosen, rejected.
            "unpaired": prompt, completion, label; a preference row becomes two.
            "completion": prompt, completion; for a preference row the chosen answer.
            "prompt": prompt; for a preference row also its answers.
    """
    made = [rows_of(row, want, where) for where, row in row_files.rows(source, split, config)]
    rows = [row for some in made for row in some]
    if unwanted := sum(not some for some in made):
        print(f"{source}: {unwanted} of {len(made)} rows left out because their label is false", file=sys.stderr)
    if not rows:
        form = "rows" if row_files.ending(row_files.Path(source)) in row_files.TABLES else "one JSON object per line"
        fail(f"{source}: the {split} set holds no rows; expected {form} with {wanted(want)}")
    return rows


def held_out(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Split rows into (training rows, held-out rows) by prompt: a random share of the prompts is held out."""
    names = [json.dumps(row["prompt"] or row["completion"], sort_keys=True, default=str) for row in rows]
    prompts = list(dict.fromkeys(names))
    if len(prompts) < 2:
        fail(f"--test-share: the data set has {len(prompts)} prompt; expected 2 or more, one of them to train on")
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    chosen = set(random.Random(seed).sample(prompts, count))
    parts = ([row for row, name in zip(rows, names) if (name in chosen) is out] for out in (False, True))
    return tuple(parts)


def check_flags(args) -> None:
    """Check the flags for training and held-out rows, and fill in where the held-out rows come from."""
    args.dataset, args.split = row_files.source_and_split(args.dataset, args.split, "--split")
    if args.test_share is not None:
        if not 0 < args.test_share < 1:
            fail(f"--test-share: got {args.test_share}, expected a number between 0 and 1")
        if args.test_dataset is not None or args.test_split is not None:
            fail("--test-share: given together with --test-dataset or --test-split; give only one of them")
    elif args.test_dataset is None:
        args.test_dataset = str(comparisons.TEST) if args.dataset == str(comparisons.TRAIN) else args.dataset
    else:
        args.test_dataset, args.test_split = row_files.source_and_split(
            args.test_dataset, args.test_split, "--test-split"
        )
    for flag, source, split in (
        ("split", args.dataset, args.split),
        ("test-split", args.test_dataset, args.test_split),
    ):
        if split is not None and row_files.is_file(source):
            fail(f"--{flag}: got {split!r}, but {source} is a file, which has no splits; leave it out")
    if args.test_dataset == args.dataset:
        if row_files.is_file(args.dataset):
            ways = "name a file with other rows, or give --test-share 0.1"
            fail(f"--test-dataset: missing; the rows to evaluate on must differ from the training rows; {ways}")
        if (args.split or "train") == (args.test_split or "test"):
            fail(f"--test-split: got {args.test_split or 'test'!r}, which is the training split; name another one")


def read_both(args, want: str) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows) of --dataset and --test-dataset, or of --dataset and --test-share."""
    rows = read(args.dataset, args.split or "train", want, args.dataset_config)
    if args.test_share is not None:
        return held_out(rows, args.test_share, args.seed)
    config = args.dataset_config if args.test_dataset == args.dataset else None
    return rows, read(args.test_dataset, args.test_split or "test", want, config)


def encode(rows: list[dict], tokenizer, max_prompt_length: int, max_length: int) -> list[dict]:
    """Add token ids to the rows (prompt_ids, chosen_ids, ...; see tokenization.py); report on stderr what is left out.

    Of a row's own columns, prompt, answers and label are kept under their names. All columns are kept under `COLUMNS`,
    where they cannot collide with the names that the examples add.
    """
    kept, cut, before = [], 0, tokenization.put_before(tokenizer)
    for row in rows:
        ids = tokenization.encoded(row, tokenizer, before)
        if len(ids.get("generation_ids", ids["prompt_ids"])) > max_prompt_length:
            continue
        room = max_length - len(ids["prompt_ids"])
        answers = [f"{field}_ids" for field in ANSWERS if field in row]
        cut += sum(len(ids[name]) > room for name in answers)
        fields = ("prompt", *ANSWERS, *(["label"] if "completion" in row else []))
        own = {name: row[name] for name in fields if name in row} | {COLUMNS: row.get(COLUMNS, row)}
        kept.append({**own, **ids, **{name: ids[name][:room] for name in answers}})
    if len(kept) < len(rows):
        left_out = f"{len(rows) - len(kept)} of {len(rows)} rows left out"
        print(f"{left_out}: prompt longer than --max-prompt-length {max_prompt_length} tokens", file=sys.stderr)
    if cut:
        print(f"{cut} answers cut at --max-length {max_length} tokens, prompt included", file=sys.stderr)
    if not kept:
        fail(f"no row is left: all prompts are longer than --max-prompt-length {max_prompt_length} tokens")
    tokenization.note(kept, tokenizer)
    return kept


def margins(rows: list[dict], device: str) -> Tensor | None:
    """The column `margin` [B], which TRL's RewardTrainer subtracts from a pair's margin; None if no row has it."""
    found = [row.get(COLUMNS, {}).get("margin") for row in rows]
    if all(margin is None for margin in found):
        return None
    for margin in found:
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
            fail(f"--dataset: field 'margin' is {margin!r}, expected a finite number in every row or in none")
    return torch.tensor(found, dtype=torch.float32, device=device)


def stack(rows: list[dict], fields: tuple[str, ...], pad: int, device: str) -> dict[str, Tensor]:
    """A padded batch: input_ids, attention_mask and labels, each [len(fields) * B, T].

    The first B sequences have the answers of the first field, and so on. Padding is on the right. Labels equal
    input_ids on answers and IGNORE on prompts and padding; they are not shifted.
    """
    prompts = [row["prompt_ids"] for _ in fields for row in rows]
    answers = [row[f"{field}_ids"] for field in fields for row in rows]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers))
    ids = [p + a + [pad] * (length - len(p) - len(a)) for p, a in zip(prompts, answers)]
    mask = [[1] * (len(p) + len(a)) + [0] * (length - len(p) - len(a)) for p, a in zip(prompts, answers)]
    labels = [[IGNORE] * len(p) + a + [IGNORE] * (length - len(p) - len(a)) for p, a in zip(prompts, answers)]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(value, device=device) for name, value in batch.items()}


def scored_tokens(rows: list[dict], fields: tuple[str, ...]) -> int:
    """The number of scored tokens of these answers. Without a prompt, the first token of an answer is not scored."""
    return sum(len(row[f"{field}_ids"]) - (not row["prompt_ids"]) for row in rows for field in fields)


def batch_at(rows: list[dict], step: int, size: int, seed: int) -> list[dict]:
    """The rows of a step; each epoch has its own order. Depends only on the arguments, so that a run can resume."""
    order: list[int] = []
    first = step * size
    for epoch in range(first // len(rows), (first + size - 1) // len(rows) + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(len(rows), generator=generator).tolist()
    offset = first % len(rows)
    return [rows[i] for i in order[offset : offset + size]]
