"""The exact KL beside its estimates k1, k2, k3, over the same rollouts of the demo's policy.

    python examples/dpo.py --output runs/kl        # minutes on a CPU: a policy and its reference
    python benchmarks/kl_variance.py runs/kl       # seconds

Each rollout is a held-out prompt, drawn with replacement, and an answer that the policy samples at temperature 1. Its
KL is the sum over the answer's tokens. The exact KL uses the whole distribution of each token; the estimates use the
sampled token. The last column is the standard error that comes from sampling the tokens alone, computed from sums over
the vocabulary at the visited states.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from trainer import dataset, models, sampling, scoring, setup
from trainer.errors import fail

import fused_po
from fused_po import losses

ESTIMATES = ("k1", "k2", "k3")


def load(run: Path, device: str):
    """(policy, reference, tokenizer, held-out rows, arguments) of a finished run of examples/dpo.py."""
    if not (run / "model").is_dir():
        fail(f"{run}: holds no finished run; make one with python examples/dpo.py --output {run}")
    args = argparse.Namespace(**json.loads((run / "arguments.json").read_text()), device=device)
    folders = run / "model", run / "sft" if args.sft_steps else args.model
    policy, reference = (models.load("AutoModelForCausalLM", folder, args).eval() for folder in folders)
    tokenizer = models.load_tokenizer(run / "model")
    rows = dataset.read(args.test_dataset, "test")
    return policy, reference, tokenizer, setup.encode(rows, tokenizer, args), args


@torch.no_grad()
def measure(
    policy, reference, rows: list[dict], pad: int, args
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By estimator: the KLs of the rollouts [B], and the variance from sampling their tokens [B]; float64."""
    batch = dataset.stack(rows, ("answer",), pad, args.device)
    labels = fused_po.shift_labels(batch["labels"])
    mask = labels != dataset.IGNORE
    hidden, ref_hidden = (scoring.hidden_states(model, batch, args).double() for model in (policy, reference))
    weight, ref_weight = (model.lm_head.weight.double() for model in (policy, reference))
    stats = fused_po.linear_kl(hidden, weight, ref_hidden, ref_weight, labels)
    values, added = {"exact": stats.kl.sum(1)}, {"exact": torch.zeros(len(rows), dtype=torch.float64)}
    log_p, log_q = ((h @ w.T).log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    p = log_p.exp()
    for kind in ESTIMATES:
        drawn = losses.kl_estimate(stats.logps, stats.ref_logps, kind)
        values[kind] = torch.where(mask, drawn, 0).sum(1)
        each = losses.kl_estimate(log_p, log_q, kind)
        mean = (p * each).sum(-1, keepdim=True)
        added[kind] = torch.where(mask, (p * (each - mean).square()).sum(-1), 0).sum(1)
    return values, added


def study(run: Path, rollouts: int, seed: int, longest: int = 24, device: str = "cpu"):
    """(values, added) as from `measure`, of all rollouts [rollouts], and the answers' lengths."""
    policy, reference, tokenizer, rows, args = load(run, device)
    torch.manual_seed(seed)
    chosen = [rows[i] for i in torch.randint(len(rows), (rollouts,)).tolist()]
    parts, lengths = [], []
    for begin in range(0, rollouts, 200):
        answered = sampling.sample(policy, tokenizer, chosen[begin : begin + 200], args, longest)
        parts.append(measure(policy, reference, answered, tokenizer.pad_token_id, args))
        lengths += [len(row["answer_ids"]) for row in answered]
    values, added = ({kind: torch.cat([part[i][kind] for part in parts]) for kind in parts[0][i]} for i in (0, 1))
    return values, added, torch.tensor(lengths, dtype=torch.float64)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", nargs="?", type=Path, default=Path("runs/dpo"), help="folder of a run of examples/dpo.py"
    )
    parser.add_argument("--rollouts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.rollouts < 2:
        fail(f"--rollouts: got {args.rollouts}, expected at least 2")
    values, added, lengths = study(args.run, args.rollouts, args.seed)
    n, exact = args.rollouts, values["exact"]
    print(f"{n} rollouts, seed {args.seed}, {lengths.mean():.1f} tokens each; nats per rollout\n")
    print("| estimate | mean | standard error | variance / exact's | mean - exact's | from sampling alone |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, value in values.items():
        error = (value.var() / n).sqrt()
        apart = value - exact
        difference = "" if kind == "exact" else f"{apart.mean():+.4f} ± {(apart.var() / n).sqrt():.4f}"
        alone = f"{(added[kind].mean() / n).sqrt():.4f}"
        print(
            f"| {kind} | {value.mean():.4f} | {error:.4f} | {value.var() / exact.var():.2f} | {difference} | {alone} |"
        )


if __name__ == "__main__":
    main()
