"""Supervised fine-tuning: the answers' tokens become probable. What the other scripts start from.

    python examples/sft.py                    # a tiny Llama on the shipped data, a minute on a CPU
    python examples/sft.py --model Qwen/Qwen3-0.6B --dataset chats.jsonl --test-dataset test.jsonl --steps 500

Rows have prompt and completion; or messages, or text (then every token is scored); of preference rows the chosen answer
is taken. The loss is the cross-entropy, which is `fused_po.linear_logps` with its sign turned: no logits exist.
Sequences lie packed, end to end, if the model keeps them apart (--no-padding-free pads them).
"""

from __future__ import annotations

import dataset
import loop
import models
import parallel
import torch

import fused_po

PANELS = {
    "loss": "loss",
    "mean_token_accuracy": "tokens that are the most probable one",
    "eval_entropy": "held-out entropy, nats a token",
    "eval_correct": "held-out greedy answers that are correct",
}
SHARES = {
    "loss": "loss",
    "mean_token_accuracy": "tokens that are the most probable one",
    "entropy": "entropy, nats a token",
    "correct": "greedy answers that are correct",
}
FIELDS = ("completion",)


def parse(argv: list[str] | None = None):
    how = dict(steps=100, sft_steps=0, padding_free=None, keep_dropout=True, eval_every=20)  # None: if it can
    return loop.parse(loop.parser("sft", __doc__, rates=loop.SFT_RATES, **how), argv)


def sft_loss(model, tokenizer, rows: list[dict], tokens: int, args, entropy: bool = False):
    """(loss, metrics) of rows that are part of a step over `tokens` scored tokens: shares of the step's means."""
    batch = dataset.stack(rows, FIELDS, tokenizer.pad_token_id, args.device)
    states = models.forward(model, batch, args)
    stats = models.token_stats(model, batch, args, ("logps", "is_top1", *(["entropy"] if entropy else [])), states)
    mask = fused_po.shift_labels(batch["labels"]) != dataset.IGNORE
    metrics = {"mean_token_accuracy": (stats.is_top1.bool() & mask).sum() / tokens}
    if entropy:
        metrics["entropy"] = torch.where(mask, stats.entropy, 0).sum() / tokens
    return -stats.logps.sum() / tokens + states.router_loss * (mask.sum() / tokens), metrics


def train_steps(run: loop.Run, engine, tokenizer, rows: list[dict], args, lr: float, steps: int, evaluate=None) -> None:
    """The supervised stage of a run."""
    learner, model = loop.learner(engine, lr, steps), engine.module

    def one_step(number: int) -> dict[str, float]:
        drawn = dataset.batch_at(rows, number, args.batch_size, args.seed)
        tokens = dataset.scored_tokens(drawn, FIELDS)
        return loop.update(learner, drawn, lambda part: sft_loss(model, tokenizer, part, tokens, args), args)

    run.train("SFT", learner, steps, one_step, evaluate)


def warm_up(run: loop.Run, model, tokenizer, rows: list[dict], args, field: str = "chosen"):
    """The model after --sft-steps supervised steps on one answer of each row, before another algorithm: its reference.

    It is saved as <run>/sft, from where a run that resumes takes it, and one on several ranks, whose engine has cut it.
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
    """Means over the held-out tokens."""
    tokens, total = dataset.scored_tokens(rows, FIELDS), {}
    with models.evaluating(model):
        for begin in range(0, len(rows), 100):
            loss, metrics = sft_loss(model, tokenizer, rows[begin : begin + 100], tokens, args, entropy=True)
            for name, value in ({"loss": loss} | metrics).items():
                total[name] = total.get(name, 0) + value.item()
    return total


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns what was measured before and after."""
    texts = loop.load_rows(args, "completion")
    with loop.Run(args, PANELS) as run:
        model, tokenizer, rows, held_out = loop.start(args, texts)

        def measure() -> dict[str, float]:
            measured = evaluate(model, tokenizer, held_out, args)
            return measured | {"correct": models.share_correct(model, tokenizer, held_out, args)}

        shares = {"before": measure()}
        model = models.adapt(model, args)
        train_steps(run, parallel.Engine(args, model), tokenizer, rows, args, args.lr, args.steps, measure)
        shares["after"] = measure()
        run.finish(model, tokenizer, "Supervised fine-tuning", SHARES, shares)
    return shares


if __name__ == "__main__":
    loop.main(train, parse())
