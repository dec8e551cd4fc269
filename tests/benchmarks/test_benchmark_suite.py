"""The tiny benchmark suite: right results are timed, wrong ones are not, and figures match the schedules."""

import json
import os
import subprocess
import sys

import cases
import counting
import kl_providers
import measure
import providers
import pytest
import report
import torch
from numerics import DEVICE
from repository import ROOT

BENCHMARKS = ROOT / "benchmarks"

NAMED = {provider.name: provider for provider in providers.PROVIDERS}
QUICK = [NAMED[name] for name in ("fused_po", "fused_po, none kept", "eager", "TRL")]
KL_NAMED = {provider.name: provider for provider in kl_providers.KL_PROVIDERS}
KL_QUICK = [KL_NAMED[name] for name in ("fused_po", "fused_po, none kept", "fused_po, with log-probs", "eager", "TRL")]


def with_gradient(p: cases.Problem) -> int:
    """The number of tokens whose log-prob has a gradient."""
    if p.case.task != "grpo":
        return p.scored
    values = NAMED["eager"].values(p).detach().view(p.labels.shape).requires_grad_()
    (grad,) = torch.autograd.grad(cases.loss_of(p, values), values)
    return int((grad != 0).sum())


@pytest.mark.parametrize("case", cases.suite("tiny"), ids=lambda case: case.name)
def test_every_case_is_right_and_costs_what_its_schedule_predicts(case):
    p, reports, able = measure.prepare(case, DEVICE, QUICK)
    assert {q.name for q in able} >= {"fused_po", "eager"}
    trainable, live = case.head == "trainable", case.reference == "live"
    share = with_gradient(p) / p.scored  # our op runs no backward for clipped tokens of GRPO
    expected = {"fused_po": 1 + (1 + trainable) * share, "fused_po, none kept": 1 + 3 * share}
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


@pytest.mark.parametrize("case", cases.kl_suite("tiny"), ids=lambda case: case.name)
def test_every_kl_is_right_and_costs_what_its_schedule_predicts(case):
    p, reports, able = measure.prepare(case, DEVICE, KL_QUICK)
    assert {q.name for q in able} >= {"fused_po", "fused_po, with log-probs", "eager"}
    trainable = case.head == "trainable"
    everything = 1 if DEVICE == "cuda" else p.labels.numel() / p.scored
    scores = 4 if case.direction == "js" else 2  # for the mixture TRL makes one more pass over both sides' scores
    expected = {"fused_po": (2, 3 + trainable), "fused_po, none kept": (2, 6), "fused_po, with log-probs": (2, 4)}
    expected["TRL"] = (scores * everything, (scores + 3 + trainable) * everything)
    for name, counts in expected.items():
        if "GEMMs" in reports[name]:
            assert [*reports[name]["GEMMs"].values()] == pytest.approx(counts), name
    floor = measure.Ceilings(p)
    with counting.FlopCounter() as count:
        floor(2 + trainable)
    assert count.flops == 2 * p.scored * case.width * case.vocabulary * (3 + trainable)
    turns = measure.Turns(p, able)
    turns(), turns()
    done = measure.finish(reports, turns.medians())
    for q in able:
        assert done[q.name]["seconds"]["forward+backward"] > 0 and done[q.name]["peak bytes"] > 0


@pytest.mark.parametrize("kind, field", [("KL", "value_max"), ("gradient", "d_hidden"), ("direction", "value_max")])
def test_a_wrong_kl_is_reported_and_not_timed(kind, field):
    case = cases.kl_suite("tiny")[0]

    def values(p):
        of = p._replace(case=case._replace(direction="forward")) if kind == "direction" else p
        kl = KL_NAMED["eager"].values(of)
        noise = torch.zeros_like(kl).uniform_(-1e-3, 1e-3) if kind == "gradient" else torch.zeros_like(kl)
        return kl + (kl * noise - (kl * noise).detach()) + 1e-4 * (kind == "KL")

    wrong = providers.Provider("broken", **kl_providers.from_values(values))
    _, reports, able = measure.prepare(case, DEVICE, [KL_NAMED["fused_po"], wrong])
    assert [q.name for q in able] == ["fused_po"]
    assert reports["broken"]["wrong"].startswith(field)
    assert "**wrong: " in report.case_table(reports, "kl") and "| KL error |" in report.case_table(reports, "kl")


