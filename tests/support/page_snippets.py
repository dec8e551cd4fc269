"""Read code, command lines and links from README.md and docs/*.md; the variables that the code expects."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import torch
from tiny_models import batch, causal_lm

import fused_po

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "python3", "make", "torchrun", "accelerate", "pytest", "pip")
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    code: str
    why: str | None  # why it cannot run, from the marker <!-- not run: why --> on the line before it


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page in order."""
    text = read(page)
    return [
        Block(name_of(page), text.count("\n", 0, m.start("code")) + 1, m["language"], m["code"], m["why"])
        for m in FENCE.finditer(text)
    ]


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page: in blocks without a language, indented by four spaces, or between backticks."""
    text = read(page)
    lines = [line for block in blocks(page) if block.language in ("", "sh") for line in block.code.splitlines()]
    prose = FENCE.sub("", text)
    lines += re.findall(r"^ {4}(.+)$", prose, re.M)
    lines += [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    found = []
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose or mathematics with a lone quote
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if len(words) > 1 and words[0].removeprefix(".venv/bin/") in PROGRAMS:
            found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


def links(page: Path) -> list[tuple[str, str]]:
    """(file, heading) of a page's links and pictures within the repository; "" means the page itself, or its top."""
    found = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page)))
    return [tuple(link.partition("#")[::2]) for link in found if not re.match(r"https?://", link)]


def headings(page: Path) -> set[str]:
    """A page's headings in the form that links use."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def given() -> dict:
    """The variables that the pages' code expects: models, a batch of two pairs, tensors of the documented shapes."""
    input_ids, labels = batch(3, rows=4)
    policy, reference = causal_lm("Llama", 0), causal_lm("Llama", 1).requires_grad_(False)
    pairs, length = 2, input_ids.shape[1]
    hidden = policy.model(input_ids).last_hidden_state.detach().requires_grad_()
    ref_hidden = reference.model(input_ids).last_hidden_state
    aligned = fused_po.shift_labels(labels)
    ref_logps = fused_po.linear_logps(ref_hidden, reference.lm_head.weight, aligned).logps
    data = {
        "policy": policy, "reference": reference, "model": policy, "input_ids": input_ids, "labels": labels,
        "mask": torch.ones_like(input_ids), "hidden": hidden, "weight": policy.lm_head.weight,
        "ref_hidden": ref_hidden, "ref_weight": reference.lm_head.weight, "ref_logps": ref_logps,
        "ref_sums": fused_po.sequence_logps(ref_logps), "lengths": (aligned != -100).sum(-1), "B": pairs, "T": length,
        "logits": policy(input_ids).logits, "old_logps": ref_logps, "advantages": torch.randn(2 * pairs),
    }  # fmt: skip
    return data
