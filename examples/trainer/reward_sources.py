"""Rewards of answers from one of three sources: the checking program, a user's function, or a reward model.

A source is a `Judge`: it takes rows with a sampled answer (answer_ids, answer_text) and returns one number per row, NaN
for an answer that it cannot score. The user's own columns are in each row under `formats.COLUMNS`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import numbers
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from . import comparisons, dataset, formats, models, scoring, tokenization
from .errors import fail
from .formats import COLUMNS

FIELDS = ("answer",)
NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL passes all other columns to a reward function
EXTRAS = ("completion_ids", "trainer_state", "log_extra", "log_metric")  # TRL passes these as well
Judge = Callable[[list[dict]], list[float]]


def by_program(rows: list[dict]) -> list[float]:
    """1 for an answer that `comparisons.is_correct` accepts, otherwise 0."""
    return [float(comparisons.is_correct(formats.text_of(row["prompt"]), row["answer_text"])) for row in rows]


def check_flags(args) -> None:
    """Check that --reward-function or --reward-model exists, before any data is read."""
    if args.reward_model and args.reward_function:
        fail("--reward-function: given together with --reward-model; give only one of them")
    if args.reward_function:
        check_file(args.reward_function)
    if args.reward_model:
        check_folder(args.reward_model)


def check_file(spec: str) -> tuple[str, str]:
    """Split FILE.py:NAME into (path, name)."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file() or not path.endswith(".py"):
        fail(f"--reward-function: got {spec!r}, expected FILE.py:NAME with an existing file")
    return path, name


def check_folder(folder: str) -> None:
    """Check that a folder contains a model."""
    if not (Path(folder) / "config.json").is_file():
        fail(f"--reward-model: {folder} contains no model; expected the folder `model` of a run of reward.py")


def waited(result):
    """Wait for the result of an async function. All calls use one event loop, so that clients can be reused."""
    if not inspect.isawaitable(result):
        return result
    if not hasattr(waited, "loop"):
        waited.loop = asyncio.new_event_loop()
        threading.Thread(target=waited.loop.run_forever, daemon=True).start()

    async def wait():
        return await result

    return asyncio.run_coroutine_threadsafe(wait(), waited.loop).result()


def extras_of(function: Callable) -> set[str]:
    """Which of `EXTRAS` a function accepts: all if it has **kwargs, otherwise its parameters."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return set(EXTRAS)
    every = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return set(EXTRAS) if every else {parameter.name for parameter in parameters} & set(EXTRAS)


def columns_of(rows: list[dict]) -> dict[str, list]:
    """The user's columns by name, each a list over the rows, with None for a row without the column."""
    names = dict.fromkeys(name for row in rows for name in row[COLUMNS] if name not in NOT_COLUMNS)
    taken = [name for name in names if name in ("prompts", "completions", *EXTRAS)]
    if taken:
        fail(f"--reward-function: the data set has a column {taken[0]!r}, also the name of an argument; rename it")
    return {name: [row[COLUMNS].get(name) for row in rows] for name in names}


def by_function(spec: str, progress: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> Judge:
    """The rewards of a function in a file, called as TRL's GRPOTrainer calls reward functions; it may be async.

    Values that the function logs by `log_metric` are in the judge's attribute `logged` after a call. `log_extra` is
    accepted and does nothing, since there is no table of completions.

    Args:
        spec: FILE.py:NAME. progress: returns (steps done, steps of the run), for `trainer_state`.
    """
    path, name = check_file(spec)
    found = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # a user's file may raise anything
        fail(f"--reward-function: {spec} cannot be loaded ({type(error).__name__}: {error})")
    takes, logged = extras_of(function), {}

    def judge(rows: list[dict]) -> list[float]:
        logged.clear()
        step, steps = progress()
        given = {
            "completion_ids": [row["answer_ids"] for row in rows],
            "trainer_state": models.quiet().TrainerState(global_step=step, max_steps=steps),
            "log_extra": lambda column, values: None,
            "log_metric": lambda name, value: logged.setdefault(name, []).append(float(value)),
        }
        texts = [row["answer_text"] for row in rows]
        prompts = [row["prompt"] for row in rows]
        chats = [not isinstance(prompt, str) for prompt in prompts]
        said = [[{"role": "assistant", "content": text}] if chat else text for text, chat in zip(texts, chats)]
        arguments = columns_of(rows) | {name: value for name, value in given.items() if name in takes}
        try:
            return waited(function(prompts=prompts, completions=said, **arguments))
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            fail(f"--reward-function: {spec} raised {type(error).__name__}: {error} (line {line})")

    judge.logged = logged
    return judge


def by_model(folder: str, tokenizer, args, prompts: Iterable[dict] = ()) -> Judge:
    """The rewards of a reward model with the policy's tokenizer. prompts: rows to check against the model's limits."""
    check_folder(folder)
    flag = "--reward-model"
    model = models.load("AutoModelForSequenceClassification", folder, args, flag, num_labels=1)
    model = scoring.check_scores(model.to(args.device).eval().requires_grad_(False), flag)
    if models.load_tokenizer(folder, flag).get_vocab() != tokenizer.get_vocab():
        fail(f"--reward-model: {folder} has a different tokenizer than the policy; train it from the policy's model")
    tokenization.check_fits(model, tokenizer, list(prompts), args, flag)

    @torch.no_grad()
    def judge(rows: list[dict]) -> list[float]:
        scores = []
        for begin in range(0, len(rows), 100):
            batch = dataset.stack(rows[begin : begin + 100], FIELDS, tokenizer.pad_token_id, args.device)
            scores += scoring.rewards(model, batch, args).tolist()
        return scores

    return judge


def as_list(rewards: object) -> list | None:
    """Convert a sequence of rewards (list, tuple, array, tensor) to a list; None if it is not a sequence."""
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    return list(rewards) if isinstance(rewards, Iterable) and not isinstance(rewards, (str, bytes, dict)) else None


def checked(judge: Judge, what: str) -> Judge:
    """Wrap a judge: end the program unless it returns one finite number or None per answer; None becomes NaN."""

    def judged(rows: list[dict]) -> list[float]:
        given = judge(rows)
        rewards = as_list(given)
        if rewards is None or len(rewards) != len(rows):
            got = type(given).__name__ if rewards is None else f"{len(rewards)} rewards"
            fail(f"{what}: returned {got}, expected a list of {len(rows)} numbers, one per answer")
        rewards = [one.item() if isinstance(one, Tensor) and one.numel() == 1 else one for one in rewards]
        for reward, row in zip(rewards, rows):
            if reward is not None and not (isinstance(reward, numbers.Real) and math.isfinite(reward)):
                asked = f"for {row['answer_text']!r} to {formats.text_of(row['prompt'])!r}"
                fail(f"{what}: returned {reward!r} {asked}; expected a finite number or None")
        return [math.nan if reward is None else float(reward) for reward in rewards]

    judged.logged = getattr(judge, "logged", {})
    return judged


def judge_from(args, tokenizer, prompts: list[dict], progress: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> Judge:
    """The source of rewards: --reward-model, --reward-function, or the program that checks the shipped questions."""
    if args.reward_model:
        return checked(by_model(args.reward_model, tokenizer, args, prompts), f"--reward-model {args.reward_model}")
    if args.reward_function:
        return checked(by_function(args.reward_function, progress), f"--reward-function {args.reward_function}")
    other = next((row for row in prompts if not comparisons.is_question(formats.text_of(row["prompt"]))), None)
    if other is not None:
        asked = formats.text_of(other["prompt"])
        fail(f"the checking program cannot judge answers to {asked!r}; give --reward-model or --reward-function")
    return by_program
