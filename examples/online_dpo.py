"""Online DPO: two answers of the policy to each prompt, judged, become a pair; DPO on such pairs.

    python examples/online_dpo.py             # a tiny Llama on the shipped data, minutes on a CPU
    python examples/online_dpo.py --model runs/reward/sft --reward-model runs/reward/model --lr 1e-3

Rows have a prompt. The judge is the checking program, a function or a reward model: of the two answers that with the
higher reward is chosen, and where both are rewarded alike there is no pair. The loss is that of dpo.py,
`fused_po.linear_dpo`, on pairs that the policy itself has just drawn (Guo et al. 2024, arXiv:2402.04792).
"""

from __future__ import annotations

import dataset
import dpo
import loop
import references
import rollouts

PANELS = {
    "reward": "reward of the samples",
    "rewards/margins": "reward margin",
    "kl": "KL (k3), nats a token",
    "eval_correct": "held-out greedy answers that are correct",
}


def parse(argv: list[str] | None = None):
    how = dict(warm_up=150, steps=120, batch_size=128, rates=(5e-7, 5e-6), eval_every=10, checkpoint_every=30)
    parser = loop.parser("online_dpo", __doc__, **how)
    add = parser.add_argument
    add("--beta", type=float, default=0.1, help="how much a reward of 1 weighs against the KL")
    coef = "weight of the k3 estimate of the KL; without it a tiny model unlearns to speak"
    add("--kl-coef", type=float, default=0.1, help=coef)
    return rollouts.parse(parser, argv, positive=("beta",), natural=("kl_coef",))


def pairs_of(rows: list[dict]) -> list[dict]:
    """Pairs (prompt_ids, chosen_ids, rejected_ids) of rows that come in twos; equal rewards, or none, make no pair."""
    pairs = []
    for one, other in zip(rows[::2], rows[1::2]):
        if abs(one["reward"] - other["reward"]) > 0:  # not if one is NaN
            better, worse = sorted((one, other), key=lambda row: -row["reward"])
            answers = {"chosen_ids": better["answer_ids"], "rejected_ids": worse["answer_ids"]}
            pairs.append({"prompt_ids": one["prompt_ids"], **answers})
    return pairs


def train_steps(run: loop.Run, engine, tokenizer, prompts: list[dict], args, judge, evaluate) -> None:
    """--steps steps: two answers to each of --batch-size prompts, and DPO on the pairs."""
    model, learner = engine.policy, loop.learner(engine, args.lr, args.steps)

    def one_step(number: int) -> dict[str, float]:
        asked = dataset.batch_at(prompts, number, args.batch_size, args.seed)
        rows = rollouts.rollout(model, tokenizer, asked, args, judge, samples=2)
        pairs = pairs_of(rows)
        metrics = rollouts.sampling_metrics(rows) | {"pairs": len(pairs)}
        if not pairs:
            return metrics  # nothing to prefer, nothing to learn
        counts = len(pairs), dataset.scored_tokens(pairs, dpo.FIELDS)

        def loss_of(part: list[dict]):
            batch = dataset.stack(part, dpo.FIELDS, tokenizer.pad_token_id, args.device)
            ref = references.logps_of(model, engine.frozen, part, dpo.FIELDS, batch, args)
            return dpo.dpo_loss(model, batch, ref, args, counts)

        return metrics | loop.update(learner, pairs, loss_of, args)

    run.train("online DPO", learner, args.steps, one_step, evaluate)


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns what `rollouts.measure` gave before and after."""
    return rollouts.train(args, PANELS, "online DPO", train_steps)


if __name__ == "__main__":
    loop.main(train, parse())
