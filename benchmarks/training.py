"""A step of TRL's DPOTrainer on a small Llama, with and without the patch. It is timed only if the losses agree."""

from __future__ import annotations

import contextlib
import gc
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
GRAIN = 64  # tokens: the step of the search for the longest sequence
CHECKED = 512  # tokens per sequence in the fp32 steps whose losses are compared before steps in bf16 are timed


class Training(NamedTuple):
    """DPO with a live reference on one pair, half of each sequence prompt; a Llama of this shape, random weights."""

    vocabulary: int
    width: int
    layers: int
    length: int  # tokens per sequence in the timed step
    memory: int  # bytes that a step may use besides the weights, for the longest sequence
    adapters: bool = False  # LoRA: the head is frozen, the reference is the model without adapters
    heads: tuple[int, int] = (4, 2)  # attention heads, and key-value heads
    intermediate: int | None = None  # width of the MLP; default: 3 times that of the model
    tied: bool = False  # the LM head is the embedding
    bf16: bool = False  # autocast
    longest: int | None = None  # tokens: the limit of the longest sequence; default: 8 times the length
    grain: int = GRAIN
    label: str | None = None

    @property
    def name(self) -> str:
        kind = "lora" if self.adapters else "full"
        return self.label or f"dpo-V{self.vocabulary}-H{self.width}-L{self.layers}-T{self.length}-{kind}"

    @property
    def most(self) -> int:
        return self.longest or 8 * self.length

    @property
    def parameters(self) -> int:
        attention = 2 * self.width**2 * (1 + self.heads[1] / self.heads[0])
        layer = attention + 3 * self.width * (self.intermediate or 3 * self.width)
        return int(self.vocabulary * self.width * (1 if self.tied else 2) + self.layers * layer)


def suite(name: str) -> list[Training]:
    """tiny: for the tests; gpu: the shape of SmolLM2-135M and that of a Llama with 1.2 billion weights."""
    if name == "tiny":
        return [Training(500, 16, 1, 64, 3 << 20)]
    if name == "cpu":
        return [Training(32000, 256, 2, 256, 1 << 29), Training(32000, 256, 2, 256, 1 << 29, adapters=True)]
    more = dict(tied=True, bf16=True, longest=32768, grain=1024)
    return [
        Training(49152, 576, 30, 4096, 24 << 30, heads=(9, 3), intermediate=1536, label="smollm2-135m", **more),
        Training(128256, 2048, 16, 4096, 40 << 30, heads=(32, 8), intermediate=8192, label="llama-1b", **more),
    ]


def absent() -> str | None:
    """Why nothing can be measured, or None."""
    try:
        import trl  # noqa: F401
    except ImportError:
        return "TRL is not installed"
    return None


@contextlib.contextmanager
def provided(provider: str) -> Iterator[None]:
    """TRL without or with the patch."""
    from fused_po import Schedule
    from fused_po.integrations.trl import patched

    schedule = Schedule(logits_budget=0) if provider == "fused_po, none kept" else None
    with contextlib.nullcontext() if provider == "TRL" else patched(schedule):
        yield


