"""What the scripts that sample share: rollouts with rewards, log-probs of the answers, evaluation, the whole run.

    parse(parser, argv, ...)                   adds and checks the flags of sampling and rewards
    train(args, panels, stage, train_steps)    the whole run around a script's own steps
    begin(run, args, texts, warm_up)           (policy, reference, tokenizer, prompts, held-out prompts, judge)
    rollout(model, tokenizer, prompts, args, judge)
                                               rows with answer_ids, answer_text, ended, reward
    annotated(engine, rows, tokenizer, args, values_of)
                                               adds values of the answers' tokens, computed without gradients
    stacked(rows, name, mask)                  such values as a tensor [B, T], for a loss
    measure(...)                               on held-out prompts: correct answers, reward, exact KL to the reference

An answer ends with its end-of-sequence token; a row holds no tokens after it, so none are scored.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fused_po

from . import dataset, flags, models, parallel, reward_sources, sampling, scoring, setup
from .errors import fail
from .formats import COLUMNS
from .reward_sources import FIELDS, Judge
from .training_run import Run

SHARES = {
    "correct": "greedy answers that are correct",
    "reward": "reward of sampled answers",
    "kl": "exact KL to the reference, nats per answer",
}


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, positive: tuple[str, ...], natural: tuple[str, ...]
) -> argparse.Namespace:
    """Add the flags of sampling and rewards to the script's own, parse and check all of them."""
    add = parser.add_argument
    text = "limit of an answer in tokens, including its end-of-sequence token"
    add("--max-completion-length", type=int, default=16, help=text)
    add("--temperature", type=float, default=1.0, help="for sampling, and for the log-probs in the loss")
    text = (
        "folder of a model from reward.py (runs/reward/model) that computes the rewards. Default: a program that checks"
    )
    add("--reward-model", help=f"{text} the answers to the shipped questions")
    text = (
        "FILE.py:NAME of a function that returns a list of rewards, called as in TRL: prompts=, completions=, and the"
    )
    add("--reward-function", help=f"{text} data set's other columns")
    text = "subtracted from the reward of an answer without end-of-sequence token"
    add("--missing-eos-penalty", type=float, default=1.0, help=text)
    add("--sft-batch-size", type=int, default=32, help="rows per supervised step")
    positive += ("max_completion_length", "temperature", "sft_batch_size")
    args = flags.parse(parser, argv, positive, (*natural, "missing_eos_penalty"))
    reward_sources.check_flags(args)
    if args.max_prompt_length + args.max_completion_length > args.max_length:
        lengths = f"{args.max_prompt_length} + {args.max_completion_length}"
        fail(f"--max-length: got {args.max_length}, less than prompt and completion may have, {lengths} tokens")
    return args


def begin(run: Run, args, texts: tuple[list[dict], list[dict]], warm_up: Callable):
    """Everything before the first rollout, supervised steps included. warm_up: `sft.warm_up`.

    Returns:
        (policy, frozen reference or None, tokenizer, prompts, held-out prompts, judge).
    """
    model, tokenizer, prompts, held_out = setup.start(args, texts)
    if args.sft_steps and not all("chosen_ids" in row for row in prompts):
        fail("--sft-steps: the data set has prompts without answers to train on; give --model and --sft-steps 0")
    done = lambda: (sum(row["stage"] != "SFT" for row in run.history), args.steps)  # noqa: E731
    judge = reward_sources.judge_from(args, tokenizer, prompts + held_out, done)  # before the steps: it may be missing
    shape = argparse.Namespace(**{**vars(args), "batch_size": args.sft_batch_size})
    model = warm_up(run, model, tokenizer, prompts, shape)
    frozen = models.freeze(model, args)
    return models.adapt(model, args), frozen, tokenizer, prompts, held_out, judge


