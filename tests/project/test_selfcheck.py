"""`python -m fused_po info` and `selfcheck`: right ops pass; wrong ones are found, named and reproducible."""

import inspect
import json
import re

import pytest
import torch

import fused_po
from fused_po import __main__ as command
from fused_po import selfcheck

SMALL = ("selfcheck", "--quick", "--device", "cpu", "--vocab", "211", "--hidden", "16")


def run(capsys, *words) -> tuple[int, str]:
    status = command.main(list(words))
    return status, capsys.readouterr().out


def test_all_ops_are_checked_and_pass(capsys, seed):
    status, out = run(capsys, *SMALL, "--json", "--seed", str(seed))
    found = json.loads(out)
    assert status == 0 and found["failed"] == [], [r for r in found["results"] if not r["passed"]]
    assert all(r["passed"] and 0 <= r["ours"] < 1e-2 and r["plain"] >= 0 for r in found["results"])
    assert {r["dtype"] for r in found["results"]} == {"fp32", "bf16"}
    checked = {r["check"].split(",")[0] for r in found["results"]}
    assert checked == set(command.OPS) <= set(fused_po.__all__)
    functions = {name: getattr(fused_po, name) for name in fused_po.__all__}
    takes_a_backend = {
        name for name, f in functions.items() if inspect.isfunction(f) and "backend" in inspect.signature(f).parameters
    }
    assert checked == takes_a_backend, "selfcheck must cover every op of the package"


@pytest.mark.parametrize(
    "shares, passed",
    [
        ((1.0,), True),
        ((2.1,), False),
        ((float("nan"),), False),
        ((1.5, 0.1, 0.1, 0.1, 0.1), True),
        ((1.5, 9.0, 0.1, 0.1, 0.1), True),
        ((1.5, 0.1, 1.1, 1.1, 0.1), False),
    ],
)
def test_most_problems_decide(shares, passed, monkeypatch):
    """Most of the problems drawn with the next seeds decide; an error beyond twice the bound fails at once."""
    left = list(shares)
    made = lambda check, t, dtype: selfcheck.Result(  # noqa: E731
        "op", dtype, "loss", 1.0, 1.0, left[0], left.pop(0) <= 1
    )
    monkeypatch.setattr(selfcheck, "compare", made)
    drawn = []
    result = selfcheck.judge(None, {}, drawn.append, "fp32")
    assert result.passed == passed and not left and drawn == list(range(1, len(shares)))
    beyond = sum(not share <= 1 for share in shares)
    assert result.note == ("" if len(shares) == 1 else f"beyond its bound in {beyond} of 5 problems")
    line = selfcheck.table([result]).splitlines()[1]
    assert ("FAILED" in line) == (not passed) and result.note in line


def test_a_seed_with_an_unusually_small_error_of_plain_pytorch(capsys):
    """With this seed plain PyTorch's error is a tenth of a rounding on SSE 4; the check must still pass."""
    status, out = run(capsys, *SMALL, "--only", "dpo_from_logits", "--seed", "1178702428")
    assert status == 0, out


@pytest.mark.parametrize("what", ("value", "gradient"))
def test_a_wrong_op_fails_reproducibly(what, capsys, monkeypatch):
    right = fused_po.kl_from_logits

    def wrong(logits, *args, **how):
        stats, noise = right(logits, *args, **how), 1e-3 * logits.nan_to_num(neginf=0).square().mean(-1)
        return stats._replace(kl=stats.kl + (noise.detach() if what == "value" else noise - noise.detach()))

    monkeypatch.setattr(fused_po, "kl_from_logits", wrong)
    status, out = run(capsys, *SMALL, "--dtype", "fp32", "--seed", "5")
    again = [line for line in out.splitlines() if line.startswith("to repeat: ")]
    assert status == 1 and len(again) == 3 and "17 of 20 passed" in out
    assert again[0].endswith("--dtype fp32 --vocab 211 --hidden 16 --seed 5 --only 'kl_from_logits, reverse' --quick")
    words = again[0].removeprefix("to repeat: python -m fused_po ").replace("'kl_from_logits, reverse'", "?").split()
    words[words.index("?")] = "kl_from_logits, reverse"
    status, repeated = run(capsys, *words)
    failed = [line for line in out.splitlines() if line.startswith("kl_from_logits, reverse")]
    assert status == 1 and failed[0].strip() in repeated and "FAILED" in failed[0]
    assert ("kl " if what == "value" else "d logits") in failed[0]


