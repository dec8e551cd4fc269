"""GRPO: several answers to each prompt, whose rewards are compared with each other; there is no value function.

    python examples/grpo.py                   # a tiny Llama on the shipped data, minutes on a CPU
    python examples/grpo.py --loss-type dapo --epsilon-high 0.28
    python examples/grpo.py --model Qwen/Qwen3-0.6B --dataset prompts.jsonl --test-dataset test.jsonl \\
        --reward-function rewards.py:score --max-completion-length 256 --lr 1e-6 --lora

Rows have a prompt. A step draws --batch-size answers, --num-generations for each prompt, rewards them, and updates the
policy --num-iterations times. Prompts whose answers all have the same reward give no gradient; other prompts are drawn
instead. Log-probs come from `fused_po.linear_logps`, the losses from `fused_po.losses.grpo` under TRL's names;
`fused_po.aggregate` divides by the counts of the whole step.
"""

from __future__ import annotations

import math
from functools import partial

import sft
import torch
from trainer import dataset, flags, optimization, rollouts, scoring
from trainer.errors import fail
from trainer.training_run import Run, main

import fused_po
from fused_po import losses

PANELS = {
    "reward": "reward of sampled answers",
    "kl": "KL to the reference (k3), nats per token",
    "entropy": "entropy, nats per token",
    "eval_correct": "held-out greedy answers that are correct",
}


def parse(argv: list[str] | None = None):
    defaults = dict(warm_up=150, steps=80, batch_size=256, rates=(1e-6, 1e-5), eval_every=10, checkpoint_every=25)
    parser = flags.parser("grpo", __doc__, **defaults)
    add = parser.add_argument
    add("--num-generations", type=int, default=4, help="answers per prompt; must divide --batch-size")
    add("--num-iterations", type=int, default=1, help="updates on the answers of a step")
    text = "limit of rollouts per step; a step draws until --batch-size answers are in groups with different rewards"
    add("--max-draws", type=int, default=4, help=text)
    add("--loss-type", default="dapo", choices=sorted(losses.GRPO_MODES), help="TRL's name of the loss")
    add("--beta", type=float, default=0.1, help="weight of the KL in the loss; 0: no reference is used")
    add("--epsilon", type=float, help="the ratio is clipped at 1 minus this. Default: that of the loss")
    text = "the ratio is clipped at 1 plus this (cispo: at this value). Default: that of the loss"
    add("--epsilon-high", type=float, help=text)
    text = "whether ratios are per token or per answer. Default: that of the loss"
    add("--importance-sampling-level", choices=("token", "sequence"), help=text)
    text = "divide advantages by the standard deviation of rewards in the group or the batch, or not"
    add("--scale-rewards", default="group", choices=("group", "batch", "none"), help=text)
    args = rollouts.parse(parser, argv, positive=("num_generations", "num_iterations", "max_draws"), natural=("beta",))
    if args.num_generations < 2 or args.batch_size % args.num_generations:
        wanted = f"2 or more and a divisor of --batch-size {args.batch_size}"
        fail(f"--num-generations: got {args.num_generations}, expected {wanted}")
    return args


def differ(group: list[dict]) -> bool:
    """Whether a group has at least two different rewards; answers without a reward are ignored."""
    return len({row["reward"] for row in group if not math.isnan(row["reward"])}) > 1


