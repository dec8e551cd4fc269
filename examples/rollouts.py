"""What the loops that sample share: answers of the policy, their rewards, what is known of their tokens.

    parse(parser, argv)                        the flags below, beside those of loop.py
    train(args, panels, stage, train_steps)    the whole run around a script's own steps
    begin(run, args, texts)                    -> (policy, reference, tokenizer, prompts, held-out prompts, judge)
    judge = judge_of(args, tokenizer, prompts) rewards of answers, by a program, a function or a reward model
    rollout(model, tokenizer, prompts, args, judge)
                                               rows with answer_ids, answer_text, ended, reward
    annotated(engine, rows, tokenizer, args, values_of)
                                               rows with values of their answers' tokens, scored without gradients
    stacked(rows, name, mask)                  such values as [B, T], for a loss
    measure(...)                               held out: correct answers, reward, exact KL to the reference

An answer's tokens are those up to and with its end; nothing after it exists in a row, so nothing after it is scored.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import dataset
import judges
import loop
import models
import parallel
import sft
import torch
from common import fail
from formats import COLUMNS
from judges import FIELDS, Judge, by_function, by_model, by_program, checked, judge_of
from torch import Tensor

import fused_po

__all__ = ["FIELDS", "Judge", "by_function", "by_model", "by_program", "checked", "judge_of"]
SHARES = {
    "correct": "greedy answers that are correct",
    "reward": "reward of sampled answers",
    "kl": "exact KL to the reference, nats an answer",
}


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, positive: tuple[str, ...], natural: tuple[str, ...]
) -> argparse.Namespace:
    """The script's flags and those of sampling and rewards, checked."""
    add = parser.add_argument
    add("--max-completion-length", type=int, default=16, help="tokens of an answer, its end included")
    add("--temperature", type=float, default=1.0, help="of the draws, and of the log-probs that are trained")
    add("--reward-model", help="folder of a run of reward.py (runs/reward/model), in place of the checking program")
    called = "FILE.py:NAME, called as TRL calls its reward functions: prompts=, completions=, the data's other columns"
    add("--reward-function", help=f"{called}; returns a list of numbers; in place of the checking program")
    add("--missing-eos-penalty", type=float, default=1.0, help="taken off the reward of an answer that does not end")
    add("--sft-batch-size", type=int, default=32, help="rows of a supervised step")
    positive += ("max_completion_length", "temperature", "sft_batch_size")
    args = loop.parse(parser, argv, positive, (*natural, "missing_eos_penalty"))
    judges.check_flags(args)
    if args.max_prompt_length + args.max_completion_length > args.max_length:
        lengths = f"{args.max_prompt_length} + {args.max_completion_length}"
        fail(f"--max-length: got {args.max_length}, less than a prompt and its answer may have, {lengths} tokens")
    return args


def begin(run: loop.Run, args, texts: tuple[list[dict], list[dict]]):
    """(policy, frozen reference or None, tokenizer, prompts, held-out prompts, judge), after the supervised steps."""
    model, tokenizer, prompts, held_out = loop.start(args, texts)
    if args.sft_steps and not all("chosen_ids" in row for row in prompts):
        fail("--sft-steps: the data set has prompts alone, nothing to imitate; give --model and --sft-steps 0")
    done = lambda: (sum(row["stage"] != "SFT" for row in run.history), args.steps)  # noqa: E731
    judge = judge_of(args, tokenizer, prompts + held_out, done)  # before the steps: it may not be there
    shape = argparse.Namespace(**{**vars(args), "batch_size": args.sft_batch_size})
    model = sft.warm_up(run, model, tokenizer, prompts, shape)
    frozen = models.freeze(model, args)
    return models.adapt(model, args), frozen, tokenizer, prompts, held_out, judge


def rollout(
    model, tokenizer, prompts: list[dict], args, judge: Judge, *, samples: int = 1, seed: int | None = None
) -> list[dict]:
    """The prompts with `samples` answers each, one after the other: answer_ids, answer_text, ended, reward, logged.

    A judge sees the user's columns beside these, and all of them, whatever their names, under COLUMNS. The reward is
    NaN where the judge cannot score an answer; `logged` is what it logged of the call.

    seed: of the draws, which then leave torch's generator as it was. The ranks share the prompts, each with draws of
        its own; all get all rows.
    """
    own = [{COLUMNS: {name: value for name, value in row.items() if name != "prompt_ids"}, **row} for row in prompts]
    asked = parallel.deal([row for row in own for _ in range(samples)], args)
    how = dict(temperature=args.temperature, seed=parallel.own_seed(seed, args))
    rows = models.sample(model, tokenizer, asked, args, args.max_completion_length, **how)
    rows = [{**row[COLUMNS], **row} for row in rows]
    ends = models.end_ids(model, tokenizer)
    ended = [row["answer_ids"][-1] in ends for row in rows]
    rewards = [r - (0.0 if end else args.missing_eos_penalty) for r, end in zip(judge(rows) if rows else [], ended)]
    logged = {name: sum(values) / len(values) for name, values in getattr(judge, "logged", {}).items()}
    rows = [{**row, "ended": end, "reward": reward, "logged": logged} for row, end, reward in zip(rows, ended, rewards)]
    return parallel.collect(rows, args)


def rewarded(rows: list[dict]) -> list[dict]:
    """The rows whose answer was scored; at least one is."""
    found = [row for row in rows if not math.isnan(row["reward"])]
    if not found:
        fail(
            f"--reward-function: returned None for all {len(rows)} answers of a step, from which nothing can be learned"
        )
    return found


