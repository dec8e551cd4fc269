"""The table of launch shapes: every candidate gives the same results and compiles without spills; grid limits."""

import importlib
import json
import os
import subprocess
import sys

import launch_shapes
import pytest
import torch
from numerics import BACKENDS, DEVICE
from repository import ROOT

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
launch = importlib.import_module("fused_po.kernels.triton.launch") if "triton" in BACKENDS else None


def every_candidate():
    return [(kernel, shape) for kernel in launch_shapes.CANDIDATES for shape in launch_shapes.candidates(kernel)]


@needs_triton
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bf16", "fp32"))
@pytest.mark.parametrize("kernel", launch_shapes.CANDIDATES)
def test_every_candidate_computes_the_right_numbers(kernel, dtype, poison):
    """Rows of several blocks with any alignment; on a GPU the program makes this check before it times candidates."""
    for shape in launch_shapes.candidates(kernel):
        with launch_shapes.entry(kernel, shape):
            fault = launch_shapes.wrong(launch_shapes.problem(kernel, 2, 17003, dtype, DEVICE))
        assert fault is None, (shape, fault)


@needs_triton
def test_a_wrong_result_is_found():
    one = launch_shapes.problem("gradient", 2, 300, torch.float32, DEVICE)
    assert launch_shapes.wrong(one) is None
    for change in (1e-3, torch.nan):
        assert launch_shapes.wrong(one._replace(results=lambda c=change: one.results() + c)) is not None


@needs_triton
def test_every_kernel_of_the_table_has_candidates_and_every_entry_is_a_shape():
    assert set(launch.SHAPES) == set(launch_shapes.CANDIDATES)
    for kernel, shape in every_candidate():
        assert shape.block & (shape.block - 1) == 0 and shape.block >= 256, (kernel, shape)
        assert shape.warps & (shape.warps - 1) == 0 and 1 <= shape.warps <= 32, (kernel, shape)
        assert shape.block >= 32 * shape.warps, (kernel, shape)
    for entries in launch.SHAPES.values():
        assert None in entries
        assert len({shape.turns > 0 for shape in entries.values()}) == 1


@needs_triton
def test_the_entry_of_the_architecture_is_used(monkeypatch):
    entries = {None: launch.Shape(4096, 8), "sm_90": launch.Shape(2048, 4)}
    monkeypatch.setitem(launch.SHAPES, "statistics", entries)
    device = torch.device("cpu")
    for arch, block, warps in ((None, 4096, 8), ("sm_80", 4096, 8), ("sm_90", 2048, 4)):
        monkeypatch.setattr(launch, "architecture", lambda _, arch=arch: arch)
        shape = launch.launch_shape("statistics", 32000, 2, device)
        assert shape == {"BLOCK": block, "GROUP": 8, "num_warps": warps}
    assert launch.launch_shape("statistics", 300, 4, device) == {"BLOCK": 512, "GROUP": 4, "num_warps": 1}
    assert launch.launch_shape("gradient", 1, 2, device)["num_warps"] == 1


@needs_triton
def test_no_grid_has_too_many_programs_on_its_second_axis():
    for kernel, (_, _, turns) in every_candidate():
        if turns:
            for n_cols in (1, 255, 32000, 2**20, 2**28, 2**31 - 1):
                used = launch.launch_shape(kernel, n_cols, 2, torch.device("cpu"))["BLOCK"]
                assert 1 <= launch.row_programs(n_cols, used, turns) <= 65535, (kernel, n_cols)
    assert launch.row_programs(2**31 - 1, 256, 1) == 65535


@needs_triton
@pytest.mark.parametrize("kernel", ("gradient", "dpo_gradient", "from_basis", "kl_gradient"))
def test_a_row_with_more_blocks_than_programs(kernel, monkeypatch, poison):
    """Each program continues until the row ends, however few programs there are."""
    monkeypatch.setattr(launch, "MAX_AXIS", 2)
    with launch_shapes.entry(kernel, launch.Shape(1024, 4, 1)):
        assert launch_shapes.wrong(launch_shapes.problem(kernel, 2, 7003, torch.float32, DEVICE)) is None


