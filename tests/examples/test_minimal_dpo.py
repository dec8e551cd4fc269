"""examples/minimal_dpo.py: its output shows learning, and its losses equal those of plain PyTorch."""

import ast
import copy
import re
import runpy
import sys

import pytest
import torch
from repository import ROOT

transformers = pytest.importorskip("transformers")

SCRIPT = ROOT / "examples" / "minimal_dpo.py"
LINE = r"step +(\d+)  loss ([\d.]+)  margin +(\S+)  accuracy (\S+)  held-out margin +(\S+)  accuracy (\S+)"


def ran(monkeypatch, capsys, *arguments: str) -> tuple[dict, list[list[float]]]:
    """(the script's globals at its end, the numbers of each line that it prints)."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    names = runpy.run_path(str(SCRIPT), run_name="__main__")
    return names, [[float(number) for number in re.fullmatch(LINE, line).groups()] for line in printed(capsys)]


def printed(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def plain_loss(model, inputs: dict, labels: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """The DPO loss from full logits."""
    logps = model(**inputs).logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    chosen, rejected = ((logps - ref_logps) * (labels >= 0)).sum(-1).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def test_it_is_short_and_complete():
    source = SCRIPT.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers", "fused_po"}


def test_it_learns_and_its_losses_equal_plain_pytorch(monkeypatch, capsys):
    names, lines = ran(monkeypatch, capsys)
    steps, losses, margins, accuracies, held_out_margins, held_out_accuracies = zip(*lines)
    assert steps == (0, 5, 10, 15, 20, 25, 30)
    assert list(losses) == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]
    for values in (margins, held_out_margins):
        assert values[0] == 0 and list(values) == sorted(values) and values[-1] > 2
    for values in (accuracies, held_out_accuracies):
        assert values[0] == 0 and values[-1] == 1

    policy = copy.deepcopy(names["reference"]).requires_grad_(True)
    with torch.no_grad():
        assert plain_loss(names["policy"], *names["batches"][0]).item() == pytest.approx(
            names["dpo"](*names["batches"][0]).loss.item(), rel=1e-4
        )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=names["lr"])
    plain = []
    for _ in range(11):
        loss = plain_loss(policy, *names["batches"][0])
        plain.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [plain[0], plain[5], plain[10]] == pytest.approx(losses[:3], abs=1e-3)


def test_only_the_answers_are_labels(monkeypatch, capsys):
    names, _ = ran(monkeypatch, capsys)
    inputs, labels, _ = names["batches"][1]
    for number, row in enumerate(labels):
        prompt, *answers = names["PAIRS"][-3:][number % 3]
        end = names["tokenizer"].eos_token
        assert names["tokenizer"].decode(row[row >= 0]) == answers[number // 3] + end
        first = int((row >= 0).nonzero()[0])
        assert names["tokenizer"].decode(inputs["input_ids"][number, : first + 1]) == prompt


def test_a_model_in_a_folder(monkeypatch, capsys, tmp_path):
    tokenizer = transformers.ByT5Tokenizer()
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    names, lines = ran(monkeypatch, capsys, str(tmp_path))
    assert names["policy"].config.hidden_size == 32 and names["lr"] == 1e-5
    assert lines[0][1] == pytest.approx(0.6931) and lines[-1][1] < lines[0][1]
