"""The whole pipeline: supervised model, reward model and PPO; or supervised model and DPO. Which is better at equal KL?

    python examples/pipeline.py               # on the shipped data, minutes on a CPU
    python examples/pipeline.py --ppo-flags="--steps 40 --kl-coef 0.2" --dpo-flags="--beta 0.3"

Each stage runs one of the scripts in its own folder under --output, with --<stage>-flags added to its command line.
Preference pairs are drawn from the supervised model and labelled by the program that checks answers. The reward model
starts from the supervised weights and trains on these pairs, and PPO maximizes its rewards; DPO trains on the same
pairs directly. For both, correct held-out answers are measured against the exact KL to the supervised model
(`fused_po.linear_kl` on their own answers). --resume continues an interrupted run.
"""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path

import dpo
import ppo
import reward
import sft
import torch
from trainer import comparisons, dataset, flags, models, plots, rollouts, run_files, sampling, setup
from trainer.errors import fail
from trainer.reward_sources import by_program
from trainer.training_run import main

STAGE_FLAGS = {  # the command line of each stage, before --<stage>-flags
    "sft": "--steps 170 --eval-every 50",
    "reward": "--steps 600 --eval-every 100",
    "ppo": "--steps 80 --eval-every 4 --whiten-rewards --kl-coef 0.16",
    "dpo": "--steps 400 --eval-every 20",
}
TINY = {"reward": "--lr 1e-3", "ppo": "--lr 5e-4", "dpo": "--lr 1e-3"}  # learning rates without --model
BUDGETS = 6  # number of KL values at which the two are compared


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help)
    add = made.add_argument
    add("--config", help="YAML file of flags (seed: 1); the command line overrides it")
    add("--model", help="Hub id or folder of a causal LM. Default: build a tiny Llama")
    text = "preference rows; new pairs are drawn for their prompts"
    add("--dataset", default=str(comparisons.TRAIN), help=text)
    add("--test-dataset", default=str(comparisons.TEST), help="held-out rows; their prompts are used for evaluation")
    add("--output", default="runs/pipeline", help="folder of the run, with a folder for each stage")
    add("--resume", action="store_true", help="continue the run in --output; finished stages are not repeated")
    text = "train LoRA adapters in the reward model, PPO and DPO (requires peft)"
    add("--lora", action=flags.SWITCH, default=False, help=text)
    add("--seed", type=int, default=0, help="for weights, order of rows and sampling")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    for stage, words in STAGE_FLAGS.items():
        add(f"--{stage}-flags", default="", help=f"flags for examples/{stage}.py, added after {words}")
    config = made.parse_args(argv).config
    if config:
        made.set_defaults(**flags.from_yaml(made, config))
    args = made.parse_args(argv)
    if not args.resume and Path(args.output).exists():
        fail(f"--output: {args.output} already exists; give --resume to continue that run, or name another folder")
    return args


def words_of(stage: str, args, folder: Path, **given) -> list[str]:
    """The command line of a stage. given: flags that the pipeline sets."""
    given = {"seed": args.seed, "device": args.device, "output": folder, **given}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += (
        shlex.split(STAGE_FLAGS[stage])
        + shlex.split("" if args.model else TINY.get(stage, ""))
        + ["--lora"] * (args.lora and stage != "sft")
    )
    return words + ["--resume"] * bool(run_files.checkpoints(folder)) + shlex.split(getattr(args, f"{stage}_flags"))


def stage(name: str, script, args, train=None, **given) -> Path:
    """Run a script in its folder, unless it has already finished; returns the folder of its model."""
    folder = Path(args.output) / name
    if not (folder / "model").is_dir():
        print(f"\n--- {name}")
        parsed = script.parse(words_of(name, args, folder, **given))
        (train or script.train)(parsed)
    return folder / "model"


def watched_dpo(args, parsed) -> None:
    """dpo.train with the evaluation of PPO: held-out prompts and the exact KL."""
    settings = ppo.parse(words_of("ppo", args, Path(args.output) / "ppo", test_dataset=args.test_dataset))
    settings.padding_free = parsed.padding_free
    rows = dataset.read(args.test_dataset, "test", "prompt")

    def measure(model, frozen, tokenizer) -> dict[str, float]:
        prompts = setup.encode(rows, tokenizer, parsed)
        return rollouts.measure(model, frozen, tokenizer, prompts, settings, by_program)

    dpo.train(parsed, measure)


def correct_at_first(args, start: Path) -> float:
    """The share of correct answers of the supervised model."""
    settings = ppo.parse(words_of("ppo", args, Path(args.output) / "ppo", test_dataset=args.test_dataset))
    model, tokenizer = models.load("AutoModelForCausalLM", start, settings), models.load_tokenizer(start)
    prompts = setup.encode(dataset.read(args.test_dataset, "test", "prompt"), tokenizer, settings)
    return sampling.share_correct(model, tokenizer, prompts, settings, longest=settings.max_completion_length)


def curve(folder: Path) -> list[tuple[float, float]]:
    """(exact KL, share of correct answers) at each evaluation during training."""
    rows = [row for row in run_files.read_metrics(folder / "metrics.jsonl") if "eval_kl" in row]
    return [(row["eval_kl"], row["eval_correct"]) for row in rows]


def within(points: list[tuple[float, float]], budget: float) -> float:
    """The highest share of correct answers at a KL of at most `budget`."""
    return max(share for kl, share in points if kl <= budget)


def verdict(shares: dict[str, float], questions: int) -> str:
    """The method that is better by more than two standard errors of the difference, or "equal"."""
    (first, a), (second, b) = shares.items()
    error = math.sqrt((a * (1 - a) + b * (1 - b)) / questions)
    return "equal" if abs(a - b) <= 2 * error else first if a > b else second


def compare(curves: dict[str, list[tuple[float, float]]], questions: int) -> list[tuple[float, dict[str, float], str]]:
    """(KL, best share of each, winner) at equally spaced KLs up to the largest that both have reached."""
    end = min(max(kl for kl, _ in points) for points in curves.values())
    budgets = [end * (i + 1) / BUDGETS for i in range(BUDGETS)]
    shares = [{name: within(points, budget) for name, points in curves.items()} for budget in budgets]
    return [(budget, share, verdict(share, questions)) for budget, share in zip(budgets, shares)]


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Plot correct answers against KL: every evaluation, and the best up to each KL."""
    figure, axis = plots.pyplot().subplots(figsize=(7, 5), layout="constrained")
    for name, points in curves.items():
        (dots,) = axis.plot(*zip(*points), ".", alpha=0.5)
        kls = sorted({kl for kl, _ in points})
        axis.step(kls, [within(points, kl) for kl in kls], where="post", color=dots.get_color(), label=name)
    labels = "exact KL to the supervised model, nats per answer", "held-out greedy answers that are correct"
    axis.set(xlabel=labels[0], ylabel=labels[1], title="PPO on a learned reward, and DPO on the same pairs")
    axis.grid(alpha=0.3)
    axis.legend()
    plots.save_picture(figure, path)


def train(args) -> list[tuple[float, dict[str, float], str]]:
    """Run all stages, print the table, draw the plot; returns the result of `compare`."""
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
    main(train, parse())