def drawn_groups(model, tokenizer, prompts: list[dict], args, judge, step: int) -> tuple[list[dict], list[dict]]:
    """Draw groups of answers until --batch-size answers are in groups with different rewards, or --max-draws times.

    A group with equal rewards has advantages of 0. Dynamic sampling: DAPO, arXiv:2503.14476, section 3.2.

    Returns:
        (--batch-size answers, those of groups with different rewards first; all answers that were drawn).
    """
    size, varied, equal = args.num_generations, [], []
    for draw in range(args.max_draws):
        at = step * args.max_draws + draw
        asked = dataset.batch_at(prompts, at, args.batch_size // size, args.seed)
        rows = rollouts.rollout(model, tokenizer, asked, args, judge, samples=size)
        for begin in range(0, len(rows), size):
            group = rows[begin : begin + size]
            (varied if differ(group) else equal).append(group)
        if len(varied) * size >= args.batch_size:
            break
    flat = [row for group in varied + equal for row in group]
    return flat[: args.batch_size], flat


def with_advantages(rows: list[dict], args) -> list[dict]:
    """Add each answer's advantage over the others of its group; 0 for an answer without a reward, as in TRL."""
    rewards = rollouts.column(rows, "reward")
    known, groups = ~rewards.isnan(), torch.arange(len(rows)) // args.num_generations
    advantages = torch.zeros_like(rewards)
    rollouts.rewarded(rows)  # ends the program if no answer has a reward
    advantages[known] = losses.group_advantages(rewards[known], groups[known], scale=args.scale_rewards)
    return [{**row, "advantage": value} for row, value in zip(rows, advantages.tolist())]


def grpo_loss(model, tokenizer, rows: list[dict], args, tokens: int, answers: int):
    """(loss, metrics) of a part of an update's answers, divided by the tokens and answers of all: see `take_step`."""
    batch, mask = rollouts.stack(rows, tokenizer, args)
    states = scoring.forward(model, batch, args)
    logps = rollouts.logps_of(model, states.hidden, batch, args).logps
    old = rollouts.stacked(rows, "old_logps", mask)
    ref = rollouts.stacked(rows, "ref_logps", mask) if args.beta else None
    advantages = rollouts.column(rows, "advantage").to(logps)
    options = dict(loss_type=args.loss_type, epsilon=args.epsilon, epsilon_high=args.epsilon_high)
    options["importance_sampling_level"] = args.importance_sampling_level
    token_loss = losses.grpo(logps, old, advantages, mask, ref, beta=args.beta, **options)
    mode = losses.GRPO_MODES[args.loss_type]
    length = args.max_completion_length if mode == "seq-mean-token-sum-norm" else None
    counts = dict(num_tokens=tokens, num_sequences=answers, max_length=length)
    loss = fused_po.aggregate(token_loss, mask, mode, **counts)
    metrics = losses.policy_metrics(logps, old, advantages, mask, ref, **options)
    share = mask.sum() / tokens  # metrics are means over tokens; weighted by their share, parts add up
    return loss + states.router_loss * share, {
        name: value * share for name, value in metrics.items() if name.endswith(("mean", "kl"))
    }


def train_steps(run: Run, engine, tokenizer, prompts: list[dict], args, judge, evaluate) -> None:
    """--steps steps of sampling, rewards, advantages and updates."""
    model, learner = engine.policy, optimization.learner(engine, args.lr, args.steps * args.num_iterations)
    for step, metrics in run.steps("GRPO", learner, args.steps, evaluate):
        rows, drawn = drawn_groups(model, tokenizer, prompts, args, judge, step)
        rows = rollouts.with_old_logps(engine, with_advantages(rows, args), tokenizer, args)
        if args.beta:
            rows = rollouts.with_ref_logps(engine, rows, tokenizer, args)
        metrics |= rollouts.sampling_metrics(drawn) | {"entropy": rollouts.mean_of(rows, "entropy")}
        groups = [drawn[i : i + args.num_generations] for i in range(0, len(drawn), args.num_generations)]
        metrics["frac_reward_zero_std"] = sum(not differ(group) for group in groups) / len(groups)
        counts = dict(tokens=dataset.scored_tokens(rows, rollouts.FIELDS), answers=len(rows))
        for _ in range(args.num_iterations):
            loss_of = partial(grpo_loss, model, tokenizer, args=args, **counts)
            metrics |= optimization.take_step(learner, rows, loss_of, args)


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns the results of `rollouts.measure` before and after."""
    return rollouts.train(args, PANELS, "GRPO", train_steps, sft.warm_up)


if __name__ == "__main__":
    main(train, parse())