def test_all_providers_compute_the_same_divergence():
    """Without an error bound, so that the direction of the KL is tested even if a peer's rounding is refused."""
    for case in (c for c in cases.kl_suite("tiny") if c.head == "trainable"):
        p = cases.problem(case, DEVICE)
        truth = cases.exact(p)
        for q in KL_QUICK:
            if q.absent() is not None:
                continue
            try:
                values = q.values(p)
            except NotImplementedError:  # in a rehearsal a peer's kernel may fail in Triton's interpreter
                continue
            torch.testing.assert_close(values[truth.rows].double(), truth.values, rtol=1e-4, atol=1e-5)
        assert truth.values.min() > 0


def broken(kind):
    """A provider with a small error."""

    def logps(p):
        score = providers.eager(p.hidden, p.weight, p.labels)
        if kind == "log-probs":
            return score + 1e-4
        noise = torch.zeros_like(score).uniform_(-1e-3, 1e-3)
        return score + (score * noise - (score * noise).detach())

    return providers.Provider("broken", lambda p: cases.loss_of(p, logps(p), None), logps)


@pytest.mark.parametrize("kind, field", [("log-probs", "value_max"), ("gradient", "d_hidden")])
def test_wrong_providers_are_reported_and_not_timed(kind, field):
    p, reports, able = measure.prepare(cases.suite("tiny")[0], DEVICE, [NAMED["fused_po"], broken(kind)])
    assert [q.name for q in able] == ["fused_po"]
    assert reports["broken"]["wrong"].startswith(field)
    turns = measure.Turns(p, able)
    turns(), turns()
    table = report.case_table(measure.finish(reports, turns.medians()))
    (line,) = (line for line in table.splitlines() if line.startswith("| broken"))
    assert "**wrong: " in line and line.startswith("| broken |  |  |")


def test_a_failing_provider_does_not_stop_the_others():
    def fail(p):
        raise RuntimeError("no such kernel")

    _, reports, able = measure.prepare(
        cases.suite("tiny")[0], DEVICE, [NAMED["fused_po"], providers.Provider("failing", fail)]
    )
    assert [q.name for q in able] == ["fused_po"]
    assert "RuntimeError" in reports["failing"]["not run"] and "no such kernel" in reports["failing"]["not run"]


def test_exact_values_against_float64_autograd(seed):
    """The closed forms of `exact` against autograd through float64 logits."""
    small = cases.Case(40, 90, 8, prompt=0.25)
    live = [small._replace(task=task, reference="live") for task in ("dpo", "kto")]
    for case in (small, *live, small._replace(task="grpo")):
        p = cases.problem(case, DEVICE)
        truth = cases.exact(p)
        h, w = (t.detach().double().requires_grad_() for t in (p.hidden, p.weight))

        def logps(hidden, weight, labels=p.labels):
            picked = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
            return torch.where(labels == cases.IGNORE, 0, picked)

        ref = None if p.ref_hidden is None else logps(p.ref_hidden.double(), p.ref_weight.double())
        mine = logps(h, w)
        d_hidden, d_weight = torch.autograd.grad(cases.loss_of(p, mine, ref), (h, w))
        torch.testing.assert_close(truth.values, mine.detach().flatten()[truth.rows])
        torch.testing.assert_close(truth.d_hidden, d_hidden.flatten(0, -2)[truth.rows])
        torch.testing.assert_close(truth.d_weight, d_weight[truth.columns])


