"""What the example loops share: reading preference data, a tokenizer, batches, checkpoints, metrics, pictures."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

IGNORE = -100
FIELDS = ("prompt", "chosen", "rejected")


def fail(message: str) -> None:
    """End the program with a message, not a traceback."""
    raise SystemExit(f"error: {message}")


def check_row(row: object, where: str) -> dict[str, str]:
    """The three fields of a row, or an error that says where it stands."""
    if not isinstance(row, dict):
        fail(f"{where}: expected an object with the fields {', '.join(FIELDS)}, got {type(row).__name__}")
    for field in FIELDS:
        if field not in row:
            fail(
                f"{where}: field {field!r} is missing; a row has {', '.join(FIELDS)}, it has {', '.join(row) or 'none'}"
            )
        if not isinstance(row[field], str):
            fail(f"{where}: field {field!r} is {type(row[field]).__name__}, expected a string")
        if not row[field].strip():
            fail(f"{where}: field {field!r} is empty")
    return {field: row[field] for field in FIELDS}


def read_pairs(source: str, split: str) -> list[dict[str, str]]:
    """Rows of prompt, chosen, rejected from a .jsonl file, a folder written by `datasets`, or a Hub id."""
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
                rows.append(check_row(row, f"{path}, line {number}"))
    else:
        try:
            import datasets
        except ImportError:
            fail(f"{source}: not a .jsonl file, and reading Hub data sets takes `pip install datasets`")
        try:
            data = (
                datasets.load_from_disk(source)[split] if path.is_dir() else datasets.load_dataset(source, split=split)
            )
        except Exception as error:  # whatever a hub, a network or a cache may raise
            fail(f"{source}: no data set of that name, or no split {split!r} in it ({error})")
        rows = [check_row(row, f"{source}, split {split}, row {number}") for number, row in enumerate(data)]
    if not rows:
        fail(f"{source}: holds no rows; expected one JSON object a line with {', '.join(FIELDS)}")
    return rows


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512):
    """A BPE tokenizer of the texts' own words and numbers, as transformers wants it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    split = [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def encode(rows: list[dict], tokenizer, max_prompt_length: int, max_length: int) -> list[dict]:
    """Rows with the token ids of their texts; says on stderr how many rows were left out or answers cut."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    kept, cut = [], 0
    for row in rows:
        ids = {field: tokenizer(row[field], add_special_tokens=False)["input_ids"] for field in FIELDS}
        prompt = ([] if bos is None else [bos]) + ids["prompt"]
        if len(prompt) > max_prompt_length:
            continue
        room = max_length - len(prompt)
        answers = {field: ids[field] + [eos] for field in FIELDS[1:]}
        cut += sum(len(answer) > room for answer in answers.values())
        kept.append({**row, "prompt_ids": prompt, **{f"{f}_ids": answers[f][:room] for f in answers}})
    if len(kept) < len(rows):
        left_out = f"{len(rows) - len(kept)} of {len(rows)} pairs left out"
        print(f"{left_out}: prompt longer than --max-prompt-length {max_prompt_length} tokens", file=sys.stderr)
    if cut:
        print(f"{cut} answers cut at --max-length {max_length} tokens, prompt included", file=sys.stderr)
    if not kept:
        fail(f"no pair is left: all prompts are longer than --max-prompt-length {max_prompt_length} tokens")
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


def batch_at(rows: list[dict], step: int, size: int, seed: int) -> list[dict]:
    """The batch of a step: shuffled anew each epoch, a function of its arguments alone, so that a run can resume."""
    order: list[int] = []
    first = step * size
    for epoch in range(first // len(rows), (first + size - 1) // len(rows) + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(len(rows), generator=generator).tolist()
    offset = first % len(rows)
    return [rows[i] for i in order[offset : offset + size]]


def write_whole(path: Path, write) -> None:
    """write(temporary path), then rename: what stands at `path` is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    write(temporary)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 2) -> None:
    """State of tensors, numbers and strings as checkpoint-<step>.pt; the newest `keep` are kept."""
    write_whole(folder / f"checkpoint-{step:08d}.pt", lambda path: torch.save(state, path))
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-keep]:
        old.unlink()


def load_checkpoint(folder: Path, device: str) -> dict:
    """The newest checkpoint's state."""
    found = sorted(folder.glob("checkpoint-*.pt"))
    if not found:
        fail(f"{folder}: no checkpoint to resume from; leave out --resume to start anew")
    return torch.load(found[-1], map_location=device, weights_only=True)


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics file; a last line that an interruption cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_metrics(rows: list[dict], panels: dict[str, str], path: Path, title: str) -> None:
    """A PNG with one panel for each metric (name: title of the panel), over steps, a colour a stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(10, 6), layout="constrained", squeeze=False)
    for axis, (name, label) in zip(axes.flat, panels.items()):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]
            if points:
                axis.plot(*zip(*points), label=stage, linewidth=1.2)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    plt.close(figure)
