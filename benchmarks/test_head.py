"""Forward and backward of an LM head: fused_po and the peers. `make bench`, or `pytest benchmarks --suite cpu`.

The results of a case are in the JSON's extra_info (`--benchmark-json=FILE`). `benchmarks/report.py` makes tables and
plots of it.
"""

import measure
from cases import suite  # noqa: F401 - conftest.py takes the cases from it
from providers import PROVIDERS
from report import case_table


def test_head(case, device, rounds, circumstances, benchmark, capsys):
    reports = measure.compare(case, device, PROVIDERS, benchmark, circumstances, rounds)
    with capsys.disabled():
        print(f"\n\n{case.name}\n\n{case_table(reports)}")
    assert "seconds" in reports["fused_po"], reports["fused_po"].get("wrong") or reports["fused_po"]
