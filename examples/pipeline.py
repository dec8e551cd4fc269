"""The whole pipeline: SFT -> reward model -> PPO, and SFT -> DPO, side by side; which wins at equal KL?

    python examples/pipeline.py               # on the shipped data, minutes on a CPU
    python examples/pipeline.py --ppo-flags="--steps 40 --kl-coef 0.2" --dpo-flags="--beta 0.3"

Each stage is one of the scripts, in a folder of its own under --output; --<stage>-flags go to it as they are. The
preference pairs are drawn from the supervised model and labelled by the program that checks answers. From them the
reward model learns, which starts from the supervised weights and which PPO then maximises; and from the same pairs DPO
learns directly. Both are measured as they go on: correct held-out answers against the exact KL to the supervised model,
by `fused_po.linear_kl` over their own answers. A run that was stopped continues with --resume.
"""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path

import common
import comparisons
import dataset
import dpo
import loop
import models
import ppo
import reward
import rollouts
import sft
import torch

FLAGS = {  # stage: what it is told beside --<stage>-flags
    "sft": "--steps 170 --eval-every 50",
    "reward": "--steps 600 --eval-every 100",
    "ppo": "--steps 80 --eval-every 4 --whiten-rewards --kl-coef 0.16",
    "dpo": "--steps 400 --eval-every 20",
}
TINY = {"reward": "--lr 1e-3", "ppo": "--lr 5e-4", "dpo": "--lr 1e-3"}  # learning rates without a --model
BUDGETS = 6  # KLs at which the two are compared


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=loop.Help)
    add, flag = made.add_argument, argparse.BooleanOptionalAction
    add("--config", help="YAML file of flags (seed: 1); the command line goes before it")
    add("--model", help="Hub id or folder of a causal LM; without it a tiny Llama is built")
    add("--dataset", default=str(comparisons.TRAIN), help="preference rows; pairs are drawn anew for their prompts")
    add("--test-dataset", default=str(comparisons.TEST), help="held-out rows; their prompts measure")
    add("--output", default="runs/pipeline", help="folder; each stage has its own in it")
    add("--resume", action="store_true", help="continue the run in --output; stages that are done stay as they are")
    add("--lora", action=flag, default=False, help="train adapters in the reward model, PPO and DPO (takes peft)")
    add("--seed", type=int, default=0, help="of weights, order and draws")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    for stage, flags in FLAGS.items():
        add(f"--{stage}-flags", default="", help=f"flags for examples/{stage}.py, after {flags}")
    config = made.parse_args(argv).config
    if config:
        made.set_defaults(**loop.from_yaml(made, config))
    args = made.parse_args(argv)
    if not args.resume and Path(args.output).exists():
        common.fail(f"--output: {args.output} is there already; --resume continues it, another folder leaves it alone")
    return args


def words_of(stage: str, args, folder: Path, **given) -> list[str]:
    """The command line of a stage; `given` are flags that the pipeline itself sets."""
    given = {"seed": args.seed, "device": args.device, "output": folder, **given}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += (
        shlex.split(FLAGS[stage])
        + shlex.split("" if args.model else TINY.get(stage, ""))
        + ["--lora"] * (args.lora and stage != "sft")
    )
    return words + ["--resume"] * bool(common.checkpoints(folder)) + shlex.split(getattr(args, f"{stage}_flags"))


def stage(name: str, script, args, train=None, **given) -> Path:
    """Runs a script, unless it is done, in its folder; returns the folder of its model."""
    folder = Path(args.output) / name
    if not (folder / "model").is_dir():
        print(f"\n--- {name}")
        parsed = script.parse(words_of(name, args, folder, **given))
        (train or script.train)(parsed)
    return folder / "model"


def watched_dpo(args, parsed) -> None:
    """dpo.train, measured as PPO is: on the held-out prompts, with the exact KL."""
    how = ppo.parse(words_of("ppo", args, Path(args.output) / "ppo", test_dataset=args.test_dataset))
    how.padding_free = parsed.padding_free
    rows = dataset.read(args.test_dataset, "test", "prompt")

    def measure(model, frozen, tokenizer) -> dict[str, float]:
        prompts = loop.encode(rows, tokenizer, parsed)
        return rollouts.measure(model, frozen, tokenizer, prompts, how, rollouts.by_program)

    dpo.train(parsed, measure)


