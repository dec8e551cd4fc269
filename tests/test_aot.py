"""Every kernel compiles for GPUs that are not here, without spills; the static figures that must not get worse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "aot.py"


@pytest.fixture(scope="module")
def rows():
    """The table of benchmarks/aot.py, from a process of its own: kernels under the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, TABLE, "--json"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)["rows"]


def test_every_kernel_compiles_for_every_architecture_without_spills(rows):
    kernels = {(row["kernel"], row["dtype"]) for row in rows}
    assert len(kernels) >= 30
    for arch in ("sm_80", "sm_90", "sm_100"):
        assert {(row["kernel"], row["dtype"]) for row in rows if row["arch"] == arch} == kernels
    assert [row for row in rows if row["spills"]] == []


@pytest.mark.parametrize("kernel, bound", [("statistics, logps", 7.0), ("statistics, logps+entropy", 9.0)])
def test_instructions_of_the_statistics_loop(rows, kernel, bound):
    (row,) = (r for r in rows if (r["kernel"], r["dtype"], r["arch"]) == (kernel, "bf16", "sm_90"))
    assert 4 < row["loop_instructions_per_element"] <= bound
    assert row["loads_128bit"] >= 2


def test_gradient_kernels_load_and_store_128_bits(rows):
    for row in rows:
        if "gradient" in row["kernel"]:
            assert row["loads_128bit"] >= 2 and row["stores_128bit"] >= 2, row
