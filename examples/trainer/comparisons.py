"""The shipped preference data: which of two numbers is larger? A program can check every answer.

    python examples/trainer/comparisons.py    # writes examples/data/comparisons-{train,test}.jsonl, always the same

Rows have TRL's columns prompt, chosen and rejected; an answer starts with the space that separates it from the prompt.
No pair of numbers is in both the training set and the test set.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

DATA = Path(__file__).parent.parent / "data"
TRAIN, TEST = DATA / "comparisons-train.jsonl", DATA / "comparisons-test.jsonl"
QUESTIONS = ("Which is larger, {} or {}?", "Name the larger of {} and {}.", "Is the larger number {} or {}?")
ANSWERS = ("The {} number is larger.", "It is the {} one.")


def is_question(prompt: str) -> bool:
    """Whether `is_correct` can check answers to this prompt."""
    return len(re.findall(r"\d+", prompt)) == 2 and "larger" in prompt


def is_correct(prompt: str, answer: str) -> bool:
    """Whether the answer is exactly one of the correct ones, apart from white space around it."""
    return is_question(prompt) and answer.strip() in answers(*map(int, re.findall(r"\d+", prompt)))


def answers(first: int, second: int) -> list[str]:
    """The correct answers: every way to say which number is larger."""
    return [form.format("first" if first > second else "second") for form in ANSWERS]


def make_pairs(numbers: list[tuple[int, int]], rng: random.Random) -> list[dict[str, str]]:
    """One row for each pair of numbers, in random order within the question."""
    rows = []
    for pair in numbers:
        first, second = rng.sample(pair, 2)
        form = rng.randrange(len(ANSWERS))
        prompt = rng.choice(QUESTIONS).format(first, second)
        chosen, rejected = answers(first, second)[form], answers(second, first)[form]
        rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return rows


def build(seed: int = 0, train: int = 2400, test: int = 300) -> tuple[list[dict], list[dict]]:
    """(training rows, test rows) over disjoint sets of pairs of numbers from 0 to 99."""
    rng = random.Random(seed)
    numbers = [(a, b) for a in range(100) for b in range(a)]
    rng.shuffle(numbers)
    return make_pairs(numbers[:train], rng), make_pairs(numbers[train : train + test], rng)


def write(folder: Path) -> None:
    """Write both files into a folder."""
    for path, rows in zip((TRAIN, TEST), build()):
        (folder / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    write(DATA)
