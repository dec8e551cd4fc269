"""`python -m fused_po`: units, terminal widths, closed streams, encodings, backends that do not run."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from repository import ROOT

import fused_po
from fused_po import __main__ as command
from fused_po.planner.command import LARGEST, count, fitted, size

PLAN = ("plan", "--vocab", "32000", "--hidden", "2048", "--tokens", "64")
QUICK = ("selfcheck", "--quick", "--device", "cpu", "--vocab", "99", "--hidden", "8", "--only", "gae")
HERE = [sys.executable, "-m", "fused_po"]


def outside(words, **how) -> subprocess.CompletedProcess:
    """Run the command in its own process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | how.pop("env", {})
    return subprocess.run([*HERE, *words], capture_output=True, text=True, timeout=240, cwd=ROOT, env=env, **how)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1", 1),
        ("2k", 2000),
        ("2K", 2000),
        ("2Ki", 2048),
        ("1.5M", 1500000),
        ("1e6", 10**6),
        ("0.5Ki", 512),
        ("9007199254740993", 9007199254740993),
        (str(LARGEST), LARGEST),
        (" 7 ", 7),
    ],
)
def test_counts(text, value):
    assert count(text) == value


@pytest.mark.parametrize("text, value", [("4GiB", 2**32), ("4e9", 4 * 10**9), ("0.5 kb", 500), ("1e0", 1), ("3B", 3)])
def test_sizes(text, value):
    assert size(text) == value


NONSENSE = ["", " ", "-1", "1e400", "1e99", "nan", "inf", "0x10", "1_000", "1,000", "two", "2kk", "k", "1e-3", "9" * 40]


@pytest.mark.parametrize("text", [*NONSENSE, "0", "1.5", "2kB", "4GiB"])
def test_bad_counts(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"^got '.*', allowed are integers above 0, such as 2048, 2k"):
        count(text)


@pytest.mark.parametrize("text", [*NONSENSE, "4G", "4k", "1e19", "1GiBB"])
def test_bad_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"^got '.*', allowed are bytes such as 0, 512MiB"):
        size(text)


