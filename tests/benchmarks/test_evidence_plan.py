"""The plan of `make gpu-evidence`: units, prices, and that it runs every test file that uses the device."""

import re

import pytest
from evidence import prices, stages, state, table
from evidence.stages import LARGE, STAGES, TESTS, plan_units
from repository import ROOT


@pytest.mark.parametrize("machine", prices.MACHINES)
def test_the_plan_fits_three_calls(machine):
    units, about = plan_units(tuple(STAGES)), prices.MACHINES[machine]
    calls = table.pack(units, about, 570.0, 12)
    assert len(calls) <= table.CALLS and max(calls) <= 570 and sum(calls) <= 28 * 60
    assert all(5 < u.price(about) <= 150 for u in units)
    assert len({u.key for u in units}) == len(units)
    alone = [sum(table.pack([u for u in units if u.stage == name], about, 1e9, 12)) - prices.CALL for name in STAGES]
    assert sum(alone) + prices.CALL * len(calls) == pytest.approx(sum(calls))
    text = table.plan(units, about, 570.0, 12)
    assert machine in text and "none of this is measured" in text
    for name, seconds in zip(STAGES, alone):
        assert re.search(rf"^{name}.* {seconds:.0f} +{seconds / 60:.1f} ", text, re.M), name


def test_h200_copies_faster_and_multiplies_at_the_same_speed():
    units = {u.key: u for u in plan_units(tuple(STAGES))}
    one, other = (prices.MACHINES[name] for name in ("H100", "H200"))
    assert units["benchmark/rows-bf16"].price(other) < units["benchmark/rows-bf16"].price(one)
    assert units["benchmark/ceilings"].price(other) == units["benchmark/ceilings"].price(one)


def test_every_file_that_computes_on_the_device_is_run_there(tmp_path, monkeypatch):
    files = stages.test_files()
    assert len(files) == len(list((ROOT / "tests").rglob("test_*.py"))), "two files of tests have the same name"
    assert files.keys() >= {*TESTS, *stages.ELSEWHERE, LARGE[0]}
    names = {u.arguments[1] for u in stages.test_units(False)}
    assert {files[name] for name in (*TESTS, LARGE[0])} <= names
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    for name, text in {
        "new": "from numerics import BACKENDS, DEVICE",
        "wrapped": "from numerics import (\n    A,\n    DEVICE,\n)",
        "logps": "from numerics import DEVICE",
        "other": "import numerics",
        "cuda_host": "from numerics import DEVICE",
    }.items():
        (tmp_path / "tests" / "ops" / f"test_{name}.py").write_text(text)
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    assert set(stages.device_tests()) - set(TESTS) == {"new", "wrapped"}


def test_at_most_eight_files():
    logs = {stage.log for stage in STAGES.values()}
    assert len(logs | {"evidence-h100.json", state.TESTS, "table.txt"}) <= 7  # and one file that is being written
