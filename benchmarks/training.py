"""A step of TRL's DPOTrainer on a small Llama, stock and on our log-probs. No time is taken unless the losses agree."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import counting
import torch

PROVIDERS = ("TRL", "fused_po", "fused_po, none kept")
ROUNDS = 5
GRAIN = 64  # tokens: how finely the longest sequence is looked for


class Training(NamedTuple):
    """DPO with a live reference on one pair, half of each sequence prompt."""

    vocabulary: int
    width: int
    layers: int
    length: int  # tokens a sequence, of which a step is timed
    memory: int  # bytes a step may take beyond weights, for the longest sequence
    adapters: bool = False  # LoRA: the head frozen, the reference the model without it

    @property
    def name(self) -> str:
        kind = "lora" if self.adapters else "full"
        return f"dpo-V{self.vocabulary}-H{self.width}-L{self.layers}-T{self.length}-{kind}"


def suite(name: str) -> list[Training]:
    """tiny: for the tests."""
    if name == "tiny":
        return [Training(500, 16, 1, 64, 3 << 20)]
    cases = [Training(32000, 256, 2, 256, 1 << 29), Training(32000, 256, 2, 256, 1 << 29, adapters=True)]
    return cases if name == "cpu" else [Training(128256, 2048, 8, 4096, 16 << 30)]


def absent() -> str | None:
    """Why nothing can be measured, or None."""
    try:
        import trl  # noqa: F401
    except ImportError:
        return "TRL is not installed"
    return None


@contextlib.contextmanager
def provided(provider: str) -> Iterator[None]:
    """TRL as it is, or on our log-probs."""
    from fused_po import Schedule
    from fused_po.integrations.trl import patched

    schedule = Schedule(logits_budget=0) if provider == "fused_po, none kept" else None
    with contextlib.nullcontext() if provider == "TRL" else patched(schedule):
        yield


def dpo_trainer(case: Training, device: str):
    """The trainer, its weights the same in every call."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    def model(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        shape = dict(num_hidden_layers=case.layers, num_attention_heads=4, num_key_value_heads=2)
        config = LlamaConfig(
            vocab_size=case.vocabulary, hidden_size=case.width, intermediate_size=3 * case.width,
            max_position_embeddings=1 << 17, **shape,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(device)

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    args = DPOConfig(
        output_dir=tempfile.gettempdir(), report_to=[], bf16=False, use_cpu=device == "cpu", optim="sgd",
        gradient_checkpointing=False, disable_tqdm=True, max_length=None,
    )  # fmt: skip
    more = {"ref_model": None if case.adapters else model(1)}
    if case.adapters:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"prompt": "<unk>", "chosen": " <unk>", "rejected": " <unk>"}])
    trainer = DPOTrainer(model(0), args=args, train_dataset=rows, processing_class=tokenizer, **more)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def batch(case: Training, length: int, device: str) -> dict[str, torch.Tensor]:
    """What TRL's collator makes of a pair: chosen, then rejected."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(2, case.vocabulary, (2, length), generator=draw)
    ids[1, : length // 2] = ids[0, : length // 2]
    completion = (torch.arange(length) >= length // 2).long().expand(2, -1)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    return {name: value.to(device) for name, value in made.items()}


def step(trainer, inputs: dict[str, torch.Tensor]) -> float:
    """Forward, backward and the optimizer, to their end; the loss."""
    trainer.model.train()
    loss = trainer.training_step(trainer.model, dict(inputs))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss.item()


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest multiple of GRAIN up to `most` that fits, 0 if none does; what fits is taken to be monotonic."""
    low, high = 0, most // GRAIN
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * GRAIN) else (low, middle - 1)
    return low * GRAIN


def losses(case: Training, device: str, provider: str) -> list[float]:
    """Of two steps on fresh weights: the second knows the first's gradients."""
    with provided(provider):
        trainer = dpo_trainer(case, device)
        return [step(trainer, batch(case, case.length, device)) for _ in range(2)]


def rounding(case: Training) -> float:
    """Of a loss: beta times four sums of log-probs near -log V, each rounded in fp32, over a loss near log 2."""
    return 4 * 0.1 * torch.finfo(torch.float32).eps * case.length / 2 * math.log(case.vocabulary) / math.log(2)


def compare(case: Training, device: str) -> dict[str, dict]:
    """By provider: how far its losses are from TRL's, seconds a step, peak bytes, longest sequence within memory."""
    most = 8 * case.length
    stock = losses(case, device, "TRL")
    trainer = dpo_trainer(case, device)
    inputs = batch(case, case.length, device)
    reports: dict[str, dict] = {}
    for name in PROVIDERS:
        off = max(abs(a - b) / abs(b) for a, b in zip(losses(case, device, name), stock))
        reports[name] = {"loss off by": off}
        if not off <= rounding(case):
            reports[name]["wrong"] = f"losses differ from TRL's by {off:.1e}"
            continue

        def peak(length: int) -> int:
            of = batch(case, length, device)
            return counting.peak_bytes(lambda: step(trainer, of), device)

        with provided(name):
            reports[name]["peak bytes"] = peak(case.length)
            reports[name]["longest"] = longest(lambda n: peak(n) <= case.memory, most)
    able = [name for name in PROVIDERS if "wrong" not in reports[name]]
    times: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(ROUNDS):  # in turns, so that drift hits all alike
        for name in able:
            with provided(name):
                begin = time.perf_counter()
                step(trainer, inputs)
                times[name].append(time.perf_counter() - begin)
    for name in able:
        reports[name]["seconds a step"] = statistics.median(times[name][1:])
    return reports


def table(case: Training, reports: dict[str, dict]) -> str:
    """The reports in Markdown."""
    fits = f"longest sequence in {case.memory / 1e6:.0f} MB"
    lines = [f"| {case.name} | s a step | peak MB | {fits} | loss off by |", "|---|---|---|---|---|"]
    for name, report in reports.items():
        if "wrong" in report:
            lines.append(f"| {name} | | | | **wrong: {report['wrong']}** |")
        else:
            peak, seconds = report["peak bytes"] / 1e6, report["seconds a step"]
            fits = f"{report['longest']}{' or more' * (report['longest'] == 8 * case.length)}"
            lines.append(f"| {name} | {seconds:.3f} | {peak:.0f} | {fits} | {report['loss off by']:.0e} |")
    return "\n".join(lines)