def test_units_reach_the_plan(capsys):
    found = []
    for tokens, budget in (("2k", "1GiB"), ("2000", str(2**30)), ("2e3", "1073741824B")):
        assert command.main([*PLAN[:-1], tokens, "--budget", budget, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2] and found[0]["work"]["tokens"] == 4000


def test_the_largest_numbers_are_planned_or_refused(capsys):
    for words in (("--tokens", str(LARGEST)), ("--hidden", str(LARGEST)), ("--vocab", str(LARGEST), "--tp", "4096")):
        status = command.main([*PLAN, *words, "--json"])
        out, err = capsys.readouterr()
        assert status == 1 and "Infinity" not in out and json.loads(out)["fits"] is False and err == ""


@pytest.mark.parametrize("words", [(), ("--json",)])
@pytest.mark.parametrize(
    "backend, reason",
    [("cuda", "the CUDA kernels run on NVIDIA GPUs"), ("triton", None), ("reference", None)],
)
def test_a_backend_that_does_not_run_is_one_error(backend, reason, words, capsys, monkeypatch):
    if reason is None:
        reason = "no compiler"
        monkeypatch.setattr(command.backends, "unsupported", lambda *_: reason)
    status = command.main([*QUICK, "--backend", backend, *words])
    out, err = capsys.readouterr()
    assert status == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: --backend: '{backend}' does not run on cpu: ") and reason in err
    assert out == "" if not words else json.loads(out) == {"error": err.removeprefix("error: ").rstrip("\n")}


def test_a_backend_that_supports_one_dtype_is_checked(capsys, monkeypatch):
    served = command.backends.unsupported
    refused = torch.bfloat16
    monkeypatch.setattr(command.backends, "unsupported", lambda n, d, t: "none" if t == refused else served(n, d, t))
    status = command.main([*QUICK, "--backend", "reference", "--json"])
    out, err = capsys.readouterr()
    assert len(json.loads(out)["results"]) == 2 and err == "" and status in (0, 1)


def test_results_that_are_not_finite_are_valid_json(capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(fused_po, "gae", broken)
    assert command.main([*QUICK, "--json"]) == 1

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert {row["ours"] for row in found["results"]} == {None}


def test_a_refused_plan_is_json_too(capsys):
    assert command.main(["plan", "--tokens", "8", "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == f"error: {json.loads(out)['error']}\n" and err.startswith("error: --model: missing")


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"fused_po {fused_po.__version__}\n"


@pytest.mark.parametrize("words", [(), ("info",), ("selfcheck",), ("plan",)])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([*words, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and out.startswith("usage: python -m fused_po")


@pytest.mark.parametrize(
    "words, message",
    [
        (("inof",), "invalid choice: 'inof'"),
        (("plan", "--tokens", "-5"), "argument --tokens: got '-5', allowed are integers above 0"),
        (("selfcheck", "--seed", "-1"), "argument --seed: got '-1', allowed are integers from 0 to"),
        (("selfcheck", "--seed", "9" * 30), "argument --seed: got '999"),
        (("selfcheck", "--seed", "x"), "argument --seed: got 'x', allowed are integers"),
    ],
)
def test_bad_flags(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(list(words))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


LINE = "  triton: no: " + "a reason with words " * 10 + "end"


@pytest.mark.parametrize("columns", [40, 80, 5, 1000])
def test_lines_are_wrapped_at_the_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = f"{LINE}\n\nto repeat: {LINE}\n| a    table |"
    wrapped = fitted(text).split("\n")
    assert all(len(line) <= max(40, columns) for line in wrapped if not line.startswith("to repeat: "))
    assert f"to repeat: {LINE}" in wrapped and wrapped[-1] == "| a    table |" and "" in wrapped
    assert " ".join(" ".join(wrapped).split()) == " ".join(text.split())
    assert all(line.startswith("    ") for line in wrapped[1 : wrapped.index("")])


def test_piped_output_keeps_its_lines(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert fitted(LINE) == LINE


@pytest.mark.parametrize("words", [("info",), (*PLAN,), (*QUICK,)], ids=lambda words: words[0])
def test_every_text_fits_a_narrow_terminal(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    command.main([*words, *(["--seed", "1"] if words[0] == "selfcheck" else [])])
    wide = [line for line in capsys.readouterr().out.splitlines() if len(line) > 60]
    assert all(" " not in line.strip() for line in wide)  # a single long word is not cut


SLOW_STARTS = {
    "head closes the pipe": ("info --json", "| head -c 1", (0, 141)),
    "help into a closed pipe": ("plan --help", "| true", (0, 141)),
    "stdout closed": ("info", ">&-", (0,)),
    "stderr closed": ("plan --vocab 9 --hidden 9 --tokens 9", "2>&-", (0,)),
    "stdin closed": ("info", "<&-", (0,)),
    "a full disk": ("info --json", "> /dev/full", (1,)),
}


@pytest.mark.parametrize("name", SLOW_STARTS)
def test_streams(name):
    words, rest, statuses = SLOW_STARTS[name]
    if "/dev/full" in rest and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    line = f"{sys.executable} -m fused_po {words} {rest}; echo status ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=240, cwd=ROOT)
    status = int(re.search(r"status (\d+)$", ran.stdout.strip())[1])
    assert status in statuses
    assert "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr and "BrokenPipe" not in ran.stderr
    if rest == "> /dev/full":
        assert ran.stderr == "error: cannot write the output: No space left on device\n"


def test_names_outside_the_encoding(tmp_path):
    folder = tmp_path / "modèle"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 100, "hidden_size": 8}')
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "NO_COLOR": "1"}
    ran = outside(["plan", "--model", str(folder), "--tokens", "8"], env=env)
    assert ran.returncode == 0 and "mod\\xe8le" in ran.stdout and ran.stderr == ""
