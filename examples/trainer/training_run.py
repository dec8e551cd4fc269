"""The folder of a run and its training loop: arguments, metrics, checkpoints, resuming, the final model.

    with Run(args, panels) as run:
        for step, metrics in run.steps("DPO", learner, args.steps, evaluate):
            metrics |= optimization.take_step(learner, rows, loss_of, args)
        run.finish(model, tokenizer, title, labels, columns)

A step is a function of its number, the weights and torch's generator, which each stage seeds. A run that was
interrupted and resumed therefore ends with the same bits as one that was not.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import checkpoints, models, parallel, plots, run_files
from .errors import fail
from .optimization import Learner

# Flags that may change when a run is resumed.
NOT_SETTINGS = ("resume", "output", "device", "checkpoint_every", "config", "tensorboard", "rates")
NOT_SETTINGS += ("parallel", "tp", "timeout")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Run:
    """A run's folder with its arguments, metrics and checkpoints. A run has one or more stages, one after another.

    With several ranks, only the first writes files.
    """

    def __init__(self, args, panels: dict[str, str]):
        """panels: the metrics for the progress bar and the plot -> their titles."""
        self.args, self.panels, self.begun, self.kept = args, panels, 0, None
        self.folder = parallel.agreed(self._choose_folder)
        settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
        if args.resume:
            self.kept = self._last_checkpoint(settings)
        self.resumed = self.kept or 0  # the step to continue from; `kept` is the step of the newest checkpoint
        rows = run_files.read_metrics(self.folder / "metrics.jsonl") if args.resume else []
        self.history = [row for row in rows if row["step"] < self.resumed]
        self.log = self.board = self.bar = None
        parallel.wait()
        if parallel.first():
            self._open(settings)
        parallel.wait()

    def _choose_folder(self) -> Path:
        """--output, or runs/<script>. A new run never writes into the folder of an old one."""
        default = Path("runs") / self.args.script
        if not (self.args.resume or self.args.output):
            names = (default.with_name(f"{default.name}-{n}" if n > 1 else default.name) for n in range(1, 10**6))
            return next(folder for folder in names if not folder.exists())
        folder = Path(self.args.output or default)
        if not self.args.resume and (folder / "arguments.json").exists():
            fail(f"--output: {folder} already holds a run; give --resume to continue it, or name another folder")
        return folder

    def _last_checkpoint(self, settings: dict) -> int:
        """The step of the newest checkpoint, of a run with the same settings."""
        if not (found := run_files.checkpoints(self.folder)):
            fail(f"{self.folder}: no checkpoint to resume from; leave out --resume to start a new run")
        path = self.folder / "arguments.json"
        try:
            old = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            fail(f"--resume: {path} cannot be read ({error}); start a new run in another folder")
        if old != settings:
            names = [name for name in old | settings if old.get(name) != settings.get(name)]
            changed = ", ".join(f"{name}: {old.get(name)} then, {settings.get(name)} now" for name in names)
            fail(f"--resume: the run in {self.folder} was started with other arguments ({changed})")
        return found[-1]

    def _open(self, settings: dict) -> None:
        """Create the folder, write arguments.json, open metrics.jsonl for appending."""
        run_files.make_folder(self.folder, "--output")
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        texts = {"arguments.json": json.dumps(settings, indent=1), "metrics.jsonl": lines}
        for name, text in texts.items():
            run_files.write_whole(self.folder / name, lambda temporary, text=text: temporary.write_text(text))
        self.log = open(self.folder / "metrics.jsonl", "a")  # noqa: SIM115, closed in __exit__
        if self.args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("--tensorboard requires TensorBoard: pip install tensorboard")
            self.board = SummaryWriter(self.folder, purge_step=self.kept)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Close the files. If an error or Ctrl-C ended the run, say which checkpoint it can resume from."""
        if self.bar is not None:
            self.bar.close()
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
            left = f"The last checkpoint is complete: --resume --output {self.folder} continues from step {self.kept}"
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            fail(f"{self.folder}: {error.strerror}; free some space. {left}")
        if parallel.first():
            print(f"stopped. {left}", file=sys.stderr)
        if kind is None:
            raise error

    def skip(self, steps: int) -> None:
        """Count the steps of a stage whose result is already on disk."""
        self.begun += steps

    def steps(
        self,
        stage: str,
        learner: Learner,
        steps: int,
        evaluate: Callable[[], dict[str, float]] | None = None,
        state: dict | None = None,
    ) -> Iterator[tuple[int, dict]]:
        """The training loop of a stage: yields (step, metrics) once per step, from the last checkpoint if resumed.

        The body of the loop does the optimizer step and adds its metrics to the dict; then they are written, and
        checkpoints saved when due. Step numbers continue from one stage to the next.

        Args:
            evaluate: returns the metrics to measure every --eval-every steps.
            state: other objects with state_dict and load_state_dict to save in checkpoints, by name.
        """
        first, self.begun = self.begun, self.begun + steps
        parts = {"schedule": learner.schedule, **(state or {})}
        step = first
        torch.manual_seed(self.args.seed + first)
        if self.resumed > self.begun:
            fail(f"--resume: {self.folder} is past {stage}, but the output of that stage is missing; start a new run")
        if self.resumed > first:
            step = self.resumed
            checkpoints.load(run_files.checkpoint(self.folder, step), learner, parts)
        learner.model.train()
        quiet = not sys.stderr.isatty() or not parallel.first()
        with tqdm(total=steps, initial=step - first, desc=stage, disable=quiet) as self.bar:
            while step < self.begun:
                metrics = {"step": step, "stage": stage}
                yield step, metrics
                step += 1
                every = self.args.eval_every
                if evaluate is not None and every and ((step - first) % every == 0):
                    metrics |= {f"eval_{name}": value for name, value in evaluate().items()}
                self._report(metrics)
                if step % self.args.checkpoint_every == 0 or step == self.begun:
                    self._checkpoint(step, learner, parts)

    def _report(self, metrics: dict) -> None:
        """Write a step's metrics to metrics.jsonl, the progress bar and TensorBoard."""
        self.history.append(metrics)
        shown = {name.split("/")[-1]: f"{metrics[name]:.3f}" for name in self.panels if name in metrics}
        self.bar.set_postfix(shown)
        self.bar.update()
        if self.log is None:
            return
        self.log.write(json.dumps(metrics) + "\n")
        if self.board is not None:
            for name, value in metrics.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{metrics['stage']}/{name}", value, metrics["step"])

    def _checkpoint(self, step: int, learner: Learner, parts: dict, keep: int = 2) -> None:
        """Save a checkpoint and delete all but the newest `keep`."""
        if self.log is not None:
            self.log.flush()
        checkpoints.save(run_files.checkpoint(self.folder, step), learner, parts)
        self.kept = step
        for old in run_files.checkpoints(self.folder)[:-keep] if parallel.first() else ():
            path = run_files.checkpoint(self.folder, old)
            # Renamed first: a partly deleted folder must not have the name of a checkpoint.
            run_files.remove(path.rename(path.with_name(f".{path.name}.old")))

    def finish(self, model, tokenizer, title: str, labels: dict[str, str], columns: dict[str, dict]) -> None:
        """Save the model, draw the plot, print the table.

        Args:
            model: unwrapped and complete (`Engine.whole`). labels, columns: see `plots.print_table`.
        """
        if not parallel.first():
            return
        models.save(self.folder / "model", model, tokenizer)
        plots.plot_metrics(self.history, self.panels, self.folder / "curves.png", title)
        plots.print_table("held-out", labels, columns)
        print(f"\nmodel, metrics.jsonl and curves.png are in {self.folder}")


def main(train: Callable, args) -> None:
    """Run train(args) in torchrun's process group, if there is one. Ctrl-C exits with status 130, without traceback."""
    try:
        with parallel.processes(args):
            train(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
