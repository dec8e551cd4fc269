"""The loops of README.md, run as written, on models that scale or cap their logits and on one that does not."""

import re

import pytest
import torch
from repository import ROOT

transformers = pytest.importorskip("transformers")
from tiny_models import MODELS, batch, causal_lm  # noqa: E402

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
FUSED, LINEAR = (next(block for block in BLOCKS if name in block) for name in ("fuse_lm_head(", "linear_dpo("))
NAMES = ("Llama", "Gemma2", "Granite", "Cohere")
BETA, KL_COEF = 0.1, 0.01


@pytest.fixture(params=NAMES)
def problem(request) -> dict:
    """The variables that the README's code expects, in float64."""
    input_ids, labels = batch(3, rows=4)
    models = {
        "policy": causal_lm(request.param, 0).double(),
        "reference": causal_lm(request.param, 1).double().requires_grad_(False),
    }
    return models | {
        "input_ids": input_ids,
        "labels": labels,
        "mask": torch.ones_like(input_ids),
        "name": request.param,
    }


def plain(given: dict, model: str) -> torch.Tensor:
    """Log-probs [2B, T - 1] of the labels from the model's own logits; 0 at ignored tokens."""
    logits = given[model](given["input_ids"], attention_mask=given["mask"]).logits[:, :-1]
    labels = given["labels"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(labels == -100, 0, logps)


def wanted(given: dict, kl_coef: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and its gradients in plain PyTorch."""
    ratios = plain(given, "policy") - plain(given, "reference").detach()
    chosen, rejected = ratios.sum(-1).chunk(2)
    k3 = (torch.exp(-ratios) - 1 + ratios).sum() / (given["labels"][:, 1:] != -100).sum()
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean() + kl_coef * k3
    return loss.detach(), list(torch.autograd.grad(loss, [*given["policy"].parameters()]))


def check(given: dict, loss: torch.Tensor, expected: tuple) -> None:
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-9, atol=1e-12)
    found = [p.grad for p in given["policy"].parameters()]
    for got, want in zip(found, expected[1]):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)


def test_the_measured_head(problem):
    expected = wanted(problem, 0.0)
    exec(FUSED, problem)
    check(problem, problem["loss"], expected)


def test_hidden_states_and_a_head(problem):
    expected = wanted(problem, KL_COEF)
    exec("import torch, fused_po", problem)
    (scale, softcap), code = MODELS[problem["name"]][1], LINEAR
    for said, own in (("logit_scale=1.0,", f"logit_scale={scale},"), ("softcap=None,", f"softcap={softcap},")):
        assert said in code
        code = code.replace(said, own)
    exec(code, problem)
    check(problem, problem["out"].loss, expected)


def test_every_block_is_python():
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        compile(block, "README.md", "exec")


def test_what_the_readme_names_exists():
    import fused_po

    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"fused_po\.([a-z_]+)\(", page):
        assert hasattr(fused_po, name), name
