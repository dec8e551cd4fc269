"""The output of ncu, the sanitizers and a recorded run: goals, table, report, committed results."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from evidence import goals, publish, rows, stages, state, table, tools
from evidence_stand_ins import ABOUT, unit
from numerics import DEVICE, count_launches
from repository import ROOT

from fused_po import selfcheck

# Stand-ins for ncu and the sanitizers, with the output of these programs.

NCU = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
printf '==PROF== Connected\\n"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\\n' > "$2"
printf '"0","statistics_kernel","GPU Speed Of Light","DRAM Throughput","%%","91.5"\\n' >> "$2"
printf '"0","statistics_kernel","GPU Speed Of Light","Elapsed Cycles","cycle","5"\\n' >> "$2"
printf '"1","merge","Occupancy","Achieved Occupancy","%%","48.1"\\n' >> "$2"
"""
SUMMARIES = {
    "========= ERROR SUMMARY: 0 errors": 0,
    "========= ERROR SUMMARY: 3 errors": 3,
    "no summary": None,
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)": 0,
    "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)": 2,
}


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def test_reading_ncu(tmp_path, monkeypatch):
    args = SimpleNamespace(words=["statistics"], device="cuda", suite="tiny")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "ncu", NCU)
    first = {"kernel": "statistics_kernel", "DRAM Throughput": "91.5 %"}
    assert tools.ncu(args) == {"kernels": [first, {"kernel": "merge", "Achieved Occupancy": "48.1 %"}]}
    program(tmp_path, "ncu", NCU.replace("Connected", "ERR_NVGPUCTRPERM"))
    assert "may not read the GPU's counters" in tools.ncu(args)["reason"]
    program(tmp_path, "ncu", "#!/bin/sh\nexit 3\n")
    assert tools.ncu(args)["reason"] == "ncu ended with status 3, 0 kernels profiled"


@pytest.mark.parametrize("line", SUMMARIES)
def test_reading_a_sanitizer(line, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "compute-sanitizer", f"#!/bin/sh\necho '{line}'\n")
    found = tools.sanitizer(SimpleNamespace(words=["memcheck", "parts"], device="cuda", suite="tiny"))
    assert found.get("errors") == SUMMARIES[line]
    assert ("reason" in found) == (SUMMARIES[line] != 0)


