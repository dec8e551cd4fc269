"""Command-line flags that all training scripts share, a YAML file of flags (--config), and their checks.

A script makes a parser by `parser`, adds its own flags, and parses them by `parse`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from . import comparisons, dataset, parallel
from .errors import check_device, fail

TINY_RATE = 1e-3  # learning rate for the tiny Llama that the scripts build; too high for a pretrained model
SFT_RATES = (2e-5, 2e-4)  # learning rates of supervised fine-tuning: all weights, LoRA
POSITIVE = ("steps", "batch_size", "lr", "sft_lr", "max_grad_norm", "max_prompt_length", "checkpoint_every", "lora_r")
NOT_NEGATIVE = ("sft_steps", "micro_batch_size", "eval_every", "seed")
UNIT_INTERVAL = ("gamma", "lam")  # checked in the scripts that have them
SWITCH = argparse.BooleanOptionalAction


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser(
    script: str, doc: str, *, rates: tuple[float, float], warm_up: int = 100, **defaults
) -> argparse.ArgumentParser:
    """A parser with the flags of every script.

    Args:
        script: name of the script; its runs go to runs/<script>.
        doc: the description that --help prints.
        rates: default learning rates with --model: training all weights, and with --lora.
        warm_up: default of --sft-steps without --model.
        defaults: other defaults of the script, by name of the flag.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=Help)
    _add_model_flags(made.add_argument_group("model").add_argument)
    _add_data_flags(made.add_argument_group("data").add_argument)
    _add_training_flags(made.add_argument_group("training").add_argument, rates, warm_up)
    _add_run_flags(made.add_argument_group("run").add_argument)
    made.set_defaults(script=script, warm_up=warm_up, rates=rates, **defaults)
    return made


def _add_model_flags(add) -> None:
    add("--model", help="Hub id or folder of a causal LM. Default: build and train a tiny Llama")
    text = "train LoRA adapters (requires peft); the reference is the model with its adapters switched off"
    add("--lora", action=SWITCH, default=False, help=text)
    add("--lora-r", type=int, default=16, help="rank of the adapters")
    text = "train with the model's dropout. Off by default: policy and reference then start as the same function"
    add("--keep-dropout", action=SWITCH, default=False, help=text)
    text = "concatenate the sequences of a batch without padding; an error if the model mixes packed sequences"
    add("--padding-free", action=SWITCH, default=False, help=text)
    add("--gradient-checkpointing", action=SWITCH, default=False, help="recompute activations in the backward pass")
    add("--bf16", action=SWITCH, help="autocast to bf16. Default: on for a GPU, off for a CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")


def _add_data_flags(add) -> None:
    text = "training rows in one of TRL's formats: a file, a folder or a Hub id, also as NAME:SPLIT"
    add("--dataset", default=str(comparisons.TRAIN), help=text)
    text = "held-out rows. Default: the shipped ones for the shipped data, otherwise split 'test' of --dataset"
    add("--test-dataset", help=text)
    add("--dataset-config", help="configuration of --dataset on the Hub, such as main")
    add("--split", help="split of --dataset, if it is not a single file. Default: train")
    add("--test-split", help="split of the held-out rows, if they are not a single file. Default: test")
    text = "hold out this share of --dataset's prompts, between 0 and 1, if there is no test set"
    add("--test-share", type=float, help=text)
    add("--max-prompt-length", type=int, default=512, help="limit in tokens; rows with longer prompts are left out")
    add("--max-length", type=int, default=1024, help="limit of prompt and answer in tokens; longer answers are cut")


def _add_training_flags(add, rates: tuple[float, float], warm_up: int) -> None:
    text = f"supervised steps before the method itself; 0: none. Default: {warm_up}, 0 with --model"
    add("--sft-steps", type=int, help=text)
    text = f"learning rate of the supervised steps. Default: {TINY_RATE:g}, {SFT_RATES[0]:g} with --model"
    add("--sft-lr", type=float, help=text)
    add("--steps", type=int, default=800, help="optimizer steps")
    text = "highest learning rate: linear warm-up over a tenth of the steps, then a cosine. Default: "
    text += f"{TINY_RATE:g}, {rates[0]:g} with --model, {rates[1]:g} with --model and --lora"
    add("--lr", type=float, help=text)
    add("--batch-size", type=int, default=32, help="rows per optimizer step")
    text = "rows per forward and backward pass; gradients are accumulated over the batch. 0: the whole batch"
    add("--micro-batch-size", type=int, default=0, help=text)
    add("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--seed", type=int, default=0, help="for weights, order of rows and sampling")


