"""Rows of text: read in TRL's data set formats, encoded, drawn for a step, stacked into a batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from common import fail
from torch import Tensor

IGNORE = -100
FORMATS = {  # TRL's names, the fields that tell them; a preference row may have a prompt, or the answers begin alike
    "preference": ("chosen", "rejected"),
    "unpaired preference": ("prompt", "completion", "label"),
    "prompt-completion": ("prompt", "completion"),
    "conversation": ("messages",),
    "language modelling": ("text",),
    "prompt-only": ("prompt",),
}
TAKEN = {  # which formats make which rows
    "preference": ("preference",),
    "unpaired": ("unpaired preference", "preference"),
    "completion": ("unpaired preference", "prompt-completion", "preference", "conversation", "language modelling"),
    "prompt": ("prompt-only", "preference"),
}


def shared(first, second) -> int:
    """How many leading items are equal: characters, messages, tokens."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def shared_prompt(row: dict) -> dict:
    """A preference row with its prompt; where there is none, it is what both answers begin with (words, or turns)."""
    if "prompt" in row:
        return row
    chosen, rejected = row["chosen"], row["rejected"]
    same = shared(chosen, rejected)
    if isinstance(chosen, str) and same < min(len(chosen), len(rejected)):  # whole words
        same = max(0, chosen.rfind(" ", 0, same))
    return {**row, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def check_field(row: dict, field: str, where: str) -> None:
    """A text or a list of messages that is not empty; a label True or False."""
    value = row[field]
    if field == "label":
        if not isinstance(value, bool):
            fail(f"{where}: field 'label' is {type(value).__name__}, expected true or false")
    elif isinstance(value, list):
        for message in value or [None]:
            if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
                fail(f"{where}: field {field!r} has {message!r}, expected messages with the strings role and content")
    elif not isinstance(value, str):
        fail(f"{where}: field {field!r} is {type(value).__name__}, expected a string or a list of messages")
    elif not value.strip():
        fail(f"{where}: field {field!r} is empty")


def rows_of(row: object, want: str, where: str) -> list[dict]:
    """The rows of `want` (a key of TAKEN) that one line of a data set gives, or an error that says what it has."""
    formats = {name: FORMATS[name] for name in TAKEN[want]}
    if not isinstance(row, dict):
        fail(f"{where}: expected an object with the fields {wanted(want)}, got {type(row).__name__}")
    found = next((name for name, fields in formats.items() if all(field in row for field in fields)), None)
    if found is None:
        first = next(iter(formats.values()))
        missing = next(field for field in first if field not in row)
        has = f"it has {', '.join(map(repr, row)) or 'no fields'}"
        fail(f"{where}: field {missing!r} is missing; wanted {wanted(want)}; {has}")
    fields = [*formats[found], *(["prompt"] if "prompt" in row and found == "preference" else [])]
    for field in fields:
        check_field(row, field, where)
    if len({type(row[field]) for field in fields if field != "label"}) > 1:
        fail(f"{where}: {', '.join(fields)} are partly texts, partly lists of messages; expected one kind")
    if found == "preference":
        row = shared_prompt(row)
        for field in ("prompt", "chosen", "rejected"):
            if not row[field]:
                fail(f"{where}: field {field!r} is empty once the prompt is what chosen and rejected begin with")
        if want == "preference" or want == "prompt":
            return [row]
        pair = [{"prompt": row["prompt"], "completion": row[f], "label": f == "chosen"} for f in ("chosen", "rejected")]
        return pair if want == "unpaired" else pair[:1]
    if found in ("conversation", "language modelling"):  # every token is scored
        whole = row[formats[found][0]]
        return [{"prompt": whole[:0], "completion": whole}]
    return [row] if want != "completion" or row.get("label") is not False else []


def wanted(want: str) -> str:
    """In words, the formats that make such rows."""
    return " or ".join(f"{', '.join(FORMATS[name])} ({name})" for name in TAKEN[want])


def read(source: str, split: str, want: str = "preference") -> list[dict]:
    """Rows from a .jsonl file, a folder written by `datasets`, or a Hub id; texts, or lists of messages.

    Args:
        want: "preference": prompt, chosen, rejected. "unpaired": prompt, completion, label; of a preference row, two.
            "completion": prompt, completion; of a preference row the chosen one. "prompt": prompt, and what else is
            there.
    """
    path = Path(source)
    if path.suffix == ".jsonl" or path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{path}: cannot be read ({error}); --dataset takes a .jsonl file, a datasets folder or a Hub id")
        rows = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    fail(f"{path}, line {number}: not JSON ({error})")
                rows += rows_of(row, want, f"{path}, line {number}")
    else:
        try:
            import datasets
        except ImportError:
            fail(f"{source}: not a .jsonl file, and reading Hub data sets takes `pip install datasets`")
        try:
            data = datasets.load_from_disk(source) if path.is_dir() else datasets.load_dataset(source, split=split)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        except Exception as error:  # whatever a hub, a network or a cache may raise
            fail(f"{source}: no data set of that name, or no split {split!r} in it ({error})")
        numbered = enumerate(data)
        rows = [new for n, row in numbered for new in rows_of(row, want, f"{source}, split {split}, row {n}")]
    if not rows:
        fail(f"{source}: the {split} set holds no rows; expected one JSON object a line with {wanted(want)}")
    return rows


def text_of(content: str | list[dict]) -> str:
    """A text, or the last message's."""
    return content if isinstance(content, str) else content[-1]["content"]


def texts_of(rows: list[dict]) -> list[str]:
    """All texts, for a tokenizer to be trained on."""
    fields = ("prompt", "chosen", "rejected", "completion")
    parts = [row[field] for row in rows for field in fields if field in row]
    return [text for part in parts for text in ([part] if isinstance(part, str) else [m["content"] for m in part])]


def template(tokenizer, messages: list[dict], **how) -> list[int]:
    """Token ids of a conversation."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
    except ValueError as error:
        fail(f"--dataset has conversations, which the tokenizer cannot write ({error}); take the model's chat version")


def text_ids(row: dict, fields: list[str], tokenizer) -> tuple[list[int], dict[str, list[int]]]:
    """(ids of the prompt, ids of each field with its end), of texts."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = {field: tokenizer(row[field], add_special_tokens=False)["input_ids"] for field in ["prompt", *fields]}
    return bos + ids["prompt"], {field: ids[field] + [tokenizer.eos_token_id] for field in fields}


def chat_ids(row: dict, fields: list[str], tokenizer) -> tuple[list[int], dict[str, list[int]]]:
    """The same of messages: the prompt goes as far as the template writes it alike with each answer behind it."""
    prompt = template(tokenizer, row["prompt"], add_generation_prompt=True) if row["prompt"] else []
    whole = {field: template(tokenizer, row["prompt"] + row[field]) for field in fields}
    prompt = prompt[: min((shared(prompt, ids) for ids in whole.values()), default=len(prompt))]
    return prompt, {field: ids[len(prompt) :] for field, ids in whole.items()}


def encode(rows: list[dict], tokenizer, max_prompt_length: int, max_length: int) -> list[dict]:
    """Rows with the ids of their texts (prompt_ids, chosen_ids, ...); says on stderr how many were left out or cut."""
    kept, cut = [], 0
    for row in rows:
        fields = [field for field in ("chosen", "rejected", "completion") if field in row]
        ids_of = chat_ids if isinstance(row["prompt"], list) else text_ids
        prompt, answers = ids_of(row, fields, tokenizer)
        if len(prompt) > max_prompt_length:
            continue
        room = max_length - len(prompt)
        cut += sum(len(answer) > room for answer in answers.values())
        kept.append({**row, "prompt_ids": prompt, **{f"{field}_ids": ids[:room] for field, ids in answers.items()}})
    if len(kept) < len(rows):
        left_out = f"{len(rows) - len(kept)} of {len(rows)} rows left out"
        print(f"{left_out}: prompt longer than --max-prompt-length {max_prompt_length} tokens", file=sys.stderr)
    if cut:
        print(f"{cut} answers cut at --max-length {max_length} tokens, prompt included", file=sys.stderr)
    if not kept:
        fail(f"no row is left: all prompts are longer than --max-prompt-length {max_prompt_length} tokens")
    return kept


def stack(rows: list[dict], fields: tuple[str, ...], pad: int, device: str) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, each [len(fields) * B, T]; first the answers of the first field, and so on.

    Padded on the right; labels are the input's, IGNORE on prompts and padding, not shifted.
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
    """How many tokens a loss over these answers counts: all of an answer; the first of all has nothing before it."""
    return sum(len(row[f"{field}_ids"]) - (not row["prompt_ids"]) for row in rows for field in fields)


def batch_at(rows: list[dict], step: int, size: int, seed: int) -> list[dict]:
    """The batch of a step: shuffled anew each epoch, a function of its arguments alone, so that a run can resume."""
    order: list[int] = []
    first = step * size
    for epoch in range(first // len(rows), (first + size - 1) // len(rows) + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(len(rows), generator=generator).tolist()
    offset = first % len(rows)
    return [rows[i] for i in order[offset : offset + size]]