def rollout(
    model, tokenizer, prompts: list[dict], args, judge: Judge, *, samples: int = 1, seed: int | None = None
) -> list[dict]:
    """Draw `samples` answers for each prompt and reward them. The answers to one prompt are consecutive rows.

    The ranks share the prompts and draw different random numbers; all ranks get all rows.

    Args:
        judge: sees the user's columns in the rows, and all of them, whatever their names, under COLUMNS.
        seed: seeds the draws and leaves torch's generator unchanged. None: use the generator as it is.

    Returns:
        Rows with answer_ids, answer_text, ended, reward (NaN if the judge could not score it), and logged (means of
        what the judge logged during the call).
    """
    own = [{COLUMNS: {name: value for name, value in row.items() if name != "prompt_ids"}, **row} for row in prompts]
    asked = parallel.deal([row for row in own for _ in range(samples)], args)
    options = dict(temperature=args.temperature, seed=parallel.own_seed(seed, args))
    rows = sampling.sample(model, tokenizer, asked, args, args.max_completion_length, **options)
    rows = [{**row[COLUMNS], **row} for row in rows]
    ends = sampling.end_ids(model, tokenizer)
    ended = [row["answer_ids"][-1] in ends for row in rows]
    rewards = [r - (0.0 if end else args.missing_eos_penalty) for r, end in zip(judge(rows) if rows else [], ended)]
    logged = {name: sum(values) / len(values) for name, values in getattr(judge, "logged", {}).items()}
    rows = [{**row, "ended": end, "reward": reward, "logged": logged} for row, end, reward in zip(rows, ended, rewards)]
    return parallel.collect(rows, args)


def rewarded(rows: list[dict]) -> list[dict]:
    """The rows that have a reward; ends the program if none has."""
    found = [row for row in rows if not math.isnan(row["reward"])]
    if not found:
        fail(f"--reward-function: returned None for all {len(rows)} answers of a step; expected some numbers")
    return found


def column(rows: list[dict], name: str) -> Tensor:
    """The rows' values of `name` as [N], float64, on the CPU."""
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def stack(rows: list[dict], tokenizer, args) -> tuple[dict[str, Tensor], Tensor]:
    """(batch, mask [B, T]); the mask is True at positions that predict a token of an answer."""
    batch = dataset.stack(rows, FIELDS, tokenizer.pad_token_id, args.device)
    return batch, fused_po.shift_labels(batch["labels"]) != dataset.IGNORE


def logps_of(model, hidden: Tensor, batch: dict[str, Tensor], args, outputs: tuple[str, ...] = ("logps",)):
    """Log-probs and the other `outputs` [B, T] of a batch's labels, at the sampling temperature."""
    labels = fused_po.shift_labels(batch["labels"])
    options = dict(temperature=args.temperature, outputs=outputs)
    with scoring.autocast(args):
        return fused_po.linear_logps(hidden, labels=labels, **options, **scoring.head(model))


def exact_kl(model, frozen, hidden: Tensor, batch: dict[str, Tensor], args) -> fused_po.KLStats:
    """KLStats [B, T]: the exact KL to the reference at each answer token, and its log-prob; both have gradients."""
    labels = fused_po.shift_labels(batch["labels"])
    with models.reference(model, frozen) as scorer:
        head = scoring.head(scorer)
        ref = dict(ref_hidden=scoring.hidden_states(scorer, batch, args), ref_weight=head["weight"])
        ref |= dict(ref_bias=head["bias"])
    with scoring.autocast(args):
        return fused_po.linear_kl(hidden, labels=labels, **ref, **scoring.head(model), temperature=args.temperature)


def split(values: dict[str, Tensor], mask: Tensor, rows: list[dict]) -> list[dict]:
    """Add to each row its answer's part [n] of values [B, T]."""
    lengths = mask.sum(1).tolist()
    parts = {name: value[mask].split(lengths) for name, value in values.items()}
    return [{**row, **{name: part[i] for name, part in parts.items()}} for i, row in enumerate(rows)]


def stacked(rows: list[dict], name: str, mask: Tensor) -> Tensor:
    """The inverse of `split`: the rows' values of `name` as [B, T], 0 outside the answers."""
    flat = torch.cat([row[name] for row in rows])
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


@torch.no_grad()
def annotated(
    engine: parallel.Engine, rows: list[dict], tokenizer, args, values_of: Callable[[dict], dict[str, Tensor]]
) -> list[dict]:
    """Add values of the answers' tokens to the rows, computed as in training but without gradients.

    Args:
        values_of: a stacked batch -> values [B, T] by name.
    """
    out: list[dict] = []
    for part, weight, _ in parallel.parts(rows, args):
        batch, mask = stack(part, tokenizer, args)
        values = engine(partial(values_of, batch))
        out += split(values, mask, part) if weight else []
    return parallel.collect(out, args)


