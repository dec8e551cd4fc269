"""Supervised fine-tuning: cross-entropy on the answers. The other scripts begin with some of these steps.

    python examples/sft.py                    # a tiny Llama on the shipped data, a minute on a CPU
    python examples/sft.py --model Qwen/Qwen3-0.6B --dataset chats.jsonl --test-dataset test.jsonl --steps 500

Rows have prompt and completion, or messages, or text (then every token is a label); of a preference row the chosen
answer is used. The loss is the negative of `fused_po.linear_logps`. Sequences are packed without padding if the model
keeps packed sequences apart (--no-padding-free pads them).
"""

from __future__ import annotations

from functools import partial

import torch
from trainer import dataset, flags, models, optimization, parallel, sampling, scoring, setup
from trainer.training_run import Run, main

import fused_po

PANELS = {
    "loss": "loss",
    "mean_token_accuracy": "tokens predicted by greedy decoding",
    "eval_entropy": "held-out entropy, nats per token",
    "eval_correct": "held-out greedy answers that are correct",
}
SHARES = {
    "loss": "loss",
    "mean_token_accuracy": "tokens predicted by greedy decoding",
    "entropy": "entropy, nats per token",
    "correct": "greedy answers that are correct",
}
FIELDS = ("completion",)


def parse(argv: list[str] | None = None):
    defaults = dict(steps=100, sft_steps=0, padding_free=None, keep_dropout=True, eval_every=20)
    return flags.parse(flags.parser("sft", __doc__, rates=flags.SFT_RATES, **defaults), argv)


def sft_loss(model, tokenizer, rows: list[dict], tokens: int, args, entropy: bool = False):
    """(loss, metrics) of a part of a step's rows, divided by the scored tokens of the whole step: see `take_step`."""
    batch = dataset.stack(rows, FIELDS, tokenizer.pad_token_id, args.device)
    states = scoring.forward(model, batch, args)
    outputs = ("logps", "is_top1", "entropy") if entropy else ("logps", "is_top1")
    stats = scoring.token_stats(model, batch, args, outputs, states)
    mask = fused_po.shift_labels(batch["labels"]) != dataset.IGNORE
    metrics = {"mean_token_accuracy": (stats.is_top1.bool() & mask).sum() / tokens}
    if entropy:
        metrics["entropy"] = torch.where(mask, stats.entropy, 0).sum() / tokens
    return -stats.logps.sum() / tokens + states.router_loss * (mask.sum() / tokens), metrics


def train_steps(run: Run, engine, tokenizer, rows: list[dict], args, lr: float, steps: int, evaluate=None) -> None:
    """The supervised stage of a run."""
    learner, model = optimization.learner(engine, lr, steps), engine.module
    for step, metrics in run.steps("SFT", learner, steps, evaluate):
        drawn = dataset.batch_at(rows, step, args.batch_size, args.seed)
        tokens = dataset.scored_tokens(drawn, FIELDS)
        loss_of = partial(sft_loss, model, tokenizer, tokens=tokens, args=args)
        metrics |= optimization.take_step(learner, drawn, loss_of, args)


def warm_up(run: Run, model, tokenizer, rows: list[dict], args, field: str = "chosen"):
    """Train the model for --sft-steps supervised steps on one answer of each row, before another method starts.

    The result is saved as <run>/sft. A resumed run loads it from there, and so does a run on several ranks, which has
    sharded the model.
    """
    done = run.folder / "sft"
    if args.sft_steps and done.is_dir():
        model.load_state_dict(models.load("AutoModelForCausalLM", done, args, "--output").state_dict())
        run.skip(args.sft_steps)
    elif args.sft_steps:
        rows = [{**row, "completion_ids": row[f"{field}_ids"]} for row in rows]
        engine = parallel.Engine(args, model)
        train_steps(run, engine, tokenizer, rows, args, args.sft_lr, args.sft_steps)
        whole = engine.whole(model)
        if parallel.first():
            models.save(done, whole, tokenizer)
        parallel.wait()
        if args.parallel:
            return models.prepared(models.load("AutoModelForCausalLM", done, args), args)
    return model


@torch.no_grad()
def evaluate(model, tokenizer, rows: list[dict], args) -> dict[str, float]:
    """Loss, accuracy and entropy: means over the held-out tokens."""
    tokens, total = dataset.scored_tokens(rows, FIELDS), {}
    with scoring.evaluating(model):
        for begin in range(0, len(rows), 100):
            loss, metrics = sft_loss(model, tokenizer, rows[begin : begin + 100], tokens, args, entropy=True)
            for name, value in ({"loss": loss} | metrics).items():
                total[name] = total.get(name, 0) + value.item()
    return total


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns what was measured before and after."""
    texts = setup.load_rows(args, "completion")
    with Run(args, PANELS) as run:
        model, tokenizer, rows, held_out = setup.start(args, texts)

        def measure() -> dict[str, float]:
            measured = evaluate(model, tokenizer, held_out, args)
            return measured | {"correct": sampling.share_correct(model, tokenizer, held_out, args)}

        shares = {"before": measure()}
        model = models.adapt(model, args)
        train_steps(run, parallel.Engine(args, model), tokenizer, rows, args, args.lr, args.steps, measure)
        shares["after"] = measure()
        run.finish(model, tokenizer, "Supervised fine-tuning", SHARES, shares)
    return shares


if __name__ == "__main__":
    main(train, parse())
