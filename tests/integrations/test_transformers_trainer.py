"""`fuse_lm_head` in training: Trainer, gradient checkpointing, torch.compile, device_map."""

import pytest
import torch
import torch._dynamo.testing
from numerics import assert_error, assert_with_runs, nudge
from tiny_models import batch, causal_lm

from fused_po.integrations.transformers import fuse_lm_head

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")


def train(model, folder, **more):
    """(losses of 5 steps, weights) of Trainer on 20 sequences, with Trainer's own loss."""
    rows = [dict(zip(("input_ids", "labels"), (t[0] for t in batch(i, rows=1)))) for i in range(20)]
    for i, row in enumerate(rows):  # so that the mean over a step is not the mean over its micro-batches' means
        row["labels"] = row["labels"].masked_fill(torch.arange(12) < i % 9, -100)
    how = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, learning_rate=0.5)
    how |= dict(optim="sgd", logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    arguments = transformers.TrainingArguments(str(folder), **how | more)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:6])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses.append(trainer.evaluate()["eval_loss"])
    return torch.tensor(losses, dtype=torch.float64), {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ("Llama", "Qwen3Moe"))
def test_trainer_trains_alike_stock_and_fused(name, tmp_path):
    """5 steps of two micro-batches: the errors of losses and weights are bounded by those of stock runs."""
    exact = train(causal_lm(name).double(), tmp_path)
    ours = train(fuse_lm_head(causal_lm(name), always=True), tmp_path)
    start = dict(causal_lm(name).named_parameters())
    eps = torch.finfo(torch.float32).eps
    assert len(ours[0]) == 6
    for key, value in exact[1].items():
        assert (value - start[key]).abs().max() > 1e-6, f"{key} did not learn"

    def stock_run(seed: int):
        model = causal_lm(name)
        nudge(seed, model)
        return train(model, tmp_path)

    def check(stock: list) -> None:
        for i, loss in enumerate(exact[0].tolist()):
            assert_error(f"loss {i}", abs(ours[0][i] - loss), [abs(run[0][i] - loss) for run in stock], eps * loss)
        for key, value in exact[1].items():
            error, *theirs = ((run[1][key] - value).abs().max().item() for run in (ours, *stock))
            assert_error(key, error, theirs, eps * value.abs().max().item())

    assert_with_runs(stock_run, check)


def test_trainer_under_autocast_with_lora_on_the_head(tmp_path):
    """bf16 autocast: accelerate wraps the forward and converts its outputs."""
    runs = []
    for fused in (False, True):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
        torch.manual_seed(0)
        model = peft.get_peft_model(causal_lm("Llama"), config)
        if fused:
            fuse_lm_head(model, always=True)
        runs.append(train(model, tmp_path, bf16=True))
    (stock, _), (ours, weights) = runs
    torch.testing.assert_close(ours, stock, rtol=2**-7, atol=0)
    assert any((w != 0).any() for n, w in weights.items() if "lm_head.lora_B" in n)


def test_gradient_checkpointing_changes_nothing():
    plain, model = (fuse_lm_head(causal_lm("Llama")).train() for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, labels = batch(0)
    for m in (plain, model):
        m(ids, labels=labels, fused=True).loss.backward()
    for a, b in zip(plain.parameters(), model.parameters()):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", ("Llama", pytest.param("Gemma2", marks=pytest.mark.slow), "lora"))
def test_compile_fullgraph(name):
    """One graph, equal results, and no recompilation for another batch of the same shape."""
    model = causal_lm("Llama" if name == "lora" else name)
    if name == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
        model = model.eval().get_base_model()
    fuse_lm_head(model)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(2):
        ids, labels = batch(seed)
        results = []
        for m in (model, compiled):
            model.zero_grad()
            out = m(ids, labels=labels, fused=True, outputs=("entropy",))
            (out.loss + out.token_stats.entropy.sum()).backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append([out.loss.detach(), *out.token_stats[:2], *grads])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("first", ("fuse", "dispatch"))
@pytest.mark.parametrize("how", ("device_map", "offload"))
def test_accelerate_hooks(how, first):
    """The hooks of device_map run; offloaded weights, including the head's, are loaded only while they are needed."""
    ids, labels = batch(0)
    model, plain = causal_lm("Llama"), causal_lm("Llama")
    if first == "fuse":
        fuse_lm_head(model)
    if how == "device_map":
        model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        model = accelerate.cpu_offload(model, torch.device("cpu"))
        assert model.lm_head.weight.is_meta
    if first == "dispatch":
        fuse_lm_head(model)
    with torch.no_grad():
        ours = model(ids, labels=labels, fused=True).loss
    torch.testing.assert_close(ours, plain(ids, labels=labels).loss)
    assert model.lm_head.weight.is_meta == (how == "offload")
