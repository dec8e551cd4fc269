"""Trainer's evaluation of a fused model: compute_metrics and preprocess_logits_for_metrics get plain logits."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tiny_models import V, batch, causal_lm

import fused_po
from fused_po.integrations import lazy_logits
from fused_po.integrations.transformers import fuse_lm_head

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture
def made(monkeypatch):
    """Counts how often logits are computed."""
    counts, once = [], lazy_logits._once

    def counted(make):
        def get():
            counts.append(1)
            return make()

        return once(get)

    monkeypatch.setattr(lazy_logits, "_once", counted)
    return counts


def evaluate(model, folder, method="evaluate", args=(), **how):
    rows = [dict(zip(("input_ids", "labels"), (t[0] for t in batch(i, rows=1)))) for i in range(5)]
    arguments = dict(per_device_eval_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True) | dict(args)
    arguments = transformers.TrainingArguments(str(folder), **arguments)
    trainer = transformers.Trainer(model, arguments, eval_dataset=rows, **how)
    return trainer.evaluate() if method == "evaluate" else trainer.predict(rows)


def accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    if isinstance(logits, tuple):  # a mixture of experts has more outputs, in the order of the plain forward
        auxiliary, logits, _ = logits
        assert auxiliary.shape == (3,) and auxiliary.min() > 0
    assert isinstance(logits, np.ndarray) and logits.shape == (5, 12, V) and logits.dtype == np.float32
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != -100)
    return {"accuracy": right.sum() / (labels[:, 1:] != -100).sum(), "mean": logits.mean()}


def model_of(name, fused):
    model = causal_lm(name.split()[0])
    if name.endswith("lora"):
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    return fuse_lm_head(model, always=True) if fused else model


@pytest.mark.parametrize("args", ({}, {"bf16": True}, {"batch_eval_metrics": False, "eval_accumulation_steps": 1}))
@pytest.mark.parametrize("name", ("Llama", "Gemma2", "Cohere", "Llama lora", "Qwen3Moe"))
def test_compute_metrics_gets_logits(name, args, tmp_path):
    stock, ours = (
        evaluate(model_of(name, fused), tmp_path, args=args.items(), compute_metrics=accuracy)
        for fused in (False, True)
    )
    close = dict(rel=2**-7, abs=0.02) if args.get("bf16") else dict(rel=1e-5, abs=1e-6)
    for key in ("eval_loss", "eval_accuracy", "eval_mean"):
        assert ours[key] == pytest.approx(stock[key], **close), key


@pytest.mark.parametrize("name", ("Llama", "Gemma2", "Llama lora"))
def test_predict(name, tmp_path):
    stock, ours = (evaluate(model_of(name, fused), tmp_path, "predict") for fused in (False, True))
    np.testing.assert_allclose(ours.predictions, stock.predictions, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours.label_ids, stock.label_ids)


def test_preprocess_gets_logits(tmp_path):
    def run(fused, how, metrics):
        return evaluate(model_of("Llama", fused), tmp_path, preprocess_logits_for_metrics=how, compute_metrics=metrics)

    def argmax(logits, labels):
        assert isinstance(logits, torch.Tensor) and logits.shape == (*labels.shape, V)
        return logits.argmax(-1)

    def right(prediction):
        return {"n": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).sum())}

    assert run(True, argmax, right)["eval_n"] == run(False, argmax, right)["eval_n"]


def test_preprocessing_statistics_computes_no_logits(made, tmp_path):
    """The stand-in for the logits has the fields of token_stats."""

    def metrics(prediction):
        return {"nll": -prediction.predictions.sum() / (prediction.label_ids[:, 1:] != -100).sum()}

    model = model_of("Llama", True)
    how = dict(compute_metrics=metrics, preprocess_logits_for_metrics=lambda stats, labels: stats.logps)
    evaluate(model, tmp_path, **how)
    evaluate(model, tmp_path)
    evaluate(model, tmp_path, args={"bf16": True}.items())
    assert not made
    evaluate(model, tmp_path, compute_metrics=lambda p: {})
    assert made


def test_evaluation_under_torch_compile(tmp_path):
    torch.compiler.reset()
    args = dict(torch_compile=True, torch_compile_backend="eager").items()
    stock, ours = (
        evaluate(model_of("Llama", fused), tmp_path, args=args, compute_metrics=accuracy) for fused in (False, True)
    )
    for key in ("eval_loss", "eval_accuracy", "eval_mean"):
        assert ours[key] == pytest.approx(stock[key], rel=1e-5, abs=1e-6), key


def test_the_output_of_an_evaluation(made):
    """Statistics and logits without Trainer: logits are computed once, when they are first read."""
    model, (ids, labels) = fuse_lm_head(causal_lm("Gemma2"), always=True), batch(0)
    plain = model(ids, labels=labels, fused=False).logits.detach()
    with torch.no_grad():
        out = model(ids, labels=labels)
        explicit = model(ids, labels=labels, fused=True)
    assert explicit.logits is None and "token_stats" in explicit
    assert torch.equal(out.token_stats.logps, explicit.token_stats.logps) and "token_stats" not in out
    logits = out.logits
    assert logits.shape == plain.shape and logits.dtype == plain.dtype and logits.device == plain.device
    assert logits.detach().float().logps is out.token_stats.logps and len(logits) == len(ids)
    assert not made
    torch.testing.assert_close(logits.argmax(-1), plain.argmax(-1))
    torch.testing.assert_close(logits + 0, plain)
    assert len(made) == 1
    aligned = fused_po.shift_labels(labels)
    torch.testing.assert_close(fused_po.logps_from_logits(logits, aligned).logps, out.token_stats.logps)
    for read in (
        lambda z: z[0, :2],
        lambda z: z.numpy(),
        lambda z: np.asarray(z),
        lambda z: torch.tensor(z.tolist()),
        lambda z: z.contiguous(),
        lambda z: torch.cat([z, z]),
        lambda z: torch.stack(list(z)),
        lambda z: z.cpu().clone(),
        lambda z: z.to(torch.float64),
        lambda z: torch.nn.functional.log_softmax(z, -1),
        lambda z: pickle.loads(pickle.dumps(z)),
        lambda z: copy.deepcopy(z),
        lambda z: z.view(-1, V),
        lambda z: z.is_contiguous(),
        lambda z: z == z,
    ):
        with torch.no_grad():
            fresh = model(ids, labels=labels).logits
        got, expected = read(fresh), read(plain)
        assert type(got) is type(expected)
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-5, atol=1e-6)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        logits.nothing  # noqa: B018


def test_training_computes_no_logits(made):
    model, (ids, labels) = fuse_lm_head(causal_lm("Llama"), always=True), batch(0)
    out = model(ids, labels=labels)
    assert out.logits is None and "token_stats" in out and not made


def test_evaluation_with_a_hook_on_the_head(tmp_path):
    """Logits that were computed for a hook are passed on."""
    results = []
    for fused in (False, True):
        model = model_of("Llama", fused)
        model.lm_head.register_forward_hook(lambda m, args, out: out * 2)
        results.append(evaluate(model, tmp_path, compute_metrics=accuracy))
    for key in ("eval_loss", "eval_accuracy", "eval_mean"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-5, abs=1e-6), key
