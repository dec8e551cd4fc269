"""Reward model: a scalar head on the supervised model, trained on pairs with the Bradley-Terry loss.

    python examples/reward.py                 # a tiny Llama on the shipped data, minutes on a CPU
    python examples/reward.py --model runs/sft/model --lr 1e-3        # from a run of sft.py
    python examples/reward.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --test-dataset test.jsonl

Rows have prompt, chosen and rejected. With --pairs sampled, the default on the shipped data, only the prompts are used:
the supervised model draws several answers to each, and the program that checks answers labels them. A second loss
(--lm-coef) trains the backbone as a language model on the same pairs: DPO without a reference, one of the regularizers
of GRM (Yang et al. 2024, arXiv:2406.10216). The model is saved as a transformers ...ForSequenceClassification;
`scoring.rewards` computes rewards with it.
"""

from __future__ import annotations

import json
from functools import partial

import sft
import torch
from trainer import comparisons, dataset, flags, models, optimization, parallel, plots, sampling, scoring, setup
from trainer.errors import fail
from trainer.run_files import write_whole
from trainer.training_run import Run, main

import fused_po
from fused_po import losses

PANELS = {
    "loss": "loss",
    "accuracy": "pairs ranked correctly",
    "margin": "reward margin",
    "eval_accuracy": "held-out pairs ranked correctly",
}
SHARES = {
    "accuracy": "pairs ranked correctly",
    "loss": "-log P(chosen above rejected)",
    "calibration_error": "calibration error of P(chosen above rejected)",
}
FIELDS = ("chosen", "rejected")


def parse(argv: list[str] | None = None):
    parser = flags.parser("reward", __doc__, rates=(1e-5, 1e-4), steps=800, eval_every=100)
    add = parser.add_argument
    text = "where the pairs come from. Default: sampled for the shipped data, given for other data"
    add("--pairs", choices=("sampled", "given"), help=text)
    add("--samples", type=int, default=4, help="answers drawn per prompt, with --pairs sampled")
    add("--max-completion-length", type=int, default=16, help="limit of a drawn answer in tokens")
    text = "weight of the squared sum of a pair's rewards, which keeps rewards close to 0"
    add("--centering", type=float, default=0.01, help=text)
    text = "weight of -log sigmoid(log p(chosen) - log p(rejected)) under the supervised model's frozen LM head"
    add("--lm-coef", type=float, default=1.0, help=text)
    args = flags.parse(parser, argv, ("samples", "max_completion_length"), natural=("centering", "lm_coef"))
    if not (args.model or args.sft_steps):
        fail(
            "--sft-steps: got 0 without --model, but a reward model starts from a trained model; leave it out, or give "
            "--model"
        )
    args.pairs = args.pairs or ("sampled" if args.dataset == str(comparisons.TRAIN) else "given")
    return args


def drawn_pairs(run: Run, model, tokenizer, rows: list[dict], args, name: str, seed: int) -> list[dict]:
    """Encoded pairs of `sampling.sampled_pairs`. A resumed run reads their texts from <run>/<name>.jsonl."""
    path = run.folder / f"{name}.jsonl"
    if not path.exists():
        options = dict(samples=args.samples, longest=args.max_completion_length, seed=seed)
        pairs = sampling.sampled_pairs(model, tokenizer, rows, args, **options)
        lines = "".join(json.dumps(row) + "\n" for row in pairs)
        write_whole(path, lambda temporary: temporary.write_text(lines))
    return setup.encode(dataset.read(str(path), name), tokenizer, args)


def scalar_model(run: Run, args):
    """The backbone of the supervised model with a new head of one output."""
    torch.manual_seed(args.seed)
    start, flag = (run.folder / "sft", "--output") if args.sft_steps else (args.model, "--model")
    model = models.load("AutoModelForSequenceClassification", start, args, flag, num_labels=1)
    return models.adapt(models.prepared(scoring.check_scores(model, flag), args), args)


def reward_loss(model, lm_head: dict, batch: dict, args, pairs: int, margin: torch.Tensor | None = None):
    """(loss, metrics) of a part of a step's pairs, divided by the number of all: see `take_step`.

    Args:
        lm_head: `scoring.decoder_head` of the supervised model. batch: of `dataset.stack`.
        pairs: number of pairs of the whole step. margin: [B], of `dataset.margins`.
    """
    hidden = scoring.hidden_states(model, batch, args)
    chosen, rejected = scoring.scores(model, hidden, batch).chunk(2)
    loss = losses.bradley_terry(chosen, rejected, margin=margin, centering=args.centering).sum() / pairs
    means = losses.reward_metrics(chosen, rejected)
    metrics = {name: means[name] * len(chosen) / pairs for name in ("accuracy", "margin", "mean_reward")}
    if args.lm_coef:
        labels = fused_po.shift_labels(batch["labels"])
        with scoring.autocast(args):
            logps = fused_po.linear_logps(hidden, labels=labels, **lm_head).logps
        metrics["lm_loss"] = losses.dpo(*fused_po.sequence_logps(logps).chunk(2), beta=1.0).sum() / pairs
        loss = loss + args.lm_coef * metrics["lm_loss"]
    return loss, metrics


