"""KTO: learns from single answers that are labelled good or bad; pairs are not needed.

    python examples/kto.py                    # a tiny Llama on the shipped data, minutes on a CPU
    python examples/kto.py --model Qwen/Qwen3-0.6B --dataset thumbs.jsonl --test-dataset test.jsonl

Rows have prompt, completion and label (true or false); both answers of a preference row are used, separately. The
reference point z0 estimates the KL between policy and reference. It is measured in each step on mismatched rows: the
step's prompts, each with an answer to another prompt.
"""

from __future__ import annotations

import sft
import torch
from trainer import dataset, flags, models, optimization, parallel, reference_logps, sampling, scoring, setup
from trainer.errors import fail
from trainer.tokenization import check_fits
from trainer.training_run import Run, main

from fused_po import losses

PANELS = {
    "loss": "loss",
    "rewards/margins": "reward of good answers minus that of bad ones",
    "kl": "KL (k3)",
    "eval_correct": "held-out greedy answers that are correct",
}
SHARES = {
    "auc": "P(a good answer gained more than a bad one)",
    "correct": "greedy answers that are correct",
}
OWN, OTHER = ("completion",), ("other",)


def parse(argv: list[str] | None = None):
    parser = flags.parser("kto", __doc__, rates=(1e-6, 1e-5), batch_size=64, steps=600, eval_every=100)
    add = parser.add_argument
    text = "scale of the log-ratios in the loss; a larger value keeps the policy closer to the reference"
    add("--beta", type=float, default=0.1, help=text)
    add("--desirable-weight", type=float, default=1.0, help="weight of good answers in the loss")
    add("--undesirable-weight", type=float, default=1.0, help="weight of bad answers in the loss")
    text = "weight of the k3 estimate of the KL; at 0 a tiny model forgets how to answer"
    add("--kl-coef", type=float, default=0.1, help=text)
    reference_logps.add_flags(parser)
    return flags.parse(parser, argv, ("beta", "desirable_weight", "undesirable_weight"), natural=("kl_coef",))


def mismatched(rows: list[dict], args) -> list[dict]:
    """Add to each row the answer to another prompt (other_ids), the same in every epoch."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    after = dict(zip(order, order[1:] + order[:1]))
    room = [args.max_length - len(row["prompt_ids"]) for row in rows]
    return [{**row, "other_ids": rows[after[i]]["completion_ids"][: room[i]]} for i, row in enumerate(rows)]


def logps_of(model, frozen, rows: list[dict], fields: tuple[str, ...], tokenizer, args):
    """(policy's log-probs [B, T], reference's [B, T], router loss) of the answers' tokens; 0 elsewhere."""
    batch = dataset.stack(rows, fields, tokenizer.pad_token_id, args.device)
    ref = reference_logps.logps_of(model, frozen, rows, fields, batch, args)
    states = scoring.forward(model, batch, args)
    return scoring.token_stats(model, batch, args, states=states).logps, ref, states.router_loss


@torch.no_grad()
def answer_logps(model, frozen, rows: list[dict], fields: tuple[str, ...], tokenizer, args):
    """(policy's log-probs [B], reference's [B]) of whole answers, for any number of rows, without gradients."""
    size = args.micro_batch_size or args.batch_size
    parts = (rows[begin : begin + size] for begin in range(0, len(rows), size))
    with scoring.evaluating(model):
        both = [logps_of(model, frozen, part, fields, tokenizer, args)[:2] for part in parts]
    return tuple(torch.cat([part.sum(1) for part in side]) for side in zip(*both))


def kto_loss(logps, ref, good, z0, args, counts: tuple[int, int, int]):
    """(loss, metrics) of a part of a step's answers, divided by the counts of the whole step: see `take_step`.

    Args:
        logps, ref: [B, T], 0 where nothing is scored. good: [B] bool. z0: 0-dim, of the whole step.
        counts: good answers, bad answers and scored tokens of the whole step.
    """
    kl = losses.kl_loss(logps, ref, "k3").sum() / counts[2]  # 0 where logps and ref are 0
    logps, ref = logps.sum(1), ref.sum(1)
    weights = dict(desirable_weight=args.desirable_weight, undesirable_weight=args.undesirable_weight)
    loss = losses.kto(logps, ref, good, z0, beta=args.beta, **weights).sum() / sum(counts[:2])
    loss, metrics = loss + args.kl_coef * kl, {"kl": kl}
    for name, which, count in (("chosen", good, counts[0]), ("rejected", ~good, counts[1])):
        metrics[f"rewards/{name}"] = args.beta * torch.where(which, logps - ref, 0).sum() / max(1, count)
        metrics[f"logps/{name}"] = torch.where(which, logps, 0).sum() / max(1, count)
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return loss, metrics | ({"rewards/margins": margin} if all(counts[:2]) else {})


def evaluate(model, frozen, rows: list[dict], tokenizer, args) -> dict[str, float]:
    """auc: probability that a good held-out answer gained more log-prob than a bad one; and correct greedy answers."""
    logps, ref = answer_logps(model, frozen, rows, OWN, tokenizer, args)
    good = torch.tensor([row["label"] for row in rows], device=logps.device)
    apart = (logps - ref)[good][:, None] - (logps - ref)[~good]
    prompts = list({str(row["prompt"]): row for row in rows}.values())
    correct = sampling.share_correct(model, tokenizer, prompts, args)
    return {"auc": ((apart > 0).float() + 0.5 * (apart == 0)).mean().item(), "correct": correct}


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns the results of `evaluate` before and after KTO."""
    texts = setup.load_rows(args, "unpaired")
    with Run(args, PANELS) as run:
        model, tokenizer, rows, held_out = setup.start(args, texts)
        liked = [row for row in rows if row["label"]]
        if args.sft_steps and not liked:
            fail(f"{args.dataset}: no answer is labelled true; supervised steps need some, or --sft-steps 0")
        model = sft.warm_up(run, model, tokenizer, liked, args, field="completion")
        frozen = models.freeze(model, args)
        model = models.adapt(model, args)
        rows = mismatched(rows, args)
        check_fits(model, tokenizer, rows, args)
        if args.precompute_ref:
            rows = reference_logps.scored(model, frozen, rows, OWN + OTHER, tokenizer, args)
        learner = optimization.learner(parallel.Engine(args, model), args.lr, args.steps)

        def measure() -> dict[str, float]:
            return evaluate(model, frozen, held_out, tokenizer, args)

        def step_on(drawn: list[dict]) -> dict[str, float]:
            z0 = losses.kto_kl(*answer_logps(model, frozen, drawn, OTHER, tokenizer, args))
            labels = [row["label"] for row in drawn]
            counts = sum(labels), len(labels) - sum(labels), dataset.scored_tokens(drawn, OWN)

            def loss_of(part: list[dict]):
                good = torch.tensor([row["label"] for row in part], device=args.device)
                logps, ref, router_loss = logps_of(model, frozen, part, OWN, tokenizer, args)
                loss, metrics = kto_loss(logps, ref, good, z0, args, counts)
                return loss + router_loss * (len(part) / len(drawn)), metrics

            return optimization.take_step(learner, drawn, loss_of, args) | {"z0": z0.item()}

        shares = {"before": measure()}
        for step, metrics in run.steps("KTO", learner, args.steps, measure):
            metrics |= step_on(dataset.batch_at(rows, step, args.batch_size, args.seed))
        shares["after"] = measure()
        columns = {"reference": shares["before"], "after KTO": shares["after"]}
        run.finish(model, tokenizer, "Supervised training, then KTO", SHARES, columns)
    return shares


if __name__ == "__main__":
    main(train, parse())