def test_exact_kl_against_its_definition(seed):
    """`exact`, which works in blocks of rows and columns, against the definition with full float64 probabilities."""
    for direction in ("reverse", "forward", "js"):
        p = cases.problem(cases.Case(300, 90, 8, prompt=0.25, task="kl", reference="live", direction=direction), DEVICE)
        truth = cases.exact(p)
        h, w = (t.detach().double().requires_grad_() for t in (p.hidden, p.weight))
        ref = p.ref_hidden.double(), p.ref_weight.double()
        policy, reference = (h @ w.T).softmax(-1), (ref[0] @ ref[1].T).softmax(-1)
        if direction == "js":
            mixed = cases.JS_WEIGHT * reference + (1 - cases.JS_WEIGHT) * policy
            of = ((cases.JS_WEIGHT, reference, mixed), (1 - cases.JS_WEIGHT, policy, mixed))
        else:
            of = ((1, policy, reference) if direction == "reverse" else (1, reference, policy),)
        kl = sum(share * (a * (a / b).log()).sum(-1) for share, a, b in of) * (p.labels != cases.IGNORE)
        d_hidden, d_weight = torch.autograd.grad(cases.loss_of(p, kl), (h, w))
        torch.testing.assert_close(truth.values, kl.detach()[truth.rows])
        torch.testing.assert_close(truth.d_hidden, d_hidden[truth.rows])
        torch.testing.assert_close(truth.d_weight, d_weight[truth.columns])


def test_suite_and_report_end_to_end(tmp_path):
    """`pytest benchmarks --suite tiny` and benchmarks/report.py, as `make bench` runs them."""
    results = tmp_path / "head.json"
    files = [BENCHMARKS / "test_head.py", BENCHMARKS / "test_kl.py"]
    run = [sys.executable, "-m", "pytest", *files, "--suite", "tiny", "-p", "no:cacheprovider"]
    choice = ["-k", "(logps and trainable) or forward", f"--benchmark-json={results}"]
    # under this flag nothing is timed
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run([*run, *choice], capture_output=True, text=True, cwd=BENCHMARKS.parent, env=alone)
    assert done.returncode == 0, done.stdout[-3000:]
    text = results.read_text(encoding="utf-8")
    assert str(BENCHMARKS.parent) not in json.dumps([b["extra_info"] for b in json.loads(text)["benchmarks"]])
    assert "node" not in json.loads(text)["machine_info"]
    output = tmp_path / "report"
    script = [sys.executable, BENCHMARKS / "report.py"]
    subprocess.run([*script, results, "-o", output], check=True, capture_output=True)
    page = (output / "report.md").read_text(encoding="utf-8")
    head, kl = page.split("## tokens 96, vocabulary 500, width 32, dtype fp32, head trainable, prompt 0.5, task kl")
    for section, names in ((head, NAMED), (kl, KL_NAMED)):
        for name in (*names, "bare GEMMs"):
            assert f"| {name} |" in section
    assert "the head and the exact KL" in head and kl.startswith(", direction forward") and "direction" not in head
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


def test_suites_include_the_documented_cases():
    gpu = {(c.tokens, c.vocabulary, c.width) for c in cases.suite("gpu")}
    promised = {(8192, 32000, 4096), (8192, 128256, 4096), (16384, 151936, 3584), (8192, 262144, 2560)}
    assert gpu == promised | {(32768, 128256, 2048)}
    for field, values in (("head", {"trainable", "frozen"}), ("prompt", {0.0, 0.5}), ("reference", {"cached", "live"})):
        assert {getattr(case, field) for case in cases.suite("gpu")} == values
    assert cases.Case(2048, 32000, 896) in cases.suite("cpu")
    for field, values in (("head", {"trainable", "frozen"}), ("direction", {"reverse", "js"})):
        assert {getattr(case, field) for case in cases.kl_suite("cpu")} == values
    assert {(c.tokens, c.vocabulary, c.width) for c in cases.kl_suite("gpu")} >= {(8192, 151936, 4096)}
    assert {case.direction for case in cases.kl_suite("gpu")} == {"reverse", "forward", "js"}