def _add_run_flags(add) -> None:
    add("--config", help="YAML file of flags (steps: 100, lora: true); the command line overrides it")
    add("--output", help="folder of the run. Default: runs/<script>, or the next free runs/<script>-N")
    add("--resume", action="store_true", help="continue the run in --output (or runs/<script>), bit for bit")
    add("--eval-every", type=int, default=0, help="steps between evaluations; 0: only before and after training")
    add("--checkpoint-every", type=int, default=200, help="steps between checkpoints")
    add("--tensorboard", action=SWITCH, default=False, help="also write TensorBoard events into the folder")


def from_yaml(made: argparse.ArgumentParser, path: str) -> dict:
    """The flags in a YAML file, converted and checked as on the command line."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        fail(f"--config: {path} cannot be read ({error})")
    if not isinstance(found, dict):
        fail(f"--config: {path} holds a {type(found).__name__}, expected lines such as `steps: 100`")
    actions = {action.dest: action for action in made._actions if action.dest not in ("help", "config")}
    values = {}
    for key, value in found.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            fail(f"--config: {path} has {key!r}, which is not a flag; allowed are {', '.join(sorted(actions))}")
        values[action.dest] = _value(action, key, value, path)
    return values


def _value(action: argparse.Action, key: str, value, path: str):
    """A value of the YAML file with the type of its flag."""
    where = f"--config: {path} has {key}: {value!r}"
    if (action.nargs == 0) != isinstance(value, bool):
        fail(f"{where}, expected {'true or false' if action.nargs == 0 else 'a value'}")
    try:
        value = value if action.nargs == 0 or action.type is None else action.type(str(value))
    except ValueError:
        fail(f"{where}, expected {action.type.__name__}")
    if action.choices and value not in action.choices:
        fail(f"{where}, allowed are {', '.join(map(str, action.choices))}")
    return value


def parse(
    made: argparse.ArgumentParser, argv: list[str] | None, positive: tuple[str, ...] = (), natural: tuple[str, ...] = ()
) -> argparse.Namespace:
    """Parse the flags, check them and fill in defaults that depend on other flags.

    Args:
        positive: the script's own flags that must be above 0. natural: those that must be 0 or more.
    """
    config = made.parse_args(argv).config
    if config:
        made.set_defaults(**from_yaml(made, config))
    args = made.parse_args(argv)
    if args.model == "":
        fail("--model: got an empty name, expected a Hub id or a folder; without the flag a tiny Llama is built")
    check_device(args.device)
    parallel.check_flags(args)
    args.sft_steps = (0 if args.model else args.warm_up) if args.sft_steps is None else args.sft_steps
    args.sft_lr = (SFT_RATES[0] if args.model else TINY_RATE) if args.sft_lr is None else args.sft_lr
    args.lr = (args.rates[args.lora] if args.model else TINY_RATE) if args.lr is None else args.lr
    args.bf16 = args.device.startswith("cuda") if args.bf16 is None else args.bf16
    _check_ranges(args, positive, natural)
    dataset.check_flags(args)
    return args


def _check_ranges(args, positive: tuple[str, ...], natural: tuple[str, ...]) -> None:
    for names, allowed, wanted in (
        (POSITIVE + positive, lambda v: 0 < v < math.inf, "a number above 0"),
        (NOT_NEGATIVE + natural, lambda v: 0 <= v < math.inf, "0 or more"),
        ([name for name in UNIT_INTERVAL if name in args], lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    ):
        for name in names:
            if not allowed(getattr(args, name)):
                fail(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected {wanted}")
    if args.seed >= 2**31:
        fail(f"--seed: got {args.seed}, expected less than 2**31")
    if args.max_length <= args.max_prompt_length:
        fail(f"--max-length: got {args.max_length}, expected more than --max-prompt-length")