def correct_at_first(args, start: Path) -> float:
    """The supervised model's share of correct answers."""
    how = ppo.parse(words_of("ppo", args, Path(args.output) / "ppo", test_dataset=args.test_dataset))
    model, tokenizer = models.load("AutoModelForCausalLM", start, how), models.load_tokenizer(start)
    prompts = loop.encode(dataset.read(args.test_dataset, "test", "prompt"), tokenizer, how)
    return models.share_correct(model, tokenizer, prompts, how, longest=how.max_completion_length)


def curve(folder: Path) -> list[tuple[float, float]]:
    """(exact KL, share of correct answers) as training went on."""
    rows = [row for row in common.read_metrics(folder / "metrics.jsonl") if "eval_kl" in row]
    return [(row["eval_kl"], row["eval_correct"]) for row in rows]


def within(points: list[tuple[float, float]], budget: float) -> float:
    """The best share that was reached with at most so much KL."""
    return max(share for kl, share in points if kl <= budget)


def verdict(shares: dict[str, float], questions: int) -> str:
    """Who is ahead by more than two standard errors of the difference, if anybody."""
    (first, a), (second, b) = shares.items()
    error = math.sqrt((a * (1 - a) + b * (1 - b)) / questions)
    return "equal" if abs(a - b) <= 2 * error else first if a > b else second


def compare(curves: dict[str, list[tuple[float, float]]], questions: int) -> list[tuple[float, dict[str, float], str]]:
    """(KL, share of each, who wins) up to the largest KL that both have reached."""
    end = min(max(kl for kl, _ in points) for points in curves.values())
    budgets = [end * (i + 1) / BUDGETS for i in range(BUDGETS)]
    shares = [{name: within(points, budget) for name, points in curves.items()} for budget in budgets]
    return [(budget, share, verdict(share, questions)) for budget, share in zip(budgets, shares)]


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Correct answers against KL: what was measured, and the best so far."""
    figure, axis = common.pyplot().subplots(figsize=(7, 5), layout="constrained")
    for name, points in curves.items():
        (dots,) = axis.plot(*zip(*points), ".", alpha=0.5)
        kls = sorted({kl for kl, _ in points})
        axis.step(kls, [within(points, kl) for kl in kls], where="post", color=dots.get_color(), label=name)
    labels = "exact KL to the supervised model, nats an answer", "held-out greedy answers that are correct"
    axis.set(xlabel=labels[0], ylabel=labels[1], title="PPO on a learned reward, and DPO on the same pairs")
    axis.grid(alpha=0.3)
    axis.legend()
    common.save_picture(figure, path)


def train(args) -> list[tuple[float, dict[str, float], str]]:
    """All stages, the table, the picture; returns what `compare` says."""
    folder = Path(args.output)
    rows = dict(dataset=args.dataset, test_dataset=args.test_dataset)
    model = {"model": args.model} if args.model else {}
    start = stage("sft", sft, args, **rows, **model)
    judge = stage("reward", reward, args, **rows, model=start, pairs="sampled")
    stage("ppo", ppo, args, **rows, model=start, reward_model=judge)
    pairs = dict(dataset=folder / "reward" / "train.jsonl", test_dataset=args.test_dataset)
    stage("dpo", dpo, args, lambda parsed: watched_dpo(args, parsed), **pairs, model=start)

    questions = len(dataset.read(args.test_dataset, "test", "prompt"))
    before = correct_at_first(args, start)
    curves = {name.upper(): [(0.0, before), *curve(folder / name)] for name in ("ppo", "dpo")}
    compared = compare(curves, questions)
    draw(curves, folder / "pipeline.png")
    print(f"\n{'correct within a KL of':24}" + "".join(f"{name:>8}" for name in curves) + "   wins")
    for budget, shares, wins in compared:
        print(f"{budget:>19.2f} nats" + "".join(f"{share:>8.3f}" for share in shares.values()) + f"   {wins}")
    for name, points in curves.items():
        print(f"{name} ended at {points[-1][0]:.2f} nats with {points[-1][1]:.3f}")
    print(f"\npipeline.png and the stages' runs are in {folder}")
    return compared


if __name__ == "__main__":
    loop.main(train, parse())
