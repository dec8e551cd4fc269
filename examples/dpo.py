"""Direct preference optimisation, start to end: supervised training of a small model, then DPO against it.

    python examples/dpo.py                    # a tiny Llama on the shipped data, minutes on a CPU
    python examples/dpo.py --model Qwen/Qwen3-0.6B --dataset data.jsonl --test-dataset test.jsonl
    torchrun --nproc-per-node=2 examples/dpo.py --parallel fsdp               # or ddp, tp: see parallel.py

Rows have prompt, chosen, rejected: strings, or lists of messages. The loss is `fused_po.linear_dpo` on the hidden
states: no logits exist. With --precompute-ref the reference scores each answer once, not once an epoch.
"""

from __future__ import annotations

from collections.abc import Callable

import dataset
import loop
import models
import parallel
import references
import sft
import torch

import fused_po

PANELS = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "reward accuracy", "kl": "KL (k3)"}
SHARES = {"preference": "pairs with log p(chosen) > log p(rejected)", "greedy": "greedy answers that are correct"}
FIELDS = ("chosen", "rejected")


def parse(argv: list[str] | None = None):
    parser = loop.parser("dpo", __doc__, rates=(1e-6, 1e-5))
    add = parser.add_argument
    add("--beta", type=float, default=0.1, help="how much a reward of 1 weighs against the KL")
    coef = "weight of the k3 estimate of the KL; without it a tiny model unlearns to speak"
    add("--kl-coef", type=float, default=0.1, help=coef)
    references.add_flags(parser)
    parallel.add_flags(parser)
    args = loop.parse(parser, argv, positive=("beta", "timeout"), natural=("kl_coef",))
    if args.precompute_ref and args.parallel in ("fsdp", "tp"):
        why = "which scores with the whole model on every rank"
        loop.common.fail(f"--precompute-ref: not with --parallel {args.parallel}, {why}; take ddp, or leave it out")
    return args


def dpo_loss(model, batch: dict, ref_logps: torch.Tensor, args, counts: tuple[int, int]):
    """(loss, metrics) of a stacked batch of pairs that is part of a step over `counts` pairs and tokens: shares of it.

    ref_logps: [2B, T], the reference's log-probs of the labels.
    """
    labels = fused_po.shift_labels(batch["labels"])
    of_pairs = len(labels) / 2 / counts[0]
    of_tokens = int((labels != dataset.IGNORE).sum()) / counts[1]
    hidden, router_loss = models.forward(model, batch, args)
    with models.autocast(args):  # a share of the KL's mean over tokens, beside a share of the losses' over pairs
        out = fused_po.linear_dpo(
            hidden, labels=labels, ref_logps=ref_logps, **models.head(model),
            beta=args.beta, kl="k3", kl_coef=args.kl_coef * of_tokens / of_pairs,
        )  # fmt: skip
    means = {
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/margins": out.margins,
        "rewards/accuracies": out.accuracy,
        "logps/chosen": out.chosen_logps,
        "logps/rejected": out.rejected_logps,
    }
    metrics = {name: value.mean() * of_pairs for name, value in means.items()}
    return (out.loss + router_loss) * of_pairs, metrics | {"kl": out.kl * of_tokens}


@torch.no_grad()
def evaluate(model, rows: list[dict], tokenizer, args) -> dict[str, float]:
    """Share of held-out pairs with the chosen answer more probable per token, and of correct greedy answers."""
    preferred, mine = 0, parallel.deal(rows, args)
    with models.evaluating(model):
        for begin in range(0, len(mine), 100):
            batch = dataset.stack(mine[begin : begin + 100], FIELDS, tokenizer.pad_token_id, args.device)
            chosen, rejected = models.answer_logps(model, batch, args, average=True).chunk(2)
            preferred += (chosen > rejected).sum().item()
    greedy = models.share_correct(model, tokenizer, rows, args, longest=max(len(row["chosen_ids"]) for row in rows))
    return {"preference": parallel.total({"pairs": preferred}, args)["pairs"] / len(rows), "greedy": greedy}


def train(args, watch: Callable | None = None) -> dict[str, dict[str, float]]:
    """The whole run; returns what `evaluate` gave before and after DPO.

    watch: (model, frozen, tokenizer) -> what else is measured every --eval-every steps.
    """
    texts = loop.load_rows(args, "preference")
    with loop.Run(args, PANELS) as run:
        model, tokenizer, pairs, held_out = loop.start(args, texts)
        model = sft.warm_up(run, model, tokenizer, pairs, args)
        frozen = models.freeze(model, args)
        model = models.adapt(model, args)
        if args.precompute_ref:
            pairs = references.scored(model, frozen, pairs, FIELDS, tokenizer, args)
        engine = parallel.Engine(args, model, frozen)
        learner = loop.learner(engine, args.lr, args.steps)

        def loss_of(part: list[dict], counts: tuple[int, int]):
            batch = dataset.stack(part, FIELDS, tokenizer.pad_token_id, args.device)
            ref_logps = references.logps_of(model, frozen, part, FIELDS, batch, args)
            return dpo_loss(model, batch, ref_logps, args, counts)

        def one_step(number: int) -> dict[str, float]:
            rows = dataset.batch_at(pairs, number, args.batch_size, args.seed)
            counts = len(rows), dataset.scored_tokens(rows, FIELDS)
            return loop.update(learner, rows, lambda part: loss_of(part, counts), args)

        def shares_now() -> dict[str, float]:
            with engine.gathered():
                return evaluate(model, held_out, tokenizer, args)

        def measure() -> dict[str, float]:
            return shares_now() | (watch(model, frozen, tokenizer) if watch else {})

        shares = {"before": shares_now()}
        run.train("DPO", learner, args.steps, one_step, measure)
        shares["after"] = shares_now()
        columns = {"reference": shares["before"], "after DPO": shares["after"]}
        run.finish(engine.whole(model), tokenizer, "Supervised training, then DPO", SHARES, columns)
    return shares


if __name__ == "__main__":
    loop.main(train, parse())