@torch.no_grad()
def margins(model, tokenizer, rows: list[dict], args) -> torch.Tensor:
    """Margins [N]: rewards of the chosen answers minus those of the rejected ones."""
    parts = []
    with scoring.evaluating(model):
        for begin in range(0, len(rows), 100):
            batch = dataset.stack(rows[begin : begin + 100], FIELDS, tokenizer.pad_token_id, args.device)
            chosen, rejected = scoring.rewards(model, batch, args).chunk(2)
            parts.append((chosen - rejected).cpu())
    return torch.cat(parts)


def calibration(margins: torch.Tensor, bins: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calibration of P(A is preferred to B), the sigmoid of the margin, over both orders of each pair.

    Returns:
        (mean predicted probability, observed share, count) of each non-empty bin. The first two are equal for a
        calibrated model.
    """
    p = torch.sigmoid(torch.cat([margins, -margins]).double())
    above = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)]).double()
    at = (p * bins).long().clamp(max=bins - 1)
    sums = [torch.zeros(bins, dtype=torch.float64).index_add(0, at, v) for v in (p, above, torch.ones_like(p))]
    used = sums[2] > 0
    return sums[0][used] / sums[2][used], sums[1][used] / sums[2][used], sums[2][used]


def measures(margins: torch.Tensor) -> dict[str, float]:
    """Accuracy, loss and expected calibration error of held-out pairs."""
    p, share, count = calibration(margins)
    return {
        "accuracy": (margins > 0).float().mean().item(),
        "loss": -torch.nn.functional.logsigmoid(margins).mean().item(),
        "calibration_error": ((p - share).abs() * count).sum().item() / count.sum().item(),
    }


def plot_calibration(margins: torch.Tensor, path) -> None:
    """Plot observed against predicted P(A preferred to B), with 95% Wilson intervals and the number of pairs."""
    p, share, n = calibration(margins)
    z = 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (share * (1 - share) / n + z**2 / (4 * n**2)).sqrt() / (1 + z**2 / n)
    figure, axis = plots.pyplot().subplots(figsize=(5, 5), layout="constrained")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axis.vlines(p, middle - half, middle + half, color="C0", alpha=0.5)
    axis.plot(p, share, "o")
    for x, y, count in zip(p.tolist(), share.tolist(), n.int().tolist()):
        axis.annotate(str(count), (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="predicted P(A preferred to B)", ylabel="share of pairs with A preferred", title="Calibration")
    axis.grid(alpha=0.3)
    plots.save_picture(figure, path)


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns the results of `measures` before and after."""
    texts = setup.load_rows(args, "preference")
    with Run(args, PANELS) as run:
        policy, tokenizer, rows, held_out = setup.start(args, texts)
        policy = sft.warm_up(run, policy, tokenizer, rows, args)
        if args.pairs == "sampled":
            rows = drawn_pairs(run, policy, tokenizer, rows, args, "train", seed=args.seed)
            held_out = drawn_pairs(run, policy, tokenizer, held_out, args, "test", seed=args.seed + args.samples)
        found = scoring.decoder_head(policy) if args.lm_coef else {}
        lm_head = {name: v.detach() if torch.is_tensor(v) else v for name, v in found.items()}
        model = scalar_model(run, args)
        learner = optimization.learner(parallel.Engine(args, model), args.lr, args.steps)

        def measure() -> dict[str, float]:
            return measures(margins(model, tokenizer, held_out, args))

        def loss_of(part: list[dict], pairs: int):
            batch = dataset.stack(part, FIELDS, tokenizer.pad_token_id, args.device)
            return reward_loss(model, lm_head, batch, args, pairs, dataset.margins(part, args.device))

        shares = {"before": measure()}
        for step, metrics in run.steps("reward", learner, args.steps, measure):
            drawn = dataset.batch_at(rows, step, args.batch_size, args.seed)
            metrics |= optimization.take_step(learner, drawn, partial(loss_of, pairs=len(drawn)), args)
        shares["after"] = measure()
        plot_calibration(margins(model, tokenizer, held_out, args), run.folder / "calibration.png")
        run.finish(model, tokenizer, "Supervised training, then a reward model", SHARES, shares)
    return shares


if __name__ == "__main__":
    main(train, parse())
