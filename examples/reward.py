"""A reward model: a scalar head on the supervised model, trained on pairs by Bradley and Terry's likelihood.

    python examples/reward.py                 # a tiny Llama on the shipped data, minutes on a CPU
    python examples/reward.py --model runs/sft/model --lr 1e-3        # from a run of sft.py
    python examples/reward.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --test-dataset test.jsonl

Rows have prompt, chosen, rejected. With --pairs sampled, the default on the shipped data, only their prompts are taken:
the supervised model answers each a few times, and the program that checks answers says which are right. Beside the
head, the backbone learns the pairs as a language model (--lm-coef): DPO without a reference, one of the regularisers of
GRM (Yang et al. 2024, arXiv:2406.10216). The model is saved as transformers' ...ForSequenceClassification, and
`models.rewards` scores with it.
"""

from __future__ import annotations

import json

import common
import comparisons
import dataset
import loop
import models
import parallel
import sft
import torch

import fused_po
from fused_po import losses

PANELS = {
    "loss": "loss",
    "accuracy": "pairs with the chosen answer above",
    "margin": "reward margin",
    "eval_accuracy": "held-out pairs with the chosen answer above",
}
SHARES = {
    "accuracy": "pairs with the chosen answer above",
    "loss": "-log P(chosen above rejected)",
    "calibration_error": "calibration error of P(chosen above rejected)",
}
FIELDS = ("chosen", "rejected")


def parse(argv: list[str] | None = None):
    parser = loop.parser("reward", __doc__, rates=(1e-5, 1e-4), steps=800, eval_every=100)
    add = parser.add_argument
    add("--pairs", choices=("sampled", "given"), help="without it: sampled on the shipped data, given on yours")
    add("--samples", type=int, default=4, help="answers drawn for a prompt, with --pairs sampled")
    add("--max-completion-length", type=int, default=16, help="tokens of a drawn answer")
    add("--centering", type=float, default=0.01, help="weight of (sum of a pair's rewards)^2, which keeps them about 0")
    coef = "weight of -log s(log p(chosen) - log p(rejected)), through the supervised model's frozen LM head"
    add("--lm-coef", type=float, default=1.0, help=coef)
    args = loop.parse(parser, argv, ("samples", "max_completion_length"), natural=("centering", "lm_coef"))
    if not (args.model or args.sft_steps):
        common.fail(
            "--sft-steps: got 0 without --model; a reward model starts from a trained one: leave it out, or name one"
        )
    args.pairs = args.pairs or ("sampled" if args.dataset == str(comparisons.TRAIN) else "given")
    return args


def drawn_pairs(run: loop.Run, model, tokenizer, rows: list[dict], args, name: str, seed: int) -> list[dict]:
    """`models.sampled_pairs`, encoded; texts in <run>/<name>.jsonl, from where a run that resumes takes them."""
    path = run.folder / f"{name}.jsonl"
    if not path.exists():
        how = dict(samples=args.samples, longest=args.max_completion_length, seed=seed)
        pairs = models.sampled_pairs(model, tokenizer, rows, args, **how)
        lines = "".join(json.dumps(row) + "\n" for row in pairs)
        common.write_whole(path, lambda temporary: temporary.write_text(lines))
    return loop.encode(dataset.read(str(path), name), tokenizer, args)


def scalar_model(run: loop.Run, args):
    """The backbone of the supervised model with a new head of one output."""
    torch.manual_seed(args.seed)
    start, flag = (run.folder / "sft", "--output") if args.sft_steps else (args.model, "--model")
    model = models.load("AutoModelForSequenceClassification", start, args, flag, num_labels=1)
    return models.adapt(models.prepared(models.check_scores(model, flag), args), args)


def reward_loss(model, lm_head: dict, batch: dict, args, pairs: int, margin: torch.Tensor | None = None):
    """(loss, metrics) of a stacked batch that is part of a step over `pairs` pairs: shares of the step's means.

    lm_head: `models.decoder_head` of the supervised model. margin: [B], of `dataset.margins`.
    """
    hidden = models.hidden_states(model, batch, args)
    chosen, rejected = models.scores(model, hidden, batch).chunk(2)
    loss = losses.bradley_terry(chosen, rejected, margin=margin, centering=args.centering).sum() / pairs
    means = losses.reward_metrics(chosen, rejected)
    metrics = {name: means[name] * len(chosen) / pairs for name in ("accuracy", "margin", "mean_reward")}
    if args.lm_coef:
        labels = fused_po.shift_labels(batch["labels"])
        with models.autocast(args):
            logps = fused_po.linear_logps(hidden, labels=labels, **lm_head).logps
        metrics["lm_loss"] = losses.dpo(*fused_po.sequence_logps(logps).chunk(2), beta=1.0).sum() / pairs
        loss = loss + args.lm_coef * metrics["lm_loss"]
    return loss, metrics


