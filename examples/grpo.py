"""GRPO: several answers to each prompt, rewarded and held against each other; no value function.

    python examples/grpo.py                   # a tiny Llama on the shipped data, minutes on a CPU
    python examples/grpo.py --loss-type dapo --epsilon-high 0.28
    python examples/grpo.py --model Qwen/Qwen3-0.6B --dataset prompts.jsonl --test-dataset test.jsonl \\
        --reward-function rewards.py:score --max-completion-length 256 --lr 1e-6 --lora

Rows have a prompt. A step draws --batch-size answers, --num-generations of a prompt, rewards them by the checking
program, and updates the policy on them, --num-iterations times. Prompts whose answers are all right or all wrong teach
nothing, and others are drawn in their place. The log-probs come from `fused_po.linear_logps`, the
losses from `fused_po.losses.grpo` by TRL's names; `fused_po.aggregate` divides by the counts of the whole step.
"""

from __future__ import annotations

import math

import dataset
import loop
import models
import rollouts
import torch

import fused_po
from fused_po import losses

PANELS = {
    "reward": "reward of the samples",
    "kl": "KL to the reference, k3, nats a token",
    "entropy": "entropy, nats a token",
    "eval_correct": "held-out greedy answers that are correct",
}


def parse(argv: list[str] | None = None):
    how = dict(warm_up=150, steps=80, batch_size=256, rates=(1e-6, 1e-5), eval_every=10, checkpoint_every=25)
    parser = loop.parser("grpo", __doc__, **how)
    add = parser.add_argument
    add("--num-generations", type=int, default=4, help="answers to a prompt; --batch-size is a multiple of it")
    add("--num-iterations", type=int, default=1, help="updates on the answers of a step")
    drawn = (
        "rollouts of a step, until --batch-size answers have groups that are rewarded unlike (DAPO's dynamic sampling)"
    )
    add("--max-draws", type=int, default=4, help=drawn)
    add("--loss-type", default="dapo", choices=sorted(losses.GRPO_MODES), help="by TRL's names")
    add("--beta", type=float, default=0.1, help="weight of the KL in the loss; 0: there is no reference")
    add("--epsilon", type=float, help="the ratio's clip range below 1; without it the loss's own")
    add("--epsilon-high", type=float, help="the same above 1 (cispo: the cap); without it the loss's own")
    level = "what the ratio is of; without it the loss's own"
    add("--importance-sampling-level", choices=("token", "sequence"), help=level)
    add("--scale-rewards", default="group", choices=("group", "batch", "none"), help="what rewards are divided by")
    args = rollouts.parse(parser, argv, positive=("num_generations", "num_iterations", "max_draws"), natural=("beta",))
    if args.num_generations < 2 or args.batch_size % args.num_generations:
        wanted = f"2 or more and a divisor of --batch-size {args.batch_size}"
        loop.common.fail(f"--num-generations: got {args.num_generations}, expected {wanted}")
    return args


def differ(group: list[dict]) -> bool:
    """Whether a group's answers are rewarded unlike; those without a reward do not count."""
    return len({row["reward"] for row in group if not math.isnan(row["reward"])}) > 1


def drawn_groups(model, tokenizer, prompts: list[dict], args, judge, number: int) -> tuple[list[dict], list[dict]]:
    """(--batch-size answers, all that were drawn for them): groups that are rewarded unlike, then others.

    Where all answers to a prompt are rewarded alike their advantages are 0; DAPO (arXiv:2503.14476, section 3.2) draws
    on, at most --max-draws times.
    """
    size, unlike, alike = args.num_generations, [], []
    for draw in range(args.max_draws):
        at = number * args.max_draws + draw
        asked = dataset.batch_at(prompts, at, args.batch_size // size, args.seed)
        rows = rollouts.rollout(model, tokenizer, asked, args, judge, samples=size)
        for begin in range(0, len(rows), size):
            group = rows[begin : begin + size]
            (unlike if differ(group) else alike).append(group)
        if len(unlike) * size >= args.batch_size:
            break
    flat = [row for group in unlike + alike for row in group]
    return flat[: args.batch_size], flat


def with_advantages(rows: list[dict], args) -> list[dict]:
    """The rows with their advantage over the other answers to their prompt; 0 for those without a reward, as in TRL."""
    rewards = rollouts.column(rows, "reward")
    known, groups = ~rewards.isnan(), torch.arange(len(rows)) // args.num_generations
    advantages = torch.zeros_like(rewards)
    rollouts.rewarded(rows)  # there is at least one
    advantages[known] = losses.group_advantages(rewards[known], groups[known], scale=args.scale_rewards)
    return [{**row, "advantage": value} for row, value in zip(rows, advantages.tolist())]


def grpo_loss(model, tokenizer, rows: list[dict], args, tokens: int, answers: int):
    """(loss, metrics) of rows that are part of an update over so many tokens and answers: shares of its means."""
    batch, mask = rollouts.stack(rows, tokenizer, args)
    states = models.forward(model, batch, args)
    logps = rollouts.logps_of(model, states.hidden, batch, args).logps
    old = rollouts.stacked(rows, "old_logps", mask)
    ref = rollouts.stacked(rows, "ref_logps", mask) if args.beta else None
    advantages = rollouts.column(rows, "advantage").to(logps)
    how = dict(loss_type=args.loss_type, epsilon=args.epsilon, epsilon_high=args.epsilon_high)
    how["importance_sampling_level"] = args.importance_sampling_level
    token_loss = losses.grpo(logps, old, advantages, mask, ref, beta=args.beta, **how)
    mode = losses.GRPO_MODES[args.loss_type]
    length = args.max_completion_length if mode == "seq-mean-token-sum-norm" else None
    counts = dict(num_tokens=tokens, num_sequences=answers, max_length=length)
    loss = fused_po.aggregate(token_loss, mask, mode, **counts)
    metrics = losses.policy_metrics(logps, old, advantages, mask, ref, **how)
    share = mask.sum() / tokens  # of several parts the metrics are means, by tokens
    return loss + states.router_loss * share, {
        name: value * share for name, value in metrics.items() if name.endswith(("mean", "kl"))
    }


def train_steps(run: loop.Run, engine, tokenizer, prompts: list[dict], args, judge, evaluate) -> None:
    """--steps steps: answers, rewards, advantages, updates."""
    model, learner = engine.policy, loop.learner(engine, args.lr, args.steps * args.num_iterations)

    def one_step(number: int) -> dict[str, float]:
        rows, drawn = drawn_groups(model, tokenizer, prompts, args, judge, number)
        rows = rollouts.with_old_logps(engine, with_advantages(rows, args), tokenizer, args)
        if args.beta:
            rows = rollouts.with_ref_logps(engine, rows, tokenizer, args)
        tokens = dataset.scored_tokens(rows, rollouts.FIELDS)
        groups = [drawn[i : i + args.num_generations] for i in range(0, len(drawn), args.num_generations)]
        metrics = rollouts.sampling_metrics(drawn) | {"entropy": rollouts.mean_of(rows, "entropy")}
        metrics["frac_reward_zero_std"] = sum(not differ(group) for group in groups) / len(groups)
        for _ in range(args.num_iterations):
            loss_of = lambda part: grpo_loss(model, tokenizer, part, args, tokens, len(rows))  # noqa: E731
            metrics |= loop.update(learner, rows, loss_of, args)
        return metrics

    run.train("GRPO", learner, args.steps, one_step, evaluate)


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns what `rollouts.measure` gave before and after."""
    return rollouts.train(args, PANELS, "GRPO", train_steps)


if __name__ == "__main__":
    loop.main(train, parse())