def column(rows: list[dict], name: str) -> Tensor:
    """[N] of the rows' numbers, float64, on the CPU."""
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def stack(rows: list[dict], tokenizer, args) -> tuple[dict[str, Tensor], Tensor]:
    """(batch, mask [B, T]): the mask is true where a token of an answer is predicted."""
    batch = dataset.stack(rows, FIELDS, tokenizer.pad_token_id, args.device)
    return batch, fused_po.shift_labels(batch["labels"]) != dataset.IGNORE


def logps_of(model, hidden: Tensor, batch: dict[str, Tensor], args, outputs: tuple[str, ...] = ("logps",)):
    """TokenStats [B, T] of a batch's labels, at the temperature of the draws."""
    labels = fused_po.shift_labels(batch["labels"])
    how = dict(temperature=args.temperature, outputs=outputs)
    with models.autocast(args):
        return fused_po.linear_logps(hidden, labels=labels, **how, **models.head(model))


def exact_kl(model, frozen, hidden: Tensor, batch: dict[str, Tensor], args) -> fused_po.KLStats:
    """KLStats [B, T]: the exact KL to the reference at each token of the answers, and its log-prob, with gradients."""
    labels = fused_po.shift_labels(batch["labels"])
    with models.reference(model, frozen) as scorer:
        head = models.head(scorer)
        ref = dict(ref_hidden=models.hidden_states(scorer, batch, args), ref_weight=head["weight"])
        ref |= dict(ref_bias=head["bias"])
    with models.autocast(args):
        return fused_po.linear_kl(hidden, labels=labels, **ref, **models.head(model), temperature=args.temperature)


def split(values: dict[str, Tensor], mask: Tensor, rows: list[dict]) -> list[dict]:
    """The rows, each with its answer's part [n] of values [B, T]."""
    lengths = mask.sum(1).tolist()
    parts = {name: value[mask].split(lengths) for name, value in values.items()}
    return [{**row, **{name: part[i] for name, part in parts.items()}} for i, row in enumerate(rows)]


def stacked(rows: list[dict], name: str, mask: Tensor) -> Tensor:
    """[B, T] of what the rows hold for their answers' tokens; 0 elsewhere."""
    flat = torch.cat([row[name] for row in rows])
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


@torch.no_grad()
def annotated(
    engine: parallel.Engine, rows: list[dict], tokenizer, args, values_of: Callable[[dict], dict[str, Tensor]]
) -> list[dict]:
    """The rows with values of their answers' tokens, scored as in training, but without gradients.

    values_of: a stacked batch -> values [B, T] by name.
    """
    out: list[dict] = []
    for part, weight, _ in parallel.parts(rows, args):
        batch, mask = stack(part, tokenizer, args)
        values = engine(partial(values_of, batch))
        out += split(values, mask, part) if weight else []
    return parallel.collect(out, args)


def with_old_logps(engine: parallel.Engine, rows: list[dict], tokenizer, args) -> list[dict]:
    """The rows with old_logps and entropy, the policy's own before an update."""
    model = engine.policy

    def values_of(batch):
        hidden = models.hidden_states(model, batch, args)
        stats = logps_of(model, hidden, batch, args, ("logps", "entropy"))
        return {"old_logps": stats.logps, "entropy": stats.entropy}

    return annotated(engine, rows, tokenizer, args, values_of)


def with_ref_logps(engine: parallel.Engine, rows: list[dict], tokenizer, args) -> list[dict]:
    """The rows with ref_logps, the reference's."""
    with models.reference(engine.policy, engine.frozen) as scorer:

        def values_of(batch):
            return {"ref_logps": logps_of(scorer, models.hidden_states(scorer, batch, args), batch, args).logps}

        return annotated(engine, rows, tokenizer, args, values_of)


def mean_of(rows: list[dict], name: str) -> float:
    """Of the values of all answers' tokens."""
    return torch.cat([row[name] for row in rows]).mean().item()


def logged_means(rows: list[dict]) -> dict[str, float]:
    """What a reward function logged by `log_metric`: means over the answers of the calls that logged it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.get("logged", {}).items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def sampling_metrics(rows: list[dict]) -> dict[str, float]:
    """Under TRL's names: rewards, lengths, answers without an end."""
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
    """Held out: share of correct greedy answers (NaN for unknown questions), reward and exact KL of sampled ones.

    The KL is that to the reference, summed over an answer's tokens: nats an answer.
    """
    rows = rollout(model, tokenizer, prompts, args, judge, seed=args.seed)
    nats, mine = 0.0, parallel.deal(rows, args)
    with models.evaluating(model):
        for begin in range(0, len(mine), 100):
            batch, _ = stack(mine[begin : begin + 100], tokenizer, args)
            nats += exact_kl(model, frozen, models.hidden_states(model, batch, args), batch, args).kl.sum().item()
    nats = parallel.total({"nats": nats}, args)["nats"]
    correct = models.share_correct(model, tokenizer, prompts, args, longest=args.max_completion_length)
    reward = column(rows, "reward").nanmean().item()
    return logged_means(rows) | {"correct": correct, "reward": reward, "kl": nats / len(rows)}


def train(
    args, panels: dict[str, str], stage: str, train_steps: Callable, module_of: Callable = lambda model: model
) -> dict[str, dict[str, float]]:
    """A whole run around a script's `train_steps`; returns what `measure` gave before and after.

    module_of: the policy -> what is trained, a module with the policy in it.
    """
    texts = loop.load_rows(args, "prompt")
    with loop.Run(args, panels) as run:
        model, frozen, tokenizer, prompts, held_out, judge = begin(run, args, texts)
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
