"""What rewards answers: the program that checks the shipped questions, a user's function, or a reward model.

A judge takes rows with a sampled answer (answer_ids, answer_text) and returns a number for each, NaN for an answer that
it cannot score. The user's own columns are in a row under `formats.COLUMNS`, untouched.
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

import comparisons
import dataset
import models
import tokens
import torch
from common import fail
from formats import COLUMNS
from torch import Tensor

FIELDS = ("answer",)
NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL hands every other column to a reward function
BESIDE = ("completion_ids", "trainer_state", "log_extra", "log_metric")  # TRL hands these, too
Judge = Callable[[list[dict]], list[float]]


def by_program(rows: list[dict]) -> list[float]:
    """1 for an answer that the checking program finds right, 0 for others."""
    return [float(comparisons.is_correct(dataset.text_of(row["prompt"]), row["answer_text"])) for row in rows]


def check_flags(args) -> None:
    """Refuses --reward-function and --reward-model that are not there, before anything is read."""
    if args.reward_model and args.reward_function:
        fail("--reward-function: given beside --reward-model; one of them rewards")
    if args.reward_function:
        check_file(args.reward_function)
    if args.reward_model:
        check_folder(args.reward_model)


def check_file(spec: str) -> tuple[str, str]:
    """(path, name) of FILE.py:NAME."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file() or not path.endswith(".py"):
        fail(f"--reward-function: got {spec!r}, expected FILE.py:NAME with a file that exists")
    return path, name


def check_folder(folder: str) -> None:
    """Refuses a folder without a model."""
    if not (Path(folder) / "config.json").is_file():
        fail(f"--reward-model: {folder} holds no model; expected the folder `model` of a run of reward.py")


def waited(result):
    """The result of an async function, on one event loop for all calls, as clients that are kept want it."""
    if not inspect.isawaitable(result):
        return result
    if not hasattr(waited, "loop"):
        waited.loop = asyncio.new_event_loop()
        threading.Thread(target=waited.loop.run_forever, daemon=True).start()

    async def wait():
        return await result

    return asyncio.run_coroutine_threadsafe(wait(), waited.loop).result()


def beside(function: Callable) -> set[str]:
    """Which of `BESIDE` a function takes: all with **kwargs, else those that it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return set(BESIDE)
    every = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return set(BESIDE) if every else {parameter.name for parameter in parameters} & set(BESIDE)


def columns_of(rows: list[dict]) -> dict[str, list]:
    """The user's columns by name, a list in the order of the rows; None where a row lacks one."""
    names = dict.fromkeys(name for row in rows for name in row[COLUMNS] if name not in NOT_COLUMNS)
    taken = [name for name in names if name in ("prompts", "completions", *BESIDE)]
    if taken:
        fail(f"--reward-function: the data set has a column {taken[0]!r}, the name of another argument; rename it")
    return {name: [row[COLUMNS].get(name) for row in rows] for name in names}


def by_function(spec: str, progress: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> Judge:
    """The rewards of a function in a file, called as TRL's GRPO calls its own; it may be async.

    progress: (steps done, steps of the run), for `trainer_state`. What the function logs by `log_metric` is in the
    judge's `logged` after a call; `log_extra` has no table here to go to.
    """
    path, name = check_file(spec)
    found = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # whatever a user's file may raise
        fail(f"--reward-function: {spec} cannot be loaded ({type(error).__name__}: {error})")
    takes, logged = beside(function), {}

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
        how = columns_of(rows) | {name: value for name, value in given.items() if name in takes}
        try:
            return waited(function(prompts=prompts, completions=said, **how))
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            fail(f"--reward-function: {spec} raised {type(error).__name__}: {error} (line {line})")

    judge.logged = logged
    return judge


def by_model(folder: str, tokenizer, args, prompts: Iterable[dict] = ()) -> Judge:
    """The rewards of a reward model with the policy's tokenizer."""
    check_folder(folder)
    flag = "--reward-model"
    model = models.load("AutoModelForSequenceClassification", folder, args, flag, num_labels=1)
    model = models.check_scores(model.to(args.device).eval().requires_grad_(False), flag)
    if models.load_tokenizer(folder, flag).get_vocab() != tokenizer.get_vocab():
        fail(f"--reward-model: {folder} has another tokenizer than the policy; train it from the policy's model")
    tokens.check_fits(model, tokenizer, list(prompts), args, flag)

    @torch.no_grad()
    def judge(rows: list[dict]) -> list[float]:
        scores = []
        for begin in range(0, len(rows), 100):
            batch = dataset.stack(rows[begin : begin + 100], FIELDS, tokenizer.pad_token_id, args.device)
            scores += models.rewards(model, batch, args).tolist()
        return scores

    return judge


def listed(rewards: object) -> list | None:
    """A list of any sequence of rewards (an array, a tensor, a tuple); None of anything else."""
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    return list(rewards) if isinstance(rewards, Iterable) and not isinstance(rewards, (str, bytes, dict)) else None


def checked(judge: Judge, what: str) -> Judge:
    """The judge, or an error where its rewards are no finite numbers, one for each answer; NaN for None."""

    def judged(rows: list[dict]) -> list[float]:
        given = judge(rows)
        rewards = listed(given)
        if rewards is None or len(rewards) != len(rows):
            got = type(given).__name__ if rewards is None else f"{len(rewards)} rewards"
            fail(f"{what}: returned {got}, expected a list of {len(rows)} numbers, one for each answer")
        rewards = [one.item() if isinstance(one, Tensor) and one.numel() == 1 else one for one in rewards]
        for reward, row in zip(rewards, rows):
            if reward is not None and not (isinstance(reward, numbers.Real) and math.isfinite(reward)):
                asked = f"for {row['answer_text']!r} to {dataset.text_of(row['prompt'])!r}"
                fail(f"{what}: returned {reward!r} {asked}; a reward is a finite number")
        return [math.nan if reward is None else float(reward) for reward in rewards]

    judged.logged = getattr(judge, "logged", {})
    return judged


def judge_of(args, tokenizer, prompts: list[dict], progress: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> Judge:
    """What rewards answers: --reward-model, --reward-function, or the program that checks the shipped questions."""
    if args.reward_model:
        return checked(by_model(args.reward_model, tokenizer, args, prompts), f"--reward-model {args.reward_model}")
    if args.reward_function:
        return checked(by_function(args.reward_function, progress), f"--reward-function {args.reward_function}")
    other = next((row for row in prompts if not comparisons.is_question(dataset.text_of(row["prompt"]))), None)
    if other is not None:
        asked = dataset.text_of(other["prompt"])
        fail(f"the checking program does not know {asked!r}; give --reward-model or --reward-function")
    return by_program