@needs_triton
def test_proposed_shapes(monkeypatch):
    def rows(*times):
        shapes = ([4096, 8, 0], [2048, 4, 0], [8192, 8, 0])
        return [{"kernel": "kl", "shape": shape, "ms": ms} for shape, ms in zip(shapes * 2, times * 2)]

    monkeypatch.setattr(launch_shapes, "here", lambda: "sm_90")
    assert launch_shapes.winners(rows(1.0, 0.99, 1.2)) == ["kl: the table's Shape(4096, 8, 0) stays"]
    line, entry = launch_shapes.winners(rows(1.0, 0.9, 1.2))
    assert line == "kl: Shape(2048, 4, 0) takes 0.900 of the time of Shape(4096, 8, 0)."
    namespace = {"Shape": launch.Shape}
    name, entries = eval(f"{{{entry}}}", namespace).popitem()
    assert (name, entries["sm_90"], entries[None]) == ("kl", launch.Shape(2048, 4), launch.SHAPES["kl"][None])
    broken = rows(1.0, 0.5, 1.2)
    broken[1] = {"kernel": "kl", "shape": [2048, 4, 0], "wrong": "off"}
    assert launch_shapes.winners(broken) == ["kl: the table's Shape(4096, 8, 0) stays"]
    assert launch_shapes.winners([{"kernel": "kl", "shape": [1], "wrong": "off"}])[0].endswith("gives correct results")


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_is_an_error(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "launch_shapes.py", "--json", tmp_path / "shapes.json"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1
    assert run.stderr == "launch_shapes: torch finds no CUDA GPU, and shapes are timed on one.\n"
    assert not (tmp_path / "shapes.json").exists()


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_dry_run_of_the_stage_without_a_gpu(tmp_path):
    """`make gpu-evidence` with --device cpu: every kernel runs in two shapes and nothing is proposed."""
    environ = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    environ.pop("TRITON_INTERPRET", None)
    words = ["evidence.unit", "shapes", "--suite", "tiny", "--device", "cpu", "--result", tmp_path / "result.json"]
    run = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT, env=environ)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "a trial run: no shape is proposed" in run.stdout
    rows = json.loads((tmp_path / "result.json").read_text())["shapes"]["rows"]
    assert all(row["ms"] > 0 and row["rows"] * row["columns"] < 20_000 for row in rows)
    tried = [(row["kernel"], tuple(row["shape"])) for row in rows]
    assert tried == [(name, shape) for name in launch_shapes.CANDIDATES for shape in launch_shapes.candidates(name)[:2]]


def test_a_dry_run_is_not_made_quick():
    command = [sys.executable, ROOT / "benchmarks" / "launch_shapes.py", "--suite", "tiny", "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2 and "--quick: got it with --suite tiny" in run.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
@pytest.mark.parametrize("words, interpreted", [((), "1"), (("--suite", "tiny"), "0")])
def test_only_a_dry_run_works_without_a_gpu(words, interpreted):
    command = [sys.executable, ROOT / "benchmarks" / "launch_shapes.py", "--device", "cpu", *words]
    environ = os.environ | {"TRITON_INTERPRET": interpreted}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ)
    assert run.returncode == 2 and "--device cpu: works only with --suite tiny and TRITON_INTERPRET=1" in run.stderr


SPILLS = """
import json, sys
sys.path.insert(0, "benchmarks")
import aot

shapes, found = json.loads(sys.argv[1]), []
for case in aot.cases():
    name = aot.table_name(case)
    if case.dtype == "bf16" and case.aligned and name in shapes:
        for block, warps in shapes.pop(name):
            row = aot.figures(case._replace(block=block, warps=warps), "90", False, 32000)
            found.append([name, block, warps, row["compiles"], row["spills"]])
print(json.dumps([found, list(shapes)]))
"""


@pytest.mark.slow
@needs_triton
def test_every_candidate_compiles_without_spills():
    shapes: dict[str, set] = {}
    for kernel, shape in every_candidate():
        shapes.setdefault(kernel, set()).add((shape.block, shape.warps))
    argument = json.dumps({kernel: sorted(each) for kernel, each in shapes.items()})
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SPILLS, argument]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    found, left_out = json.loads(run.stdout)
    assert left_out == []
    assert [row for row in found if row[3:] != [True, 0]] == []
