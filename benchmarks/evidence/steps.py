"""DPO steps of whole models: TRL's trainer with and without the patch, and the step of examples/dpo.py."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys

import counting
import torch
import training

from evidence.stages import ROOT
from evidence.timing import seconds_of

WARM, TIMED = 2, 5


def wanted(args: argparse.Namespace) -> training.Training:
    return next(case for case in training.suite(args.suite) if case.name == args.words[0])


def trl(args: argparse.Namespace) -> dict:
    """Tokens per second, peak and longest sequence in TRL's DPOTrainer, with and without the patch."""
    reason = training.absent()
    if reason is not None:
        return {"reason": reason}
    case = wanted(args)
    reports = training.compare(case, args.device)
    print(training.table(case, reports))
    for report in reports.values():
        if "seconds a step" in report:
            report["tokens a second"] = 2 * case.length / report["seconds a step"]
    wrong = [f"{name}: {report['wrong']}" for name, report in reports.items() if "wrong" in report]
    found = {"training": case._asdict(), "reports": reports}
    return found | ({"reason": "; ".join(wrong)} if wrong else {})


class Example:
    """The step of examples/dpo.py on a model from a config, with its loss, reference and optimizer."""

    def __init__(self, case: training.Training, device: str) -> None:
        sys.path.insert(0, str(ROOT / "examples"))
        import dpo
        from trainer import dataset, models, optimization, parallel, reference_logps

        self.case, self.dpo, self.dataset = case, dpo, dataset
        self.take_step, self.reference_logps = optimization.take_step, reference_logps.logps_of
        words = ["--device", device, "--batch-size", "1", "--max-length", str(2 * case.most), "--bf16"]
        self.args = dpo.parse(words if device == "cuda" else [*words[:-1], "--no-bf16"])
        model = models.prepared(training.model(case, device, 0), self.args)
        self.frozen = models.freeze(model, self.args)
        self.learner = optimization.learner(parallel.Engine(self.args, model, self.frozen), 1e-6, 1000)

    def row(self, length: int) -> dict[str, list[int]]:
        """A pair whose sequences have this length, half of it prompt."""
        draw = torch.Generator().manual_seed(length)
        prompt = length // 2
        ids = torch.randint(2, self.case.vocabulary, (3, length - prompt), generator=draw).tolist()
        return {"prompt_ids": ids[0][:prompt], "chosen_ids": ids[1], "rejected_ids": ids[2]}

    def step(self, length: int) -> float:
        """One optimizer step on a pair; the loss."""
        rows, args = [self.row(length)], self.args
        counts = 1, self.dataset.scored_tokens(rows, self.dpo.FIELDS)
        model = self.learner.engine.module

        def loss_of(part: list[dict]):
            batch = self.dataset.stack(part, self.dpo.FIELDS, 0, args.device)
            ref_logps = self.reference_logps(model, self.frozen, part, self.dpo.FIELDS, batch, args)
            return self.dpo.dpo_loss(model, batch, ref_logps, args, counts)

        return self.take_step(self.learner, rows, loss_of, args)["loss"]


def example(args: argparse.Namespace) -> dict:
    """Tokens per second, peak and longest sequence in the step of examples/dpo.py."""
    case, device = wanted(args), args.device
    ran = Example(case, device)
    losses = [ran.step(case.length) for _ in range(WARM)]
    times = [seconds_of(lambda: ran.step(case.length), device) for _ in range(TIMED)]
    peak = counting.peak_bytes(lambda: ran.step(case.length), device)
    seconds = statistics.median(times)

    def fits(length: int) -> bool:
        gc.collect()
        return training.peak_within(lambda: ran.step(length), case.memory, device)

    longest = training.longest(fits, case.most, case.grain)
    report = {
        "seconds a step": seconds,
        "tokens a second": 2 * case.length / seconds,
        "peak bytes": peak,
        "longest": longest,
        "loss": float(losses[0]),
    }
    print(report)
    return {"training": case._asdict(), "reports": {"examples/dpo.py": report}}
