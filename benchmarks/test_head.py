"""Forward and backward of the head, ours and the peers'. `make bench`, or `pytest benchmarks --suite cpu`.

One benchmark a case; its rounds are turns in which everybody runs once. What came of it is in the JSON's extra_info
(`--benchmark-json=FILE`), of which `benchmarks/report.py` makes tables and plots.
"""

import measure
from report import case_table

ROUNDS = {"cpu": 4, "cuda": 9}


def test_head(case, device, circumstances, benchmark, capsys):
    p, reports, able = measure.prepare(case, device)
    turns = measure.Turns(p, able)
    benchmark.pedantic(turns, rounds=ROUNDS[device], warmup_rounds=1)
    reports = measure.finish(reports, turns.medians())
    benchmark.extra_info |= {"case": case._asdict(), "providers": reports, "circumstances": circumstances}
    with capsys.disabled():
        print(f"\n\n{case.name}\n\n{case_table(reports)}")
    assert "seconds" in reports["fused_po"], reports["fused_po"].get("wrong") or reports["fused_po"]
