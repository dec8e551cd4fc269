"""TRL's DPOTrainer end to end, with and without the patch. `pytest benchmarks/test_training.py --suite cpu`."""

import pytest
import training
from training import suite  # noqa: F401 - conftest.py takes the cases from it


def test_training(case, device, circumstances, benchmark, capsys):
    if reason := training.absent():
        pytest.skip(reason)
    reports = benchmark.pedantic(training.compare, args=(case, device))
    benchmark.extra_info |= {"training": case._asdict(), "reports": reports, "circumstances": circumstances}
    with capsys.disabled():
        print(f"\n\n{training.table(case, reports)}")
    assert not [report["wrong"] for report in reports.values() if "wrong" in report]
