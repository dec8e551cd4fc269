"""The loop that the examples share.

    parser(script, doc)             the flags of every script; add your own, then
    parse(parser, argv)             -> args: YAML (--config) under the command line, checked
    load_rows(args, "preference")   -> (training rows, held-out rows): texts; then
    start(args, rows)               -> (model, tokenizer, training rows, held-out rows), encoded
    learner(engine, lr, steps)      -> Learner: AdamW, warm-up, cosine on the model in a `parallel.Engine`
    update(learner, rows, loss_of, args)
                                    one optimizer step over `rows`, --micro-batch-size of them at a time;
                                    `loss_of(part)` gives (loss, metrics), each the part's *share of the step's*:
                                    divided by the counts of all rows, so that shares add up. Returns the step's
                                    metrics as numbers
    with Run(args, panels) as run:  the folder of a run: arguments.json, metrics.jsonl, checkpoint-*
        run.train(stage, learner, steps, one_step, evaluate=None, state=None)
                                    `one_step(number)` does a step and returns its metrics; `number` goes on over the
                                    stages. `evaluate()` gives metrics every --eval-every steps; `state` names what else
                                    has state_dict and load_state_dict (a KL controller). Resumes by itself
        run.skip(steps)             instead of train, where what a stage made is on disk already (see sft.warm_up)
        run.finish(...)             model, picture, table
    main(train, args)               train(args), with messages in place of tracebacks for Ctrl-C

A step is a function of its number, the weights and torch's generator, which each stage seeds anew: that is why a run
that was killed ends with the same bits.
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import checkpoints
import common
import comparisons
import dataset
import models
import parallel
import tokens
import torch
from tqdm import tqdm

NOT_SETTINGS = ("resume", "output", "device", "checkpoint_every", "config", "tensorboard", "rates")
NOT_SETTINGS += ("parallel", "tp", "timeout")
TINY_RATE = 1e-3  # a learning rate for the tiny Llama; it would ruin a model that has been trained
SFT_RATES = (2e-5, 2e-4)  # in full, by adapters
POSITIVE = ("steps", "batch_size", "lr", "sft_lr", "max_grad_norm", "max_prompt_length", "checkpoint_every", "lora_r")
NATURAL = ("sft_steps", "micro_batch_size", "eval_every", "seed")
UNIT = ("gamma", "lam")  # of the scripts that have them
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag, the description as it is written."""


