"""DPO: supervised training of a small model, then direct preference optimization with that model as the reference.

    python examples/dpo.py                    # a tiny Llama on the shipped data, minutes on a CPU
    python examples/dpo.py --model Qwen/Qwen3-0.6B --dataset data.jsonl --test-dataset test.jsonl
    torchrun --nproc-per-node=2 examples/dpo.py --parallel fsdp               # or ddp, tp

Rows have prompt, chosen and rejected: texts or lists of messages. The loss is `fused_po.linear_dpo`, computed from
hidden states. With --precompute-ref the reference scores each answer once, not once per epoch. examples/minimal_dpo.py
is the same method in one short file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import sft
import torch
from trainer import dataset, flags, models, optimization, parallel, reference_logps, sampling, scoring, setup
from trainer.errors import fail
from trainer.training_run import Run, main

import fused_po

PANELS = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "reward accuracy", "kl": "KL (k3)"}
SHARES = {"preference": "pairs with log p(chosen) > log p(rejected)", "greedy": "greedy answers that are correct"}
FIELDS = ("chosen", "rejected")


def parse(argv: list[str] | None = None):
    parser = flags.parser("dpo", __doc__, rates=(1e-6, 1e-5))
    add = parser.add_argument
    text = "scale of the log-ratios in the loss; a larger value keeps the policy closer to the reference"
    add("--beta", type=float, default=0.1, help=text)
    text = "weight of the k3 estimate of the KL; at 0 a tiny model forgets how to answer"
    add("--kl-coef", type=float, default=0.1, help=text)
    reference_logps.add_flags(parser)
    parallel.add_flags(parser)
    args = flags.parse(parser, argv, positive=("beta", "timeout"), natural=("kl_coef",))
    if args.precompute_ref and args.parallel in ("fsdp", "tp"):
        why = "because it needs the whole model on every rank"
        fail(f"--precompute-ref: not with --parallel {args.parallel}, {why}; use ddp, or leave it out")
    return args


def dpo_loss(model, batch: dict, ref_logps: torch.Tensor, args, counts: tuple[int, int]):
    """(loss, metrics) of a part of a step's pairs, divided by the counts of the whole step: see `take_step`.

    Args:
        batch: of `dataset.stack`. ref_logps: [2B, T], the reference's log-probs of the labels.
        counts: pairs and scored tokens of the whole step.
    """
    labels = fused_po.shift_labels(batch["labels"])
    of_pairs = len(labels) / 2 / counts[0]
    of_tokens = int((labels != dataset.IGNORE).sum()) / counts[1]
    hidden, router_loss = scoring.forward(model, batch, args)
    head = scoring.head(model)
    kl_coef = args.kl_coef * of_tokens / of_pairs  # the loss is multiplied by of_pairs below, but the KL is per token
    with scoring.autocast(args):
        out = fused_po.linear_dpo(
            hidden, labels=labels, ref_logps=ref_logps, beta=args.beta, kl="k3", kl_coef=kl_coef, **head
        )
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
    """On held-out rows: the share of pairs whose chosen answer is more probable per token; correct greedy answers."""
    preferred, mine = 0, parallel.deal(rows, args)
    with scoring.evaluating(model):
        for begin in range(0, len(mine), 100):
            batch = dataset.stack(mine[begin : begin + 100], FIELDS, tokenizer.pad_token_id, args.device)
            chosen, rejected = scoring.answer_logps(model, batch, args, average=True).chunk(2)
            preferred += (chosen > rejected).sum().item()
    greedy = sampling.share_correct(model, tokenizer, rows, args, longest=max(len(row["chosen_ids"]) for row in rows))
    return {"preference": parallel.total({"pairs": preferred}, args)["pairs"] / len(rows), "greedy": greedy}


def train(args, watch: Callable | None = None) -> dict[str, dict[str, float]]:
    """The whole run; returns the results of `evaluate` before and after DPO.

    watch: (model, frozen, tokenizer) -> further metrics to measure every --eval-every steps.
    """
    texts = setup.load_rows(args, "preference")
    with Run(args, PANELS) as run:
        model, tokenizer, pairs, held_out = setup.start(args, texts)
        model = sft.warm_up(run, model, tokenizer, pairs, args)
        frozen = models.freeze(model, args)
        model = models.adapt(model, args)
        if args.precompute_ref:
            pairs = reference_logps.scored(model, frozen, pairs, FIELDS, tokenizer, args)
        engine = parallel.Engine(args, model, frozen)
        learner = optimization.learner(engine, args.lr, args.steps)

        def loss_of(part: list[dict], counts: tuple[int, int]):
            batch = dataset.stack(part, FIELDS, tokenizer.pad_token_id, args.device)
            ref_logps = reference_logps.logps_of(model, frozen, part, FIELDS, batch, args)
            return dpo_loss(model, batch, ref_logps, args, counts)

        def shares_now() -> dict[str, float]:
            with engine.gathered():
                return evaluate(model, held_out, tokenizer, args)

        def measure() -> dict[str, float]:
            return shares_now() | (watch(model, frozen, tokenizer) if watch else {})

        shares = {"before": shares_now()}
        for step, metrics in run.steps("DPO", learner, args.steps, measure):
            rows = dataset.batch_at(pairs, step, args.batch_size, args.seed)
            counts = len(rows), dataset.scored_tokens(rows, FIELDS)
            metrics |= optimization.take_step(learner, rows, partial(loss_of, counts=counts), args)
        shares["after"] = shares_now()
        columns = {"reference": shares["before"], "after DPO": shares["after"]}
        run.finish(engine.whole(model), tokenizer, "Supervised training, then DPO", SHARES, columns)
    return shares


if __name__ == "__main__":
    main(train, parse())
