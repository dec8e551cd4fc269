"""The benchmark suite, tiny: who is right is timed, who is wrong is not, and the figures are what the schedules say."""

import json
import subprocess
import sys
from pathlib import Path

import cases
import measure
import providers
import pytest
import report
import torch
from helpers import DEVICE

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

NAMED = {provider.name: provider for provider in providers.PROVIDERS}
QUICK = [NAMED[name] for name in ("fused_po", "fused_po, none kept", "eager", "TRL")]


@pytest.mark.parametrize("case", cases.suite("tiny"), ids=lambda case: case.name)
def test_every_case_is_right_and_costs_what_its_schedule_says(case):
    p, reports, able = measure.prepare(case, DEVICE, QUICK)
    assert {q.name for q in able} >= {"fused_po", "eager"}
    trainable, live = case.head == "trainable", case.reference == "live"
    expected = {"fused_po": 2 + trainable, "fused_po, none kept": 4}
    everything = 1 if DEVICE == "cuda" else p.labels.numel() / p.scored
    expected |= {"TRL": (3 + trainable) * everything}
    for name, count in expected.items():
        if "GEMMs" in reports[name]:
            scale = everything if name == "TRL" else 1
            assert reports[name]["GEMMs"]["forward+backward"] == pytest.approx(count + live * scale), name
            assert reports[name]["GEMMs"]["forward"] == pytest.approx((1 + live) * scale), name
    turns = measure.Turns(p, able)
    for _ in range(3):
        turns()
    done = measure.finish(reports, turns.medians())
    for q in able:
        assert done[q.name]["seconds"]["forward+backward"] > 0
        assert done[q.name]["peak bytes"] > 0
        assert done[q.name]["times the bare GEMMs"].keys() == {"forward", "forward+backward"}
    assert done["fused_po"]["times as long as fused_po"]["forward"] == 1


def broken(kind):
    """A provider that is a little wrong."""

    def logps(p):
        score = providers.eager(p.hidden, p.weight, p.labels)
        if kind == "log-probs":
            return score + 1e-4
        noise = torch.zeros_like(score).uniform_(-1e-3, 1e-3)
        return score + (score * noise - (score * noise).detach())

    return providers.Provider("broken", lambda p: cases.loss_of(p, logps(p), None), logps)


@pytest.mark.parametrize("kind, field", [("log-probs", "logps_max"), ("gradient", "d_hidden")])
def test_who_is_wrong_is_reported_and_not_timed(kind, field):
    p, reports, able = measure.prepare(cases.suite("tiny")[0], DEVICE, [NAMED["fused_po"], broken(kind)])
    assert [q.name for q in able] == ["fused_po"]
    assert reports["broken"]["wrong"].startswith(field)
    turns = measure.Turns(p, able)
    turns(), turns()
    table = report.case_table(measure.finish(reports, turns.medians()))
    (line,) = (line for line in table.splitlines() if line.startswith("| broken"))
    assert "**wrong: " in line and line.startswith("| broken |  |  |")


def test_who_fails_does_not_take_the_others_along():
    def fail(p):
        raise RuntimeError("no such kernel")

    _, reports, able = measure.prepare(
        cases.suite("tiny")[0], DEVICE, [NAMED["fused_po"], providers.Provider("failing", fail)]
    )
    assert [q.name for q in able] == ["fused_po"]
    assert "RuntimeError" in reports["failing"]["not run"] and "no such kernel" in reports["failing"]["not run"]


def test_the_truth_is_float64s(seed):
    """The closed forms of `exact` against autograd through float64 logits."""
    for case in (cases.Case(40, 90, 8, prompt=0.25), cases.Case(40, 90, 8, task="dpo", reference="live")):
        p = cases.problem(case, DEVICE)
        truth = cases.exact(p)
        h, w = (t.detach().double().requires_grad_() for t in (p.hidden, p.weight))

        def logps(hidden, weight, labels=p.labels):
            picked = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
            return torch.where(labels == cases.IGNORE, 0, picked)

        ref = None if p.ref_hidden is None else logps(p.ref_hidden.double(), p.ref_weight.double())
        mine = logps(h, w)
        d_hidden, d_weight = torch.autograd.grad(cases.loss_of(p, mine, ref), (h, w))
        torch.testing.assert_close(truth.logps, mine.detach().flatten()[truth.rows])
        torch.testing.assert_close(truth.d_hidden, d_hidden.flatten(0, -2)[truth.rows])
        torch.testing.assert_close(truth.d_weight, d_weight[truth.columns])


def test_suite_and_report_end_to_end(tmp_path):
    """`pytest benchmarks --suite tiny` and benchmarks/report.py, as `make bench` runs them."""
    results = tmp_path / "head.json"
    run = [sys.executable, "-m", "pytest", BENCHMARKS / "test_head.py", "--suite", "tiny", "-p", "no:cacheprovider"]
    choice = ["-k", "logps and trainable", f"--benchmark-json={results}"]
    done = subprocess.run([*run, *choice], capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    text = results.read_text(encoding="utf-8")
    assert str(BENCHMARKS.parent) not in json.dumps([b["extra_info"] for b in json.loads(text)["benchmarks"]])
    assert "node" not in json.loads(text)["machine_info"]
    output = tmp_path / "report"
    script = [sys.executable, BENCHMARKS / "report.py"]
    subprocess.run([*script, results, "-o", output], check=True, capture_output=True)
    page = (output / "report.md").read_text(encoding="utf-8")
    for name in (*NAMED, "bare GEMMs"):
        assert f"| {name} |" in page
    for name in (n for n, q in NAMED.items() if q.absent()):
        assert f"not run: {NAMED[name].absent()}" in page
    for picture in ("time.png", "memory.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")

    (tmp_path / "other.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "empty.json").write_text('{"benchmarks": []}', encoding="utf-8")
    bad = {"missing.json": "No such file", "other.json": "expected the JSON", "empty.json": "holds no benchmark"}
    for name, message in bad.items():
        failed = subprocess.run([*script, tmp_path / name], capture_output=True, text=True)
        assert failed.returncode == 2
        assert message in failed.stderr and len(failed.stderr.splitlines()) == 1


def test_suites_name_what_the_readme_promises():
    gpu = {(c.tokens, c.vocabulary, c.width) for c in cases.suite("gpu")}
    promised = {(8192, 32000, 4096), (8192, 128256, 4096), (16384, 151936, 3584), (8192, 262144, 2560)}
    assert gpu == promised | {(32768, 128256, 2048)}
    for field, values in (("head", {"trainable", "frozen"}), ("prompt", {0.0, 0.5}), ("reference", {"cached", "live"})):
        assert {getattr(case, field) for case in cases.suite("gpu")} == values
    assert cases.Case(2048, 32000, 896) in cases.suite("cpu")