@torch.no_grad()
def margins(model, tokenizer, rows: list[dict], args) -> torch.Tensor:
    """[N] rewards of the chosen answers less those of the rejected ones."""
    parts = []
    with models.evaluating(model):
        for begin in range(0, len(rows), 100):
            batch = dataset.stack(rows[begin : begin + 100], FIELDS, tokenizer.pad_token_id, args.device)
            chosen, rejected = models.rewards(model, batch, args).chunk(2)
            parts.append((chosen - rejected).cpu())
    return torch.cat(parts)


def calibration(margins: torch.Tensor, bins: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean probability, share above, count) of each bin that is not empty, of P(A above B) over both orders of a pair.

    By Bradley and Terry P is the sigmoid of the margin; a calibrated model has the two alike.
    """
    p = torch.sigmoid(torch.cat([margins, -margins]).double())
    above = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)]).double()
    at = (p * bins).long().clamp(max=bins - 1)
    sums = [torch.zeros(bins, dtype=torch.float64).index_add(0, at, v) for v in (p, above, torch.ones_like(p))]
    some = sums[2] > 0
    return sums[0][some] / sums[2][some], sums[1][some] / sums[2][some], sums[2][some]


def measures(margins: torch.Tensor) -> dict[str, float]:
    """accuracy, loss and expected calibration error of held-out pairs."""
    p, share, count = calibration(margins)
    return {
        "accuracy": (margins > 0).float().mean().item(),
        "loss": -torch.nn.functional.logsigmoid(margins).mean().item(),
        "calibration_error": ((p - share).abs() * count).sum().item() / count.sum().item(),
    }


def plot_calibration(margins: torch.Tensor, path) -> None:
    """P(A above B) by the model against how often A is above B, with Wilson's 95% intervals and counts of pairs."""
    p, share, n = calibration(margins)
    z = 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (share * (1 - share) / n + z**2 / (4 * n**2)).sqrt() / (1 + z**2 / n)
    figure, axis = common.pyplot().subplots(figsize=(5, 5), layout="constrained")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axis.vlines(p, middle - half, middle + half, color="C0", alpha=0.5)
    axis.plot(p, share, "o")
    for x, y, count in zip(p.tolist(), share.tolist(), n.int().tolist()):
        axis.annotate(str(count), (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="P(A above B) by the reward model", ylabel="share of pairs with A above B", title="Calibration")
    axis.grid(alpha=0.3)
    common.save_picture(figure, path)


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns what `measures` gave before and after."""
    texts = loop.load_rows(args, "preference")
    with loop.Run(args, PANELS) as run:
        policy, tokenizer, rows, held_out = loop.start(args, texts)
        policy = sft.warm_up(run, policy, tokenizer, rows, args)
        if args.pairs == "sampled":
            rows = drawn_pairs(run, policy, tokenizer, rows, args, "train", seed=args.seed)
            held_out = drawn_pairs(run, policy, tokenizer, held_out, args, "test", seed=args.seed + args.samples)
        found = models.decoder_head(policy) if args.lm_coef else {}
        lm_head = {name: v.detach() if torch.is_tensor(v) else v for name, v in found.items()}
        model = scalar_model(run, args)
        learner = loop.learner(parallel.Engine(args, model), args.lr, args.steps)

        def measure() -> dict[str, float]:
            return measures(margins(model, tokenizer, held_out, args))

        def one_step(number: int) -> dict[str, float]:
            drawn = dataset.batch_at(rows, number, args.batch_size, args.seed)

            def loss_of(part: list[dict]):
                batch = dataset.stack(part, FIELDS, tokenizer.pad_token_id, args.device)
                return reward_loss(model, lm_head, batch, args, len(drawn), dataset.margins(part, args.device))

            return loop.update(learner, drawn, loss_of, args)

        shares = {"before": measure()}
        run.train("reward", learner, args.steps, one_step, measure)
        shares["after"] = measure()
        plot_calibration(margins(model, tokenizer, held_out, args), run.folder / "calibration.png")
        run.finish(model, tokenizer, "Supervised training, then a reward model", SHARES, shares)
    return shares


if __name__ == "__main__":
    loop.main(train, parse())