@pytest.mark.slow
def test_every_kernel_has_a_sanitized_case(monkeypatch):
    """The Triton kernels that selfcheck and `parts` launch, on a device that splits rows."""
    statistics = importlib.import_module("fused_po.kernels.triton.statistics")
    folder = ROOT / "kernels" / "triton"
    every = {
        name for path in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    if DEVICE == "cpu":
        monkeypatch.setattr(statistics, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(rows, "backend_on", lambda device: "triton")
    groups = [name for name in stages.SANITIZED if name != "parts"]
    with count_launches() as launched:
        rows.parts(SimpleNamespace(device=DEVICE))
        for group in groups:
            for _ in selfcheck.run(selfcheck.Size(64, 37, 8), ("fp32",), DEVICE, 0, "triton", group):
                pass
    assert set(launched) >= every, every - set(launched)


# Goals, table and report, from a recorded run.


def head(width: int, times: float, **case) -> dict:
    """A unit's result for one case: ours takes `times` the bare GEMMs, and TRL takes 1.4 times as long as ours."""
    about = dict(tokens=8192, vocabulary=128256, width=width, dtype="bf16", head="trainable", prompt=0.0, task="logps")
    about |= {"reference": "cached", "direction": "reverse"} | case
    both = {"forward": 1.0, "forward+backward": 1.0}
    mine = {"seconds": both, "times the bare GEMMs": {"forward+backward": times}, "peak bytes": 2e9, "errors": {}}
    theirs = {"seconds": both, "times as long as fused_po": {"forward+backward": 1.4}, "peak bytes": 3e9, "errors": {}}
    return {
        "case": about,
        "providers": {"fused_po": mine, "TRL": theirs, "quack": {"not run": "failed: ImportError: x"}},
    }


def recorded() -> dict:
    """The units of a small recorded run."""
    done = {"attempts": 1, "seconds": 20.0, "expected": 25.0, "code": "one", "reason": None, "status": "done"}
    rows = {"copy, V=500": {"seconds": 1e-3, "GB/s": 3000.0}}
    rows |= {
        n: {"seconds": 1e-3, "GB/s": 2800.0, "share": s, "bytes a logit": 2}
        for n, s in (("statistics, log-probs, V=500", 0.93), ("gradient, all, V=500", 0.91))
    }
    step = {"tokens a second": 9000.0, "peak bytes": 2**30, "longest": 8192}
    training = {
        "label": "llama-1b",
        "vocabulary": 9,
        "width": 8,
        "layers": 1,
        "memory": 2**34,
        "longest": 8192,
        "length": 64,
    }
    results = {
        "tests/logps": {"passed": 3, "skipped": 0, "failed": []},
        "benchmark/rows-bf16": {"rows": rows, "dtype": "bf16"},
        "benchmark/a.main": head(4096, 1.05),
        "benchmark/b.main": head(2048, 1.5),
        "benchmark/c.main": head(4096, 1.04, vocabulary=32000),
        "sanitizer/memcheck-parts": {"errors": 0},
        "step/trl-llama-1b": {"training": training, "reports": {"TRL": step}},
        "ncu/kl": {"kernels": [{"kernel": "kl_kernel", "Duration": "1 us"}]},
    }
    units = {key: done | {"stage": key.split("/")[0], "result": result} for key, result in results.items()}
    missing = {"stage": "ncu", "status": "cannot", "attempts": 0, "reason": "no ncu on PATH"}
    return units | {"ncu/policy": missing}


def test_goals_beside_measurements():
    found = {name: (bound, value, where) for name, bound, value, where in goals.lines(recorded())}
    assert found["statistics kernel, share of copy bandwidth"][1] == "93.0%"
    assert found["gradient kernel, share of copy bandwidth"][1:] == ("91.0%, missed", "gradient, all, V=500")
    assert found["trainable head, fp32 tiles, share of the speed of 3 bare GEMMs"] == (
        "at least 91.0%",
        "95.2%",
        "a.main",
    )  # H >= 3584
    assert (
        found["TRL's time over ours, trainable head"][1] == "1.40" and found["our peak memory over TRL's"][1] == "0.67"
    )
    assert found["errors found by compute-sanitizer"][1] == "0"
    for name in (
        "frozen head, share of the speed of 2 bare GEMMs",
        "time of Liger's scaled cross entropy over ours",
        "trainable head, bf16 tiles, share of the speed of 3 bare GEMMs",
    ):
        assert found[name][1] == "not measured"
    assert all(value == "not measured" for _, _, value, _ in goals.lines({}))


def test_the_table(tmp_path):
    kept = state.State(tmp_path, ABOUT)
    kept.units = recorded()
    units = [unit(key.split("/")[1], stage=key.split("/")[0]) for key in kept.units] + [unit("left")]
    text = table.summary(units, kept, "why it stopped")
    assert re.search(r"^benchmark +4 +0 +0 +1 +80 +100$", text, re.M) and re.search(
        r"^ncu +1 +0 +1 +0 +20 +25$", text, re.M
    )
    assert "gradient kernel, share of copy bandwidth" in text and "91.0%, missed" in text and "why it stopped" in text
    assert "llama-1b" in text and "8192 or more in 16.00 GiB" in text
    assert text.endswith("ncu/policy: not run: no ncu on PATH\npeer quack: failed: ImportError: x")
    assert "with other code than the current" in text
    kept.about = ABOUT | {"rehearsal": True, "evidence": False}
    assert "a rehearsal: no evidence" in table.summary(units, kept, None)


@pytest.fixture
def repository(tmp_path) -> Path:
    """A folder with this repository's README and no results."""
    root = tmp_path / "root"
    (root / "benchmarks" / "results").mkdir(parents=True)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (root / "README.md").write_text(publish.marked(page, publish.NOTHING), encoding="utf-8")
    return root


def written(tmp_path: Path, **about) -> Path:
    out = tmp_path / "OUT"
    out.mkdir(exist_ok=True)
    said = {
        "format": state.FORMAT,
        **ABOUT,
        **about,
        "calls": [{"began": "now", "seconds": 9, "code": "one", "command": "c"}],
    }
    state.write_json(out / f"evidence-{state.slug(said['device'])}.json", said | {"units": recorded()})
    return out


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_publishing_a_run_twice_gives_the_same_results_and_readme(tmp_path, repository):
    out = written(tmp_path)
    publish.publish([out], None, repository)
    folder = repository / "benchmarks" / "results" / "h100"
    assert (folder / "evidence.json").read_bytes() == (out / "evidence-h100.json").read_bytes()
    for name in ("evidence.png", "time.png", "memory.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.md").read_text()
    for text in (
        "# Measured on NVIDIA H100 80GB HBM3\n",
        "91.0%, missed",
        "ncu/policy: not run: no ncu",
        "| kl_kernel | 1 us |",
    ):
        assert text in page
    readme = (repository / "README.md").read_text()
    assert "not measured on a GPU yet" not in readme and "frozen head, share of the speed of 2 bare GEMMs" in readme
    assert "gradient kernel, share of copy bandwidth 91.0%, missed" in readme and "results/h100/evidence.png)" in readme
    assert publish.NOTHING["one-read"] in readme  # not measured: stays
    before = everything(repository)
    said = publish.publish([out], None, repository)
    assert everything(repository) == before and said[-1].endswith("unchanged")


@pytest.mark.parametrize("about", ({"rehearsal": True, "evidence": False}, {"device": "CPU", "evidence": False}))
def test_runs_that_are_not_evidence_are_not_published(about, tmp_path, repository):
    out = written(tmp_path, **about)
    before = everything(repository)
    with pytest.raises(publish.Refused, match="no evidence of a GPU"):
        publish.publish([out], None, repository)
    assert everything(repository) == before
    publish.publish([out], tmp_path / "elsewhere", repository)
    assert everything(repository) == before
    assert "no evidence" in (tmp_path / "elsewhere" / "report.md").read_text().splitlines()[0]


def test_report_py_reads_both_formats_and_refuses_in_one_line(tmp_path):
    out, script = written(tmp_path, rehearsal=True, evidence=False), ROOT / "benchmarks" / "report.py"

    def run(*words):
        return subprocess.run([sys.executable, script, *words], capture_output=True, text=True)

    assert run(out, "-o", tmp_path / "report").returncode == 0 and (tmp_path / "report" / "report.md").exists()
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"format": "fused_po evidence 0"}))
    bad = {out: "a rehearsal: no evidence", tmp_path / "empty": "holds no evidence-", broken: "expected the JSON that"}
    for path, said in bad.items():
        done = run(path)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_readme_matches_the_committed_results():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert publish.marked(page, publish.readme_lines(ROOT / "benchmarks" / "results")) == page
    with pytest.raises(publish.Refused, match="expected one pair of markers"):
        publish.marked("nothing", {"status": ""})


def test_the_makefile_passes_everything_on():
    if shutil.which("make") is None:
        pytest.skip("needs make")
    words = ["OUT=o", "FROM=f", "STAGES=tests ncu", "BUDGET=9", "SUITE=tiny", "RETRY=1", "KEEP_GOING=1", "PLAN=H100"]
    run = ["make", "-n", "gpu-evidence", "NO_VENV=1", "PYTHON=python3", *words]
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=own)
    line = " ".join(done.stdout.splitlines()[-1].split())
    expected = '--out "o" --from "f" --stages "tests ncu" --budget 9 --suite tiny --retry --keep-going --plan H100'
    assert f"python3 benchmarks/evidence {expected}" in line
