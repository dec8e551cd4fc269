"""Puts the planner's tables into docs/scaling.md: `python docs/make_scaling_tables.py`."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from fused_po.__main__ import main as command
from fused_po.planner.command import human, seconds

PAGE = Path(__file__).with_name("scaling.md")
HEADS = {
    "Qwen3-0.6B": (151936, 1024),
    "Qwen3-8B": (151936, 4096),
    "Llama-3-8B": (128256, 4096),
    "Llama-3-70B": (128256, 8192),
    "Llama-3.1-405B": (128256, 16384),
    "Gemma-3-4B": (262208, 2560),
    "Gemma-3-27B": (262208, 5376),
}
BATCH = ("--tokens", 2048, "--scored", 0.5)


def plan(head: str, *flags: object) -> dict:
    """The plan that `python -m fused_po plan` prints for a head, as data."""
    vocab, hidden = HEADS[head]
    words = ["plan", "--vocab", vocab, "--hidden", hidden, *BATCH, *flags, "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command([str(word) for word in words])
    return json.loads(out.getvalue())


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def heads() -> list[str]:
    """Every head on one GPU and split over 8, beside TRL, Liger and eager."""
    titles = "head", "1 GPU", "GEMMs", "--tp 8", "GEMMs", "sends", "TRL", "Liger", "eager"
    lines = [row(*titles), "|---" * len(titles) + "|"]
    for head in HEADS:
        alone, cut = (plan(head, "--pairs", 8, "--tp", tp) for tp in (1, 8))
        ours, shared = (found["beside"][0] for found in (alone, cut))
        others = {found["name"].split()[0]: found for found in alone["beside"][1:]}
        figures = [f"{seconds(r['seconds'])}, {human(r['total bytes'])}" for r in (ours, shared)]
        figures += [
            f"{seconds(others[n]['seconds'])}, {human(others[n]['total bytes'])}" for n in ("TRL", "Liger", "eager")
        ]
        counts = [f"{r['GEMMs']:.2f}" for r in (ours, shared)]
        sends = human(shared["sent bytes"])
        lines.append(row(head, figures[0], counts[0], figures[1], counts[1], sends, *figures[2:]))
    return lines


def vocabulary_or_batch() -> list[str]:
    """8 GPUs: one vocabulary split over all of them, or 8 batches."""
    titles = "head", "pairs", "scored", "--tp 8", "sends", "--dp 8", "sends"
    lines = [row(*titles), "|---" * len(titles) + "|"]
    for head in ("Llama-3-8B", "Llama-3-70B"):
        for pairs in (8, 16, 32, 64, 128):
            cut, apart = plan(head, "--pairs", pairs, "--tp", 8), plan(head, "--pairs", pairs // 8, "--dp", 8)
            cells = [head, pairs, cut["work"]["scored"]]
            for found in (cut, apart):
                ours, sent = found["beside"][0], sum(step["sent"] for step in found["steps"])
                cells += [f"{seconds(ours['seconds'])}, {human(ours['total bytes'])}", human(sent)]
            lines.append(row(*cells))
    return lines


def thousands() -> list[str]:
    """Llama 3.1 405B's head on up to 16,384 ranks, 2 pairs on each data-parallel rank."""
    titles = "ranks", "tp x dp", "--dp-mode", "time", "memory", "tp sends", "dp sends", "dp time, overlapped"
    lines = [row(*titles), "|---" * len(titles) + "|"]
    for tp, dp, mode in (
        (1, 1, "ddp"),
        (8, 1, "ddp"),
        (8, 16, "ddp"),
        (8, 16, "fsdp"),
        (8, 512, "fsdp"),
        (16, 1024, "fsdp"),
    ):
        found = plan("Llama-3.1-405B", "--pairs", 2, "--tp", tp, "--dp", dp, "--dp-mode", mode)
        ours, steps = found["beside"][0], found["steps"]
        kinds = {kind: [step for step in steps if step["kind"] == kind] for kind in ("tp", "dp")}
        sent = [human(sum(step["sent"] for step in kinds[kind])) for kind in ("tp", "dp")]
        under = seconds(sum(step["seconds"] for step in kinds["dp"]))
        figures = seconds(ours["seconds"]), human(ours["total bytes"])
        lines.append(row(tp * dp, f"{tp} x {dp}", mode if dp > 1 else "", *figures, *sent, under))
    return lines


def tables() -> list[list[str]]:
    """All of them, in the page's order."""
    return [heads(), vocabulary_or_batch(), thousands()]


def written(page: str) -> str:
    """The page with the current tables in place of those that begin with the same line."""
    for lines in tables():
        begin = page.index(lines[0])
        page = page[:begin] + "\n".join(lines) + page[page.index("\n\n", begin) :]
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
