"""A tiny model for TRL's trainers, and a bound on the error of a patched run: twice that of many stock runs.

The exact run is the stock trainer in float64, with log-probs from plain logits where TRL's own head computes in fp32.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable
from typing import NamedTuple, Optional

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs TRL: pip install -e '.[test]'")

import datasets
from numerics import assert_error, assert_with_runs, nudge
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.trainer import utils

from fused_po.integrations.trl import patched

datasets.disable_progress_bars()
gc.freeze()  # every training run collects garbage; this excludes the objects that the imports created

STEPS = 5
WORDS = [f"w{i}" for i in range(20)]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
V = len(SPECIAL) + len(WORDS)
# Arguments of every trainer: five reproducible steps on the CPU, each with a line of metrics.
ARGS = dict(
    report_to=[],
    max_steps=STEPS,
    logging_steps=1,
    save_strategy="no",
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    optim="sgd",
    learning_rate=0.05,
    per_device_train_batch_size=2,
    gradient_checkpointing=False,
    seed=3,
)
# Logged values that are not computed from the model.
CLOCKS = ("step_time", "perf/", "in_queue")
# Logged values that are exact.
COUNTS = ("num_tokens", "epoch", "step")


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL.values(), *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **SPECIAL)
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def model(seed: int = 1, **config) -> LlamaForCausalLM:
    """Two layers of width 16, with weights large enough to give distributions far from uniform."""
    shape = dict(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**shape | config))


def rows(*fields: str, count: int = 20) -> datasets.Dataset:
    """A data set of texts of 2 to 7 words."""
    draw = random.Random(0)
    text = lambda: " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 7)))  # noqa: E731
    return datasets.Dataset.from_list(
        [{f: (" " if f != "prompt" else "") + text() for f in fields} for _ in range(count)]
    )


def say(model: LlamaForCausalLM, length: int = 6) -> None:
    """Replace the model's generate by random words that are the same in every run, so that sampling does not differ."""
    drawn = torch.Generator().manual_seed(5)

    def generate(input_ids=None, generation_config=None, **_):
        copies = getattr(generation_config, "num_return_sequences", None) or 1
        ids = input_ids.repeat_interleave(copies, 0)
        new = torch.randint(len(SPECIAL), V, (len(ids), length), generator=drawn)
        new[::2, length // 2] = 2  # some end early
        new[::2, length // 2 + 1 :] = 0
        return torch.cat([ids, new], 1)

    model.generate = generate


def reward(completions: list, **_) -> list[float]:
    return [float(sum(map(ord, str(c))) % 7) / 3 for c in completions]


class Record(TrainerCallback):
    """A callback that records the gradients and logs of every step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        model = getattr(model, "module", model)
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class Run(NamedTuple):
    """The results of a training run: metrics by name [steps], gradients by name [steps, ...], weights by name."""

    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(trainer) -> Run:
    """Train, and return metrics, gradients and weights."""
    record = Record()
    trainer.add_callback(record)
    trainer.train()
    log = trainer.state.log_history[:STEPS]  # the last line is a summary
    assert len(record.gradients) == STEPS
    names = [n for n in log[0] if not any(clock in n for clock in CLOCKS)]
    metrics = {n: torch.tensor([line[n] for line in log if n in line], dtype=torch.float64) for n in names}
    assert all(len(value) == STEPS for value in metrics.values()), f"{ {n: len(v) for n, v in metrics.items()} }"
    gradients = {n: torch.stack([g[n] for g in record.gradients]).double() for n in record.gradients[0]}
    parameters = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    trained = {n: p.detach().double() for n, p in parameters if p.requires_grad}
    assert trained.keys() == gradients.keys() and any(value.any() for value in gradients.values())
    return Run(metrics, gradients, trained)


class PlainHead:
    """TRL's head in plain PyTorch: all logits in the dtype of the hidden states."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()):
        z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        logp = z.log_softmax(-1)
        p = logp.exp()
        top1 = z.argmax(-1) == targets
        entropy, squares = -(p * logp).sum(-1), p.square().sum(-1).log().detach()
        return logp.gather(-1, targets[:, None])[:, 0], entropy, squares, z.mean(-1).detach(), top1


@contextlib.contextmanager
def plain_head():
    stock, utils._ChunkedLogProbFunction = utils._ChunkedLogProbFunction, PlainHead
    yield
    utils._ChunkedLogProbFunction = stock


def nudged(make: Callable[[torch.dtype], object], seed: int):
    """A run of a fresh stock trainer in fp32 with weights moved to adjacent numbers; make(dtype) builds trainers."""
    trainer = make(torch.float32)
    nudge(seed, trainer.model, getattr(trainer, "ref_model", None))
    return trainer


def true_run(make: Callable[[torch.dtype], object]) -> Run:
    with plain_head():
        return train(make(torch.float64))


def assert_equal_training(make: Callable, ours: Optional[Callable] = None) -> Run:
    """Train patched and stock and compare with `assert_equal_runs`; ours builds the patched trainer if it differs."""
    with patched():
        found = train((ours or make)(torch.float32))
    truth = true_run(make)
    run = lambda seed: (train(nudged(make, seed)), truth)  # noqa: E731
    assert_with_runs(run, lambda stock: assert_equal_runs(stock, found, truth))
    return found


def assert_equal_runs(stock: list[tuple[Run, Run]], ours: Run, truth: Run) -> None:
    """Our largest error over all steps is within the bound of `assert_error`. stock: (a run, its exact run).

    Errors are relative to their tensor. The rounding of a metric is that of the largest one logged, since many are
    differences of summed log-probs.
    """
    eps = torch.finfo(torch.float32).eps
    for at, kind in enumerate(Run._fields):
        assert ours[at].keys() == truth[at].keys() == stock[0][0][at].keys(), kind
        theirs = [errors(run[at], exact[at]) for run, exact in stock]
        units = {name: size(value) for name, value in truth[at].items() if name not in COUNTS}
        for name, error in errors(ours[at], truth[at]).items():
            rounding = eps * (max(units.values()) / units[name] if kind == "metrics" else 1) if name in units else 0
            assert_error(f"{kind} {name}", error, [other[name] for other in theirs], rounding)


def size(value: Tensor) -> float:
    return value.abs().max().item() or 1.0


def errors(run: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to the largest exact number."""
    return {name: (run[name] - value).abs().max().item() / size(value) for name, value in truth.items()}
