"""docs/bad-calls.md: every call in its tables raises the error and message that the page shows."""

import contextlib
import re
import shlex
import sys
import warnings

import pytest
import torch
from example_runs import ROOT, script

import fused_po

PAGE = (ROOT / "docs" / "bad-calls.md").read_text(encoding="utf-8")
LIBRARY, REST = PAGE.split("\n## Integrations\n")
INTEGRATIONS, COMMANDS = REST.split("\n## Command lines\n")


def rows(text: str) -> list[tuple[str, str]]:
    """(call, error) for the rows of the tables; an … in an error stands for any text."""
    return [(m[2], m[4]) for m in re.finditer(r"^\| (`+)(.+?)\1 \| (`+)(.+?)\3 \|$", text, re.M)]


def block(text: str, language: str) -> str:
    """The first code block in this language."""
    return re.search(rf"^```{language}\n(.*?)^```", text, re.M | re.S)[1]


def table(text: str) -> pytest.MarkDecorator:
    found = rows(text)
    return pytest.mark.parametrize("call, error", found, ids=[call for call, _ in found])


def check(raised: str, error: str) -> None:
    pattern = "".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", error))
    assert re.fullmatch(pattern, raised, re.S), f"raised {raised!r}, but the page has {error!r}"


def fail(call: str, names: dict) -> str:
    with pytest.raises(Exception) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eval(call, names)
    return f"{type(caught.value).__name__}: {caught.value}"


NAMES: dict = {}
exec(block(LIBRARY, "python"), NAMES)


@table(LIBRARY)
def test_calls(call, error):
    check(fail(call, dict(NAMES)), error)


@pytest.fixture(scope="module")
def integrated():
    """The names that the first and the second code block of the page define."""
    pytest.importorskip("transformers")
    pytest.importorskip("trl")
    names = dict(NAMES)
    exec(block(INTEGRATIONS, "python"), names)
    return names


@table(INTEGRATIONS)
def test_integrations(call, error, integrated):
    with contextlib.suppress(ValueError):  # a model that is not fused
        integrated["unfuse_lm_head"](integrated["model"])
    check(fail(call, integrated), error)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create the files of the page's code block in the current folder."""
    for path, text in re.findall(r"^# (\S+)\n(.*?)(?=^# |\Z)", block(COMMANDS, "text"), re.M | re.S):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text.strip())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@table(COMMANDS)
def test_command_lines(call, error, folder, monkeypatch, capsys):
    """Exit status 1, or 2 from argparse, with one line of output and no traceback."""
    name, *words = shlex.split(call)
    monkeypatch.setattr(sys, "argv", [name])
    before = {path.relative_to(folder) for path in folder.glob("**/*")}
    example = script(name.removesuffix(".py"))
    with pytest.raises(SystemExit) as stopped:
        example.train(example.parse(words))
    said = stopped.value.code
    if said == 2:
        said = capsys.readouterr().err.splitlines()[-1].removeprefix(f"{name}: ")
    check(said, error)
    assert not (folder / "ran").exists(), "code from a file was executed"
    left = {path.relative_to(folder).parts[0] for path in folder.glob("**/*")} - {path.parts[0] for path in before}
    assert left <= {"runs", "__pycache__"}


def test_the_page_states_its_number_of_rows():
    counts = [len(rows(text)) for text in (LIBRARY, INTEGRATIONS, COMMANDS)]
    assert f"{sum(counts)} bad calls" in PAGE and counts[0] >= 100 and counts[2] >= 40
    assert len(set(rows(PAGE))) == sum(counts)


def test_good_calls_of_the_same_names():
    names = dict(NAMES)
    for call in (
        "logps_from_logits(logits, labels)",
        "linear_logps(hidden, weight, labels, bias)",
        "dpo_from_logits(logits, labels, ref_logps=logps)",
        "linear_dpo(hidden, weight, labels, ref_logps=summed)",
        "sequence_logps(logps, mask)",
    ):
        eval(call, names)


def test_backends_gives_reasons():
    said = fused_po.backends("cpu", torch.float32)
    assert said["reference"] == "yes, chosen by backend=None"
    assert said["triton"].startswith(("no: ", "yes, by name"))
    assert fused_po.backends("cpu", torch.float64)["triton"].startswith("no: dtype torch.float64")