def model(case: Training, device: str, seed: int):
    """A Llama of the case's shape, created on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        intermediate_size=case.intermediate or 3 * case.width,
        num_attention_heads=case.heads[0],
        num_key_value_heads=case.heads[1],
        max_position_embeddings=1 << 17,
        tie_word_embeddings=case.tied,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(device)


def dpo_trainer(case: Training, device: str):
    """The trainer, with the same weights in every call."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    args = DPOConfig(
        output_dir=tempfile.gettempdir(),
        report_to=[],
        bf16=case.bf16,
        use_cpu=device == "cpu",
        optim="sgd",
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_length=None,
    )
    more = {"ref_model": None if case.adapters else model(case, device, 1)}
    if case.adapters:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"prompt": "<unk>", "chosen": " <unk>", "rejected": " <unk>"}])
    trainer = DPOTrainer(model(case, device, 0), args=args, train_dataset=rows, processing_class=tokenizer, **more)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def batch(case: Training, length: int, device: str) -> dict[str, torch.Tensor]:
    """A pair as from TRL's collator: chosen, then rejected."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(2, case.vocabulary, (2, length), generator=draw)
    ids[1, : length // 2] = ids[0, : length // 2]
    completion = (torch.arange(length) >= length // 2).long().expand(2, -1)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    return {name: value.to(device) for name, value in made.items()}


def step(trainer, inputs: dict[str, torch.Tensor]) -> float:
    """Forward, backward and optimizer, until the device has finished; returns the loss."""
    trainer.model.train()
    loss = trainer.training_step(trainer.model, dict(inputs))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss.item()


def longest(fits: Callable[[int], bool], most: int, grain: int = GRAIN) -> int:
    """The largest multiple of `grain` up to `most` that fits, or 0. Assumes that shorter ones fit too."""
    low, high = 0, most // grain
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * grain) else (low, middle - 1)
    return low * grain


def peak_within(call: Callable[[], object], memory: int, device: str) -> bool:
    """Whether a call uses at most so many bytes; False if it runs out of memory."""
    try:
        return counting.peak_bytes(call, device) <= memory
    except torch.OutOfMemoryError:
        return False
    finally:
        if device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()


def losses(case: Training, device: str, provider: str) -> list[float]:
    """The losses of two steps on fresh weights; the second depends on the first's gradients."""
    with provided(provider):
        trainer = dpo_trainer(case, device)
        return [step(trainer, batch(case, case.length, device)) for _ in range(2)]


def rounding(case: Training) -> float:
    """The relative rounding of a loss near log 2, from beta times four sums of log-probs near -log V in fp32."""
    return 4 * 0.1 * torch.finfo(torch.float32).eps * case.length / 2 * math.log(case.vocabulary) / math.log(2)


def checked(case: Training) -> Training:
    """The case whose losses are compared: in fp32, and short."""
    return case._replace(bf16=False, length=min(case.length, CHECKED)) if case.bf16 else case


def examine(case: Training, device: str, name: str, trainer, inputs: dict, stock: list[float]) -> dict:
    """A provider without times: how far its losses are from TRL's, peak bytes, longest sequence."""
    alike = checked(case)
    off = max(abs(a - b) / abs(b) for a, b in zip(losses(alike, device, name), stock))
    if not off <= rounding(alike):
        return {"loss off by": off, "wrong": f"losses differ from TRL's by {off:.1e}"}

    def fits(length: int) -> bool:
        trainer.optimizer.zero_grad()  # a step that ran out of memory leaves gradients
        of = batch(case, length, device)
        return peak_within(lambda: step(trainer, of), case.memory, device)

    with provided(name):
        peak = counting.peak_bytes(lambda: step(trainer, inputs), device)
        return {"loss off by": off, "peak bytes": peak, "longest": longest(fits, case.most, case.grain)}


def compare(case: Training, device: str) -> dict[str, dict]:
    """By provider: how far its losses are from TRL's, seconds per step, peak bytes, longest sequence within memory."""
    stock = losses(checked(case), device, "TRL")
    trainer = dpo_trainer(case, device)
    inputs = batch(case, case.length, device)
    reports: dict[str, dict] = {}
    for name in PROVIDERS:
        try:
            reports[name] = examine(case, device, name, trainer, inputs, stock)
        except Exception as error:  # the others still run if one provider fails
            reports[name] = {"wrong": f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}"}
    able = [name for name in PROVIDERS if "wrong" not in reports[name]]
    times: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(ROUNDS):  # in turns, so that drift affects all equally
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
    lines = [f"| {case.name} | s per step | peak MB | {fits} | loss differs by |", "|---|---|---|---|---|"]
    for name, report in reports.items():
        if "wrong" in report:
            lines.append(f"| {name} | | | | **wrong: {report['wrong']}** |")
        else:
            peak, seconds = report["peak bytes"] / 1e6, report["seconds a step"]
            fits = f"{report['longest']}{' or more' * (report['longest'] == case.most)}"
            lines.append(f"| {name} | {seconds:.3f} | {peak:.0f} | {fits} | {report['loss off by']:.0e} |")
    return "\n".join(lines)