def parser(
    script: str, doc: str, *, rates: tuple[float, float], warm_up: int = 100, **defaults
) -> argparse.ArgumentParser:
    """The flags of every script; `script` names its folder under runs/, `defaults` are its own.

    rates: the learning rates for a --model, trained in full and by --lora: TRL's, and ten times that. warm_up: the
        supervised steps before, where there is no --model.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=Help)
    add, flag = made.add_argument, argparse.BooleanOptionalAction
    add("--config", help="YAML file of flags (steps: 100, lora: true); the command line goes before it")
    add("--model", help="Hub id or folder of a causal LM; without it a tiny Llama is built and trained here")
    add(
        "--dataset",
        default=str(comparisons.TRAIN),
        help="file, folder or Hub id, in a format of TRL's; NAME:SPLIT, too",
    )
    add("--test-dataset", help="the held-out rows; without it the shipped ones, or split 'test' of --dataset")
    add("--dataset-config", help="configuration of --dataset on the Hub, such as main")
    add("--split", help="split of --dataset, if it is no single file; without it train")
    add("--test-split", help="split of the held-out rows, if they are no single file; without it test")
    add(
        "--test-share",
        type=float,
        help="share of --dataset's prompts to hold out, from 0 to 1, if there is no test set",
    )
    add("--output", help="folder for the run; without it runs/<script>, or the next free runs/<script>-N")
    add("--resume", action="store_true", help="continue the run in --output (or runs/<script>), bit for bit")
    text = f"supervised steps before; 0: the model as it is. Without it {warm_up}, 0 with --model"
    add("--sft-steps", type=int, help=text)
    text = f"learning rate of the supervised steps. Without it {TINY_RATE:g}, {SFT_RATES[0]:g} with --model"
    add("--sft-lr", type=float, help=text)
    add("--steps", type=int, default=800, help="optimizer steps")
    text = f"Without it {TINY_RATE:g}; with --model {rates[0]:g}, with --lora too {rates[1]:g}"
    add("--lr", type=float, help=f"highest learning rate: up over a tenth of the steps, down a cosine. {text}")
    add("--batch-size", type=int, default=32, help="rows an optimizer step")
    add("--micro-batch-size", type=int, default=0, help="rows at once; gradients add up to a whole batch's. 0: all")
    add("--max-grad-norm", type=float, default=1.0, help="longer gradients are cut to this length")
    add("--max-prompt-length", type=int, default=512, help="tokens; rows with longer prompts are left out")
    add("--max-length", type=int, default=1024, help="tokens of prompt and answer; longer answers are cut")
    text = "sequences end to end, positions from 0 for each, no padding; an error if the model mixes such sequences"
    add("--padding-free", action=flag, default=False, help=text)
    add("--keep-dropout", action=flag, default=False, help="train with the model's dropout; the reference has none")
    add(
        "--lora",
        action=flag,
        default=False,
        help="train adapters (takes peft); the reference is the model without them",
    )
    add("--lora-r", type=int, default=16, help="rank of the adapters")
    add("--gradient-checkpointing", action=flag, default=False, help="recompute activations in the backward")
    add("--bf16", action=flag, help="autocast to bf16; without it on a GPU only")
    add("--eval-every", type=int, default=0, help="steps from one evaluation to the next; 0: before and after only")
    add("--checkpoint-every", type=int, default=200, help="steps from one checkpoint to the next")
    add("--tensorboard", action=flag, default=False, help="write events for TensorBoard into the folder, too")
    add("--seed", type=int, default=0, help="of weights, order and draws")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    made.set_defaults(script=script, warm_up=warm_up, rates=rates, **defaults)
    return made


def from_yaml(made: argparse.ArgumentParser, path: str) -> dict:
    """The flags of a YAML file, as the command line would read them."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        common.fail(f"--config: {path} cannot be read ({error})")
    if not isinstance(found, dict):
        common.fail(f"--config: {path} holds a {type(found).__name__}, expected lines such as `steps: 100`")
    actions = {action.dest: action for action in made._actions if action.dest not in ("help", "config")}
    values = {}
    for key, value in found.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            common.fail(f"--config: {path} has {key!r}, which is no flag; allowed are {', '.join(sorted(actions))}")
        if (action.nargs == 0) != isinstance(value, bool):
            common.fail(
                f"--config: {path} has {key}: {value!r}, expected {'true or false' if action.nargs == 0 else 'a value'}"
            )
        try:
            value = value if action.nargs == 0 or action.type is None else action.type(str(value))
        except ValueError:
            common.fail(f"--config: {path} has {key}: {value!r}, expected {action.type.__name__}")
        if action.choices and value not in action.choices:
            common.fail(f"--config: {path} has {key}: {value!r}, allowed are {', '.join(map(str, action.choices))}")
        values[action.dest] = value
    return values


