"""The exact KL against its estimates k1, k2, k3 over the same rollouts of the demo's policy.

    python examples/dpo.py --output runs/kl        # minutes on a CPU: a policy and its reference
    python benchmarks/kl_variance.py runs/kl       # seconds

Each rollout is a held-out prompt, drawn with replacement, and an answer that the policy samples at temperature 1. Its
KL is the sum over the answer's tokens. The exact one knows the whole distribution of each token; the rest see the token
that was drawn. The last column is the standard error that the draw of each token adds by itself: sums over the
vocabulary at the states visited, not an estimate from what was drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import common
import dpo

import fused_po
from fused_po import losses

ESTIMATES = ("k1", "k2", "k3")


def load(run: Path, device: str):
    """(policy, reference, tokenizer, held-out rows) of a finished run of examples/dpo.py."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (run / "model").is_dir():
        common.fail(f"{run}: holds no finished run; python examples/dpo.py --output {run} makes one")
    models = [AutoModelForCausalLM.from_pretrained(run / "model").to(device).eval() for _ in range(2)]
    models[1].load_state_dict(common.load_checkpoint(run, device)["reference"])
    tokenizer = AutoTokenizer.from_pretrained(run / "model", padding_side="left")
    settings = json.loads((run / "arguments.json").read_text())
    rows = common.read_pairs(settings["test_dataset"], "test")
    rows = common.encode(rows, tokenizer, settings["max_prompt_length"], settings["max_length"])
    return *models, tokenizer, rows


@torch.no_grad()
def sample(policy, tokenizer, rows: list[dict], longest: int) -> list[dict]:
    """The rows with an answer of the policy each, up to and with its end."""
    device = policy.device
    prompts = tokenizer.pad({"input_ids": [row["prompt_ids"] for row in rows]}, return_tensors="pt").to(device)
    prompts = {name: prompts[name] for name in ("input_ids", "attention_mask")}
    how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id)
    out = policy.generate(**prompts, max_new_tokens=longest, **how)[:, prompts["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    answers = [ids[: ids.index(end) + 1] if end in ids else ids for ids in out]
    return [{**row, "answer_ids": answer} for row, answer in zip(rows, answers)]


@torch.no_grad()
def measure(policy, reference, rows: list[dict], pad: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By estimator: the rollouts' KLs [B], and the variance that the draws of their tokens add [B]; float64."""
    batch = common.stack(rows, ("answer",), pad, str(policy.device))
    labels = fused_po.shift_labels(batch["labels"])
    mask = labels != common.IGNORE
    hidden, ref_hidden = (dpo.hidden_states(model, batch).double() for model in (policy, reference))
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
    policy, reference, tokenizer, rows = load(run, device)
    torch.manual_seed(seed)
    chosen = [rows[i] for i in torch.randint(len(rows), (rollouts,)).tolist()]
    parts, lengths = [], []
    for begin in range(0, rollouts, 200):
        answered = sample(policy, tokenizer, chosen[begin : begin + 200], longest)
        parts.append(measure(policy, reference, answered, tokenizer.pad_token_id))
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
        common.fail(f"--rollouts: got {args.rollouts}, expected at least 2")
    values, added, lengths = study(args.run, args.rollouts, args.seed)
    n, exact = args.rollouts, values["exact"]
    print(f"{n} rollouts, seed {args.seed}, {lengths.mean():.1f} tokens each; nats a rollout\n")
    print("| estimate | mean | standard error | variance / exact's | mean - exact's | of the draws alone |")
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
