"""Online DPO: the policy answers each prompt twice, the rewards decide which answer is chosen, DPO trains on the pairs.

    python examples/online_dpo.py             # a tiny Llama on the shipped data, minutes on a CPU
    python examples/online_dpo.py --model runs/reward/sft --reward-model runs/reward/model --lr 1e-3

Rows have a prompt. Rewards come from the checking program, a function or a reward model. Of two answers the one with
the higher reward is chosen; two equal rewards make no pair. The loss is that of dpo.py, `fused_po.linear_dpo` (Guo et
al. 2024, arXiv:2402.04792).
"""

from __future__ import annotations

from functools import partial

import dpo
import sft
from trainer import dataset, flags, optimization, reference_logps, rollouts
from trainer.training_run import Run, main

PANELS = {
    "reward": "reward of sampled answers",
    "rewards/margins": "reward margin",
    "kl": "KL (k3), nats per token",
    "eval_correct": "held-out greedy answers that are correct",
}


def parse(argv: list[str] | None = None):
    defaults = dict(warm_up=150, steps=120, batch_size=128, rates=(5e-7, 5e-6), eval_every=10, checkpoint_every=30)
    parser = flags.parser("online_dpo", __doc__, **defaults)
    add = parser.add_argument
    text = "scale of the log-ratios in the loss; a larger value keeps the policy closer to the reference"
    add("--beta", type=float, default=0.1, help=text)
    text = "weight of the k3 estimate of the KL; at 0 a tiny model forgets how to answer"
    add("--kl-coef", type=float, default=0.1, help=text)
    return rollouts.parse(parser, argv, positive=("beta",), natural=("kl_coef",))


def pairs_of(rows: list[dict]) -> list[dict]:
    """Pairs (prompt_ids, chosen_ids, rejected_ids) of consecutive rows; equal or missing rewards make no pair."""
    pairs = []
    for one, other in zip(rows[::2], rows[1::2]):
        if abs(one["reward"] - other["reward"]) > 0:  # False if one is NaN
            better, worse = sorted((one, other), key=lambda row: -row["reward"])
            answers = {"chosen_ids": better["answer_ids"], "rejected_ids": worse["answer_ids"]}
            pairs.append({"prompt_ids": one["prompt_ids"], **answers})
    return pairs


def train_steps(run: Run, engine, tokenizer, prompts: list[dict], args, judge, evaluate) -> None:
    """--steps steps: two answers to each of --batch-size prompts, then a DPO step on the pairs."""
    model, learner = engine.policy, optimization.learner(engine, args.lr, args.steps)

    def loss_of(part: list[dict], counts: tuple[int, int]):
        batch = dataset.stack(part, dpo.FIELDS, tokenizer.pad_token_id, args.device)
        ref = reference_logps.logps_of(model, engine.frozen, part, dpo.FIELDS, batch, args)
        return dpo.dpo_loss(model, batch, ref, args, counts)

    for step, metrics in run.steps("online DPO", learner, args.steps, evaluate):
        asked = dataset.batch_at(prompts, step, args.batch_size, args.seed)
        rows = rollouts.rollout(model, tokenizer, asked, args, judge, samples=2)
        pairs = pairs_of(rows)
        metrics |= rollouts.sampling_metrics(rows) | {"pairs": len(pairs)}
        if pairs:
            counts = len(pairs), dataset.scored_tokens(pairs, dpo.FIELDS)
            metrics |= optimization.take_step(learner, pairs, partial(loss_of, counts=counts), args)


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns the results of `rollouts.measure` before and after."""
    return rollouts.train(args, PANELS, "online DPO", train_steps, sft.warm_up)


if __name__ == "__main__":
    main(train, parse())
