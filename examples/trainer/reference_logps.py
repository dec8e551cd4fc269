"""The reference's log-probs of a batch: from its forward pass, or from a cache on disk (--precompute-ref)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import fused_po

from . import dataset, models, parallel, run_files, scoring
from .errors import fail


def add_flags(parser) -> None:
    """Add --precompute-ref and --ref-cache to a parser."""
    add = parser.add_argument
    add("--precompute-ref", action="store_true", help="compute the reference's log-probs once and cache them")
    add("--ref-cache", default="runs/reference", help="folder of that cache: one file per model and data set")


def key_of(model, rows: list[dict], fields: tuple[str, ...], args) -> str:
    """A hash of everything that the log-probs depend on: weights, tokens, precision, PyTorch's version."""
    digest = hashlib.sha256(json.dumps([fields, args.bf16, torch.__version__]).encode())
    for name, value in sorted(model.state_dict().items()):
        if "lora_" not in name:  # the reference is the model without its adapters
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    for row in rows:
        digest.update(json.dumps([row["prompt_ids"], *(row[f"{field}_ids"] for field in fields)]).encode())
    return digest.hexdigest()


@torch.no_grad()
def score(model, frozen, rows: list[dict], fields: tuple[str, ...], tokenizer, args) -> dict[str, Tensor]:
    """By field, the reference's log-probs [N] of all scored tokens, row after row."""
    parts: dict[str, list[Tensor]] = {field: [] for field in fields}
    size, rows = args.micro_batch_size or args.batch_size, parallel.deal(rows, args)
    with models.reference(model, frozen) as scorer:
        for begin in tqdm(range(0, len(rows), size), desc="reference", disable=None if parallel.first() else True):
            for field in fields:
                batch = dataset.stack(rows[begin : begin + size], (field,), tokenizer.pad_token_id, args.device)
                mask = fused_po.shift_labels(batch["labels"]) != dataset.IGNORE
                parts[field].append(scoring.token_stats(scorer, batch, args).logps[mask].cpu())
    mine = {field: torch.cat([torch.empty(0), *part]) for field, part in parts.items()}
    every = parallel.collect([mine], args)
    return {field: torch.cat([part[field] for part in every]) for field in fields}


def scored(model, frozen, rows: list[dict], fields: tuple[str, ...], tokenizer, args) -> list[dict]:
    """Add the reference's log-probs of each answer's tokens to the rows, as <field>_ref [n].

    They are read from --ref-cache if they are there, otherwise computed and written. The ranks share the rows. To be
    called before an `Engine` shards the model.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    key = key_of(model if frozen is None else frozen, rows, fields, args)
    path = Path(args.ref_cache) / f"{key[:32]}.safetensors"
    lengths = {field: [len(row[f"{field}_ids"]) - (not row["prompt_ids"]) for row in rows] for field in fields}
    if parallel.agreed(path.exists):
        try:
            with safe_open(path, framework="pt") as file:
                found, logps = (file.metadata() or {}).get("key"), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            fail(f"--ref-cache: {path} cannot be read ({error}); delete it to compute it again")
        good = {name: len(value) for name, value in logps.items()} == {name: sum(v) for name, v in lengths.items()}
        if found != key or not good or not all(value.isfinite().all() for value in logps.values()):
            fail(f"--ref-cache: {path} does not match its name; delete it to compute it again")
    else:
        if parallel.first():
            run_files.make_folder(path.parent, "--ref-cache")
        logps = score(model, frozen, rows, fields, tokenizer, args)
        if parallel.first():
            whole = save(logps, metadata={"key": key})
            run_files.write_whole(path, lambda temporary: temporary.write_bytes(whole))
    split = {field: logps[field].split(lengths[field]) for field in fields}
    return [{**row, **{f"{field}_ref": split[field][i] for field in fields}} for i, row in enumerate(rows)]


def logps_of(model, frozen, rows: list[dict], fields: tuple[str, ...], batch: dict[str, Tensor], args) -> Tensor:
    """The reference's log-probs [len(fields) * B, T] of the batch `dataset.stack(rows, fields, ...)`.

    Taken from the rows if `scored` has added them, otherwise from a forward pass of the reference.
    """
    if f"{fields[0]}_ref" not in rows[0]:
        with models.reference(model, frozen) as scorer:
            return scoring.token_stats(scorer, batch, args).logps
    mask = fused_po.shift_labels(batch["labels"]) != dataset.IGNORE
    flat = torch.cat([row[f"{field}_ref"] for field in fields for row in rows]).to(mask.device)
    return torch.zeros(mask.shape, dtype=flat.dtype, device=mask.device).masked_scatter(mask, flat)