def test_an_op_that_raises_fails_and_the_others_run(capsys, seed, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(fused_po, "gae", broken)
    status, out = run(capsys, *SMALL, "--dtype", "fp32", "--seed", str(seed))
    assert status == 1 and "19 of 20 passed" in out and "FAILED RuntimeError: no kernel image is available" in out


def test_a_progress_bar_on_a_terminal(capsys, monkeypatch):
    assert run(capsys, *SMALL, "--only", "gae")[0] == 0
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert command.main([*SMALL, "--only", "gae"]) == 0
    bar = capsys.readouterr().err
    assert bar.startswith("\r[" + "#" * 15 + "." * 15 + "] 1/2 gae") and "\r[" + "#" * 30 + "] 2/2 gae" in bar
    assert bar.endswith("\n")


def test_infinities_and_nan_do_not_pass():
    t = selfcheck.problem(selfcheck.Size(64, 50, 8), torch.float32, "cpu", 0)
    (check,) = [c for c in selfcheck.checks(None) if c.name == "gae"]
    for bad in (torch.nan, torch.inf):
        spoilt = check._replace(ours=lambda t, bad=bad: {"advantages": check.plain(t)["advantages"] + bad})
        assert not selfcheck.compare(spoilt, t, "fp32").passed
    assert selfcheck.compare(check, t, "fp32").passed


def test_info(capsys, monkeypatch):
    status, out = run(capsys, "info")
    assert status == 0 and f"torch {torch.__version__}" in out and "reference: yes, chosen by backend=None" in out
    assert re.search(r"^  linear_kl +\w+ +\w+ +\w+ +reference$", out, re.M)
    monkeypatch.setattr(command, "version_of", lambda name: None)
    monkeypatch.setenv("FUSED_PO_DEBUG", "1")
    out = run(capsys, "info")[1]
    assert "missing\n" in out and "  trl, for integrations.trl: pip install 'trl>=1.15,<1.17'" in out
    assert "FUSED_PO_DEBUG=1" in out
    found = json.loads(run(capsys, "info", "--json")[1])
    assert set(found) == {"versions", "settings", "devices", "ops", "backends", "missing"} and "cpu" in found["devices"]
    assert set(found["missing"]) == set(command.PACKAGES)
    for device in found["devices"]:
        assert set(found["backends"][device]) == {"fp32", "bf16", "fp16", "fp64"}
        for op, choices in found["ops"][device].items():
            assert op in fused_po.__all__ and choices["fp64"] == "reference"
            assert choices["fp32"] == ("reference" if device == "cpu" else "triton")


def test_info_explains_why_a_gpu_is_not_used(monkeypatch):
    """A GPU with a torch built without CUDA; Triton without the C compiler that it needs for launches."""
    monkeypatch.setattr(command.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert command.missing()["CUDA in torch"].endswith("pip install --force-reinstall torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    assert command.missing()["a C compiler"] == "Triton's launches: apt-get install gcc"
    monkeypatch.setenv("CC", "tcc")
    assert "a C compiler" not in command.missing()


@pytest.mark.parametrize(
    "words, message",
    [
        (("selfcheck", "--vocab", "0"), "argument --vocab: got '0', allowed are integers above 0"),
        (("selfcheck", "--device", "gpu"), "argument --device: got 'gpu', available are "),
        (("selfcheck", "--device", "meta"), "argument --device: got 'meta', available are "),
        (("selfcheck", "--backend", "cud"), "argument --backend: invalid choice: 'cud'"),
        (("selfcheck", "--dtype", "fp8"), "argument --dtype: invalid choice: 'fp8'"),
        ((), "the following arguments are required: command"),
    ],
)
def test_bad_arguments(words, message, capsys):
    with pytest.raises(SystemExit):
        command.main(list(words))
    assert message in capsys.readouterr().err


def test_an_unknown_check(capsys):
    assert command.main([*SMALL, "--only", "cuda"]) == 2
    assert capsys.readouterr() == ("", "error: --only: no check has 'cuda' in its name\n")
