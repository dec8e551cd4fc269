"""`make gpu-evidence` without a GPU: killed and resumed runs, budgets, missing programs, wrong usage."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from evidence import publish, runner, state, table
from evidence.stages import STAGES
from evidence_stand_ins import ABOUT, call, unit
from repository import ROOT, SUPPORT


def ran(tmp_path: Path) -> list[str]:
    return (tmp_path / "ran").read_text().split() if (tmp_path / "ran").exists() else []


def status(run: runner.Runner) -> dict[str, str]:
    return {key.split("/")[1]: known["status"] for key, known in run.state.units.items()}


# Killed and resumed.

DRIVER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import test_evidence as t
t.call(Path({folder!r}), [t.unit("first"), t.unit("second", t.WAITS), t.unit("third")])
"""
WAITS = "(here / 'pid').write_text(str(__import__('os').getpid()))\nwhile (here / 'wait').exists(): time.sleep(0.02)"


def killed_while_the_second_runs(tmp_path: Path) -> None:
    (tmp_path / "pid").unlink(missing_ok=True)
    (tmp_path / "wait").touch()
    paths = [str(path) for path in (Path(__file__).parent, SUPPORT, ROOT / "benchmarks")]
    words = DRIVER.format(paths=paths, folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", words], cwd=ROOT)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not alive(child))  # its child processes end with it
    (tmp_path / "wait").unlink()


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_run_loses_only_the_unit_in_flight(tmp_path):
    units = [unit("first"), unit("second", WAITS), unit("third")]
    killed_while_the_second_runs(tmp_path)
    on_disk = state.read_json(tmp_path / "out" / "evidence-h100.json")["units"]
    assert {key: u["status"] for key, u in on_disk.items()} == {
        "benchmark/first": "done",
        "benchmark/second": "running",
    }
    assert on_disk["benchmark/first"]["result"] == {"name": 1.5}
    run, _ = call(tmp_path, units)
    assert status(run) == {"first": "done", "second": "done", "third": "done"}
    assert ran(tmp_path) == ["first", "second", "second", "third"]
    assert run.state.units["benchmark/second"]["attempts"] == 2
    run, said = call(tmp_path, units)
    assert said == [] and len(ran(tmp_path)) == 4  # nothing runs again


def test_a_unit_that_is_killed_twice_is_given_up(tmp_path):
    units = [unit("first"), unit("second", WAITS), unit("third")]
    for _ in range(2):
        killed_while_the_second_runs(tmp_path)
    run, _ = call(tmp_path, units)
    assert ran(tmp_path) == ["first", "second", "second", "third"] and not run.unfinished()
    assert table.troubles(units, run.state) == ["benchmark/second: given up after 2 tries: killed with the runner"]
    run, _ = call(tmp_path, units, retry=True)
    assert (
        status(run) == {"first": "done", "third": "done", "second": "done"} and table.troubles(units, run.state) == []
    )


def test_the_price_of_a_killed_unit_goes_up(tmp_path):
    killed_while_the_second_runs(tmp_path)
    kept = state.State(tmp_path / "out", ABOUT)
    assert kept.units["benchmark/second"]["at_least"] == pytest.approx(0.15)


# Units that fail, hang or do not fit.


def test_failures_are_named_and_rerun_only_on_demand(tmp_path):
    units = [
        unit("good"),
        unit("bad", "print('before'); sys.exit('no such kernel')"),
        unit("nan", "pathlib.Path(result).write_text('{\"x\": NaN}'); sys.exit(0)"),
        unit("signal", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
    ]
    run, said = call(tmp_path, units)
    assert status(run) == {"good": "done", "bad": "failed", "nan": "failed", "signal": "failed"}
    assert table.troubles(units, run.state) == [
        "benchmark/bad: failed: ended with status 1: no such kernel",
        "benchmark/nan: failed: ended with no result: no output",
        "benchmark/signal: failed: ended with signal 11: no output",
    ]
    assert "before" in (tmp_path / "out" / "benchmark.log").read_text() and len(said) == 4
    run, said = call(tmp_path, units)
    assert said == []
    run, said = call(tmp_path, units, retry=True)
    assert len(said) == 3 and ran(tmp_path).count("good") == 1


def test_a_unit_that_hangs_is_ended(tmp_path):
    units = [unit("test", "time.sleep(600)", "tests"), unit("hangs", "time.sleep(600)"), unit("next")]
    run, _ = call(tmp_path, units, patience=0.005, keep_going=True)
    assert status(run) == {"test": "interrupted", "hangs": "failed", "next": "done"}
    assert "its limit" in run.state.units["benchmark/hangs"]["reason"]
    assert ran(tmp_path) == ["test", "test", "hangs", "next"] and run.state.given_up("tests/test")


def test_a_unit_ends_with_its_child_processes():
    words = (
        "import signal, subprocess, sys; from evidence import unit; signal.signal(signal.SIGTERM, unit.end_all)\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); child.wait()"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    how = {"stdout": subprocess.PIPE, "text": True, "env": env, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", words], **how) as process:
        child = int(process.stdout.readline())
        process.terminate()
    until(lambda: not alive(child))


def test_a_unit_begins_only_if_it_fits(tmp_path):
    units = [unit("long", price=100.0), unit("short"), unit("short too")]
    run, _ = call(tmp_path, units, budget=50.0)
    assert ran(tmp_path) == ["short", "short", "too"] and [u.name for u in run.unfinished()] == ["long"]


def test_a_unit_running_at_the_end_is_stopped_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.5)
    units = [unit("slow", "time.sleep(600) if not (here / 'fast').exists() else None")]
    run, _ = call(tmp_path, units, budget=1.0)
    assert status(run) == {"slow": "interrupted"} and len(run.unfinished()) == 1
    assert run.state.units["benchmark/slow"]["at_least"] > 1
    (tmp_path / "fast").touch()
    run, _ = call(tmp_path, units)
    assert status(run) == {"slow": "done"}


def test_a_failed_test_stops_later_stages(tmp_path):
    units = [
        unit("red", "sys.exit(1)", "tests"),
        unit("green", "", "tests"),
        unit("check", "", "selfcheck"),
        unit("case"),
    ]
    run, _ = call(tmp_path, units)
    assert ran(tmp_path) == ["red", "green"]
    assert run.stopped == "tests failed (tests/red): fix it first, or use KEEP_GOING=1"
    run, _ = call(tmp_path, units[2:])  # other stages alone: it is still red
    assert ran(tmp_path) == ["red", "green"]
    run, _ = call(tmp_path, units, keep_going=True)
    assert ran(tmp_path) == ["red", "green", "check", "case"]


def test_later_stages_wait_for_tests_that_do_not_fit(tmp_path):
    units = [unit("long", price=100.0, stage="tests"), unit("case")]
    run, _ = call(tmp_path, units, budget=50.0)
    assert ran(tmp_path) == [] and len(run.unfinished()) == 2


def test_tests_run_side_by_side_and_large_ones_alone(tmp_path):
    meet = (
        "(here / '{}').touch()\nend = time.monotonic() + 60\n"
        "while not (here / '{}').exists():\n    time.sleep(0.02)\n    assert time.monotonic() < end"
    )
    alone = "time.sleep(0.3)\nstate = json.loads((here / 'out' / 'evidence-h100.json').read_text())\n"
    alone += "assert [u['status'] for u in state['units'].values()].count('running') == 1"
    units = [
        unit("large", alone, "tests", alone=True),
        unit("a", meet.format("a", "b"), "tests"),
        unit("b", meet.format("b", "a"), "tests"),
        unit("timed", alone),
        unit("timed2", alone),
    ]
    run, _ = call(tmp_path, units, jobs=4)
    assert set(status(run).values()) == {"done"}, run.state.units


# Missing programs, memory and GPUs.


@pytest.mark.parametrize(
    "needs, said",
    [
        (("nvcc",), "no nvcc on PATH and no CUDA_HOME"),
        (("ncu",), "no ncu on PATH"),
        (("compute-sanitizer",), "no compute-sanitizer on PATH"),
    ],
)
def test_a_missing_program_is_reported_and_the_rest_runs(needs, said, tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    units = [unit("needs it", needs=needs), unit("other")]
    run, lines = call(tmp_path, units)
    assert status(run) == {"needs it": "cannot", "other": "done"} and f"benchmark/needs it: not run: {said}" in lines[0]
    assert table.troubles(units, run.state)[0].startswith(f"benchmark/needs it: not run: {said}")
    program = tmp_path / needs[0]
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    run, _ = call(tmp_path, units)  # available now: no RETRY is needed
    assert status(run) == {"needs it": "done", "other": "done"}


def test_a_card_with_too_little_memory(tmp_path):
    units = [unit("big", memory=60 << 30), unit("small", memory=8 << 30)]
    run, _ = call(tmp_path, units, memory=40 << 30)
    assert status(run) == {"big": "cannot", "small": "done"}
    assert run.state.units["benchmark/big"]["reason"] == "needs 60.0 GiB of GPU memory, this one has 40.0"


def test_a_rehearsal_runs_no_machine_code(tmp_path):
    run, _ = call(tmp_path, [unit("profiled", needs=("GPU",))], real=False)
    assert run.state.units["benchmark/profiled"]["reason"].startswith("a rehearsal or a CPU does not run machine code")


def test_a_damaged_state_is_kept_aside(tmp_path):
    call(tmp_path, [unit("first")])
    path = tmp_path / "out" / "evidence-h100.json"
    for damage in ("{", '{"format": "other"}', '{"format": "fused_po evidence 1", "units": {"a": {}}}', "[1]", "NaN"):
        path.write_text(damage)
        kept = state.State(tmp_path / "out", ABOUT)
        assert kept.units == {} and "cannot be read" in kept.notes[0]
        assert (tmp_path / "out" / "evidence-h100.damaged.json").read_text() == damage


def test_another_gpu_has_its_own_state(tmp_path):
    call(tmp_path, [unit("first")])
    assert state.State(tmp_path / "out", ABOUT | {"device": "NVIDIA H200"}).units == {}
    assert state.slug("NVIDIA H100 (rehearsal)") == "nvidia-h100-rehearsal" and state.slug("NVIDIA L40S") == "l40s"


def test_results_of_an_earlier_folder_are_reused(tmp_path):
    call(tmp_path, [unit("first")])
    new = tmp_path / "new"
    state.open_folder(new, tmp_path / "out")
    assert state.State(new, ABOUT).finished("benchmark/first") and (new / "benchmark.log").exists()
    with pytest.raises(state.Unusable, match=r"FROM: .*nowhere is not a folder"):
        state.open_folder(new, tmp_path / "nowhere")


def test_logs_and_json_have_bounds(tmp_path, monkeypatch):
    state.open_folder(tmp_path / "out", None)
    kept = state.State(tmp_path / "out", ABOUT)
    monkeypatch.setattr(state, "LARGEST", 10_000)
    monkeypatch.setattr(state, "OF_A_UNIT", 4000)
    for number in range(5):
        kept.log("ncu", f"unit {number}", "a" * 3000 + "b" * 3000)
    text = (tmp_path / "out" / "ncu.log").read_text()
    assert "... 2000 bytes left out ..." in text and text.count("this log is full") == 3 and len(text) < 12_000
    state.write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.0]})
    assert state.read_json(tmp_path / "x.json") == {"a": None, "b": [None, 1.0]}


def command_line(*words: str, **variables: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_PO_REHEARSAL")}
    run = [sys.executable, ROOT / "benchmarks" / "evidence", *words]
    return subprocess.run(run, capture_output=True, text=True, env=clean | variables, cwd=ROOT)


def test_wrong_usage_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for words, said in (
        (("--out", str(tmp_path / "file" / "out")), "OUT: .* cannot be written .*name another folder"),
        (("--stages", "tests,everything"), "got everything; allowed are tests, selfcheck"),
        (("--budget", "0"), "expected seconds above 0"),
        (("--plan", "A100"), "invalid choice"),
        (("--device", "cpu"), "cpu works only with --suite tiny"),
        (("--out", str(tmp_path / "o"), "--from", str(tmp_path / "none")), "FROM: .*is not a folder"),
    ):
        done = command_line(*words)
        assert done.returncode == 2 and re.search(said, done.stderr), (words, done.stderr)
    done = command_line("--out", str(tmp_path / "o"), TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_every_stage_reports_it_and_nothing_runs(tmp_path):
    done = command_line("--out", str(tmp_path / "out"))
    assert done.returncode == 1
    for name in STAGES:
        assert f"{name}: not run: no CUDA GPU: torch {torch.__version__}" in done.stdout
    assert "(exit status 1)" in done.stdout.splitlines()[-1] and list((tmp_path / "out").iterdir()) == []


def test_a_dry_run_on_the_cpu_is_no_evidence(tmp_path):
    """The smallest real unit: at first it does not fit in the budget, then it runs."""
    words = ("--device", "cpu", "--suite", "tiny", "--out", str(tmp_path / "out"), "--stages", "selfcheck")
    done = command_line(*words, "--budget", "1")
    assert done.returncode == 3 and "1 left: call it again" in done.stdout, done.stdout + done.stderr
    done = command_line(*words)
    assert done.returncode == 0 and "CPU: no evidence" in done.stdout, done.stdout + done.stderr
    kept = state.read_json(tmp_path / "out" / "evidence-cpu-tiny.json")
    assert kept["units"]["selfcheck/fp32"]["status"] == "done" and kept["evidence"] is False
    assert (tmp_path / "out" / "table.txt").read_text().splitlines()[-1] in done.stdout
    with pytest.raises(publish.Refused, match="no evidence of a GPU; -o FOLDER"):
        publish.publish([tmp_path / "out"], None, tmp_path)


# Tests that have passed are not run again.

SUITE = """
import os, pathlib, pytest
here = pathlib.Path(__file__).parent
def note(name):
    with open(here / "ran", "a") as file: file.write(name + "\\n")
def test_good(): note("good")
def test_bad():
    note("bad")
    assert (here / "fixed").exists()
@pytest.mark.xfail(strict=True)
def test_expected(): note("expected"); assert False
def test_skipped(): note("skipped"); pytest.skip("no")
def test_kills():
    note("kills")
    (here / "fixed").exists() or os._exit(9)
def test_last(): note("last")
"""


def test_the_plugin_records_each_test(tmp_path):
    from evidence.passed import counts, in_shard

    (tmp_path / "test_it.py").write_text(SUITE)
    ended = tmp_path / "ended.jsonl"

    def run(code: str = "one", shard: str = "0/1") -> int:
        env = os.environ | {"EVIDENCE_TESTS": str(ended), "EVIDENCE_CODE": code, "EVIDENCE_SHARD": shard}
        env |= {"PYTHONPATH": str(ROOT / "benchmarks")}
        words = [sys.executable, "-m", "pytest", "-q", "-p", "evidence.passed", "-p", "no:cacheprovider", "test_it.py"]
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True).returncode

    assert run() == 9
    assert counts(ended, ["test_it.py"], "0/1", "one") == {
        "passed": 2,
        "skipped": 1,
        "failed": ["test_it.py::test_bad"],
    }
    (tmp_path / "fixed").touch()
    with open(ended, "a") as file:
        file.write('["passed", "one", "test_it.py::cut')  # a line that was cut off by the kill
        file.write("\n")
    assert run() == 0
    assert ran(tmp_path) == ["good", "bad", "expected", "skipped", "kills", "bad", "kills", "last"]
    assert counts(ended, ["test_it.py"], "0/1", "one") == {"passed": 5, "skipped": 1, "failed": []}
    assert run() == 5  # nothing left to run
    assert {run("other code", f"{part}/2") for part in range(2)} <= {0, 5}
    assert len(ran(tmp_path)) == 14
    assert sum(in_shard(f"test {i}", f"{part}/3") for i in range(30) for part in range(3)) == 30
