"""Forward and backward of the exact KL between policy and reference: fused_po and the peers. See test_head.py."""

import measure
from cases import kl_suite as suite  # noqa: F401 - conftest.py takes the cases from it
from kl_providers import KL_PROVIDERS
from report import case_table


def test_kl(case, device, rounds, circumstances, benchmark, capsys):
    reports = measure.compare(case, device, KL_PROVIDERS, benchmark, circumstances, rounds)
    with capsys.disabled():
        print(f"\n\n{case.name}\n\n{case_table(reports, case.task)}")
    assert "seconds" in reports["fused_po"], reports["fused_po"].get("wrong") or reports["fused_po"]