def parse(
    made: argparse.ArgumentParser, argv: list[str] | None, positive: tuple[str, ...] = (), natural: tuple[str, ...] = ()
) -> argparse.Namespace:
    """The flags, checked; `positive` and `natural` name the script's own that must be above 0, or not below."""
    config = made.parse_args(argv).config
    if config:
        made.set_defaults(**from_yaml(made, config))
    args = made.parse_args(argv)
    if args.model == "":
        common.fail("--model: got an empty name, expected a Hub id or a folder; without the flag a tiny Llama is built")
    common.check_device(args.device)
    parallel.check_flags(args)
    args.sft_steps = (0 if args.model else args.warm_up) if args.sft_steps is None else args.sft_steps
    args.sft_lr = (SFT_RATES[0] if args.model else TINY_RATE) if args.sft_lr is None else args.sft_lr
    args.lr = (args.rates[args.lora] if args.model else TINY_RATE) if args.lr is None else args.lr
    args.bf16 = args.device.startswith("cuda") if args.bf16 is None else args.bf16
    for names, allowed, wanted in (
        (POSITIVE + positive, lambda v: 0 < v < math.inf, "a number above 0"),
        (NATURAL + natural, lambda v: 0 <= v < math.inf, "0 or more"),
        ([name for name in UNIT if name in args], lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    ):
        for name in names:
            if not allowed(getattr(args, name)):
                common.fail(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected {wanted}")
    if args.seed >= 2**31:
        common.fail(f"--seed: got {args.seed}, expected less than 2**31")
    if args.max_length <= args.max_prompt_length:
        common.fail(f"--max-length: got {args.max_length}, expected more than --max-prompt-length")
    dataset.check_flags(args)
    return args


def load_rows(args, want: str) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows) as `dataset.read` has them, once --model is known to be there."""
    models.check(args)
    return dataset.read_both(args, want)


def start(args, texts: tuple[list[dict], list[dict]]):
    """(model, tokenizer, training rows, held-out rows): the policy before training; the rows of `load_rows` encoded."""
    if parallel.first():
        print(f"learning rate {args.lr:g}" + f", {args.sft_lr:g} in the supervised steps" * bool(args.sft_steps))
    model, tokenizer = models.build(args, dataset.texts_of(texts[0]))
    rows, held_out = (encode(rows, tokenizer, args) for rows in texts)
    tokens.check_fits(model, tokenizer, rows + held_out, args)
    return model, tokenizer, rows, held_out


def encode(rows: list[dict], tokenizer, args) -> list[dict]:
    """Rows with token ids, within --max-prompt-length and --max-length."""
    return dataset.encode(rows, tokenizer, args.max_prompt_length, args.max_length)


class Learner(NamedTuple):
    engine: parallel.Engine
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


def learner(engine: parallel.Engine, lr: float, steps: int) -> Learner:
    """AdamW on what requires grad; warm-up over a tenth of the steps, then down a cosine to a tenth of lr."""
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / max(1, steps))))

    return Learner(engine, engine.module, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))


def update(learner: Learner, rows: list, loss_of: Callable, args) -> dict[str, float]:
    """One optimizer step over all rows; metrics as numbers, with grad_norm and learning_rate.

    Args:
        loss_of: part of the rows -> (loss, metrics): 0-dim tensors, shares of the step's that add up over the parts.
    """
    ranks, total = parallel.data_ranks(args)[1], {}
    for part, weight, last in parallel.parts(rows, args):
        with learner.engine.accumulate(last):
            loss, report = learner.engine(functools.partial(loss_of, part))
            (loss * (weight * ranks)).backward()  # engines take the mean over ranks, and shares add up
        for name, value in ({"loss": loss} | report).items():
            total[name] = total.get(name, 0) + value.detach() * weight
    total = parallel.total(total, args)
    trained = [p for group in learner.optimizer.param_groups for p in group["params"]]
    norm = parallel.clip_grad_norm(trained, args.max_grad_norm)
    if not torch.isfinite(norm):
        common.fail(f"loss {total['loss']}, gradient norm {float(norm)}: the weights stay as they are; lower --lr")
    rate = learner.schedule.get_last_lr()[0]
    learner.optimizer.step()
    learner.schedule.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return total | {"grad_norm": float(norm), "learning_rate": rate}


class Run:
    """A run's folder: its arguments, its metrics, its checkpoints; stages come one after another.

    Of several ranks the first one writes, and all read."""

    def __init__(self, args, panels: dict[str, str]):
        """panels: metrics for the bar and the picture, by name, with their titles."""
        self.args, self.panels, self.begun, self.kept = args, panels, 0, None
        self.folder = parallel.agreed(self._folder)
        settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
        path = self.folder / "arguments.json"
        if args.resume:
            if not (found := common.checkpoints(self.folder)):
                common.fail(f"{self.folder}: no checkpoint to resume from; leave out --resume to start anew")
            self.kept = found[-1]
            if (old := self._arguments(path)) != settings:
                names = [name for name in old | settings if old.get(name) != settings.get(name)]
                changed = ", ".join(f"{name}: {old.get(name)} then, {settings.get(name)} now" for name in names)
                common.fail(f"--resume: the run in {self.folder} was started with other arguments ({changed})")
        self.resumed = self.kept or 0  # the step that a run goes on from; `kept` is its last whole checkpoint
        rows = common.read_metrics(self.folder / "metrics.jsonl") if args.resume else []
        self.history = [row for row in rows if row["step"] < self.resumed]
        self.log = self.board = None
        parallel.wait()
        if parallel.first():
            common.make_folder(self.folder, "--output")
            common.write_whole(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1)))
            lines = "".join(json.dumps(row) + "\n" for row in self.history)
            common.write_whole(self.folder / "metrics.jsonl", lambda temporary: temporary.write_text(lines))
            self.log = open(self.folder / "metrics.jsonl", "a")  # noqa: SIM115, closed in __exit__
            self.board = self._board() if args.tensorboard else None
        parallel.wait()

    def _folder(self) -> Path:
        """An old run is continued or left alone, never mixed with a new one."""
        default = Path("runs") / self.args.script
        if not (self.args.resume or self.args.output):
            names = (default.with_name(f"{default.name}-{n}" if n > 1 else default.name) for n in range(1, 10**6))
            return next(folder for folder in names if not folder.exists())
        folder = Path(self.args.output or default)
        if not self.args.resume and (folder / "arguments.json").exists():
            common.fail(
                f"--output: {folder} holds a run already; --resume continues it, another folder leaves it alone"
            )
        return folder

    def _arguments(self, path: Path) -> dict:
        """Those that the run was started with."""
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            common.fail(f"--resume: {path} cannot be read ({error}); start anew in another folder")

    def _board(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            common.fail("--tensorboard takes TensorBoard: pip install tensorboard")
        return SummaryWriter(self.folder, purge_step=self.kept)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Whatever ends a run, the last checkpoint is whole; says where it is."""
        try:
            if self.log is not None:
                self.log.close()
        except OSError as full:
            error = error or full
        if self.board is not None:
            self.board.close()
        if error is None:
            return
        left = "There is no checkpoint yet."
        if self.kept:
            left = f"The last checkpoint is whole: --resume --output {self.folder} continues from step {self.kept}"
        if isinstance(error, OSError) and error.errno in FULL:
            common.fail(f"{self.folder}: {error.strerror}; make room. {left}")
        if parallel.first():
            print(f"stopped. {left}", file=sys.stderr)
        if kind is None:
            raise error

    def skip(self, steps: int) -> None:
        """A stage whose result is on disk."""
        self.begun += steps

    def train(
        self,
        stage: str,
        learner: Learner,
        steps: int,
        one_step: Callable[[int], dict[str, float]],
        evaluate: Callable[[], dict[str, float]] | None = None,
        state: dict | None = None,
    ) -> None:
        """One stage, from its beginning or from the checkpoint that lies in it, to its end."""
        first, self.begun = self.begun, self.begun + steps
        parts = {"schedule": learner.schedule, **(state or {})}
        step = first
        torch.manual_seed(self.args.seed + first)
        if self.resumed > self.begun:
            common.fail(f"--resume: {self.folder} is past {stage}, but what that stage made is gone; start anew")
        if self.resumed > first:
            step = self.resumed
            checkpoints.load(common.checkpoint(self.folder, step), learner, parts)
        learner.model.train()
        quiet = not sys.stderr.isatty() or not parallel.first()
        with tqdm(total=steps, initial=step - first, desc=stage, disable=quiet) as bar:
            while step < self.begun:
                row = {"step": step, "stage": stage, **one_step(step)}
                step += 1
                every = self.args.eval_every
                if evaluate is not None and every and ((step - first) % every == 0):
                    row |= {f"eval_{name}": value for name, value in evaluate().items()}
                self._write(row)
                bar.set_postfix({name.split("/")[-1]: f"{row[name]:.3f}" for name in self.panels if name in row})
                bar.update()
                if step % self.args.checkpoint_every == 0 or step == self.begun:
                    self._checkpoint(step, learner, parts)

    def _write(self, row: dict) -> None:
        self.history.append(row)
        if self.log is None:
            return
        self.log.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{row['stage']}/{name}", value, row["step"])

    def _checkpoint(self, step: int, learner: Learner, parts: dict, keep: int = 2) -> None:
        if self.log is not None:
            self.log.flush()
        checkpoints.save(common.checkpoint(self.folder, step), learner, parts)
        self.kept = step
        for old in common.checkpoints(self.folder)[:-keep] if parallel.first() else ():
            path = common.checkpoint(self.folder, old)
            common.remove(path.rename(path.with_name(f".{path.name}.old")))  # no name is that of half a checkpoint

    def finish(self, model, tokenizer, title: str, labels: dict[str, str], columns: dict[str, dict]) -> None:
        """Saves the model of `Engine.whole`, draws the panels, prints the table (see common.print_table)."""
        if not parallel.first():
            return
        models.save(self.folder / "model", model, tokenizer)
        common.plot_metrics(self.history, self.panels, self.folder / "curves.png", title)
        common.print_table("held-out", labels, columns)
        print(f"\nmodel, metrics.jsonl and curves.png are in {self.folder}")


def main(train: Callable, args) -> None:
    """train(args); Ctrl-C ends it with the message of `Run`, as shells expect."""
    try:
        with parallel.processes(args):
            train(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