def with_old_logps(engine: parallel.Engine, rows: list[dict], tokenizer, args) -> list[dict]:
    """Add old_logps and entropy to the rows: the policy's, before an update."""
    model = engine.policy

    def values_of(batch):
        hidden = scoring.hidden_states(model, batch, args)
        stats = logps_of(model, hidden, batch, args, ("logps", "entropy"))
        return {"old_logps": stats.logps, "entropy": stats.entropy}

    return annotated(engine, rows, tokenizer, args, values_of)


def with_ref_logps(engine: parallel.Engine, rows: list[dict], tokenizer, args) -> list[dict]:
    """Add ref_logps to the rows: the reference's log-probs."""
    with models.reference(engine.policy, engine.frozen) as scorer:

        def values_of(batch):
            return {"ref_logps": logps_of(scorer, scoring.hidden_states(scorer, batch, args), batch, args).logps}

        return annotated(engine, rows, tokenizer, args, values_of)


def mean_of(rows: list[dict], name: str) -> float:
    """Mean of a value over the tokens of all answers."""
    return torch.cat([row[name] for row in rows]).mean().item()


def logged_means(rows: list[dict]) -> dict[str, float]:
    """Means of the values that a reward function logged by `log_metric`, over the answers of those calls."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.get("logged", {}).items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def sampling_metrics(rows: list[dict]) -> dict[str, float]:
    """Rewards, lengths and the share of answers without end-of-sequence token, under TRL's names."""
    rewards = column([row for row in rows if not math.isnan(row["reward"])], "reward")
    lengths = [len(row["answer_ids"]) for row in rows]
    return {
        **logged_means(rows),
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(unbiased=False).item(),
        "completions/mean_length": sum(lengths) / len(rows),
        "completions/clipped_ratio": sum(not row["ended"] for row in rows) / len(rows),
    }


@torch.no_grad()
def measure(model, frozen, tokenizer, prompts: list[dict], args, judge: Judge) -> dict[str, float]:
    """Evaluate on held-out prompts.

    Returns:
        correct: share of correct greedy answers; NaN if the program cannot check any. reward: mean of sampled answers.
        kl: exact KL to the reference, summed over the tokens of a sampled answer, in nats per answer.
    """
    rows = rollout(model, tokenizer, prompts, args, judge, seed=args.seed)
    nats, mine = 0.0, parallel.deal(rows, args)
    with scoring.evaluating(model):
        for begin in range(0, len(mine), 100):
            batch, _ = stack(mine[begin : begin + 100], tokenizer, args)
            nats += exact_kl(model, frozen, scoring.hidden_states(model, batch, args), batch, args).kl.sum().item()
    nats = parallel.total({"nats": nats}, args)["nats"]
    correct = sampling.share_correct(model, tokenizer, prompts, args, longest=args.max_completion_length)
    reward = column(rows, "reward").nanmean().item()
    return logged_means(rows) | {"correct": correct, "reward": reward, "kl": nats / len(rows)}


def train(
    args,
    panels: dict[str, str],
    stage: str,
    train_steps: Callable,
    warm_up: Callable,
    module_of: Callable = lambda model: model,
) -> dict[str, dict[str, float]]:
    """A whole run: supervised steps, a script's `train_steps`, evaluation, saving.

    Args:
        stage: name of the method. warm_up: `sft.warm_up`.
        module_of: the policy -> the module to train, which contains the policy.

    Returns:
        The results of `measure` before and after.
    """
    texts = setup.load_rows(args, "prompt")
    with Run(args, panels) as run:
        model, frozen, tokenizer, prompts, held_out, judge = begin(run, args, texts, warm_up)
        engine = parallel.Engine(args, module_of(model), frozen)

        def evaluate() -> dict[str, float]:
            with engine.gathered():
                return measure(model, frozen, tokenizer, held_out, args, judge)

        shares = {"before": evaluate()}
        train_steps(run, engine, tokenizer, prompts, args, judge, evaluate)
        shares["after"] = evaluate()
        title = f"Supervised training, then {stage}"
        run.finish(
            engine.whole(model), tokenizer, title, SHARES, {"reference": shares["before"], "after": shares["after"]}
        )
    return shares
