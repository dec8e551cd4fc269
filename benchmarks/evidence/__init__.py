"""All that a GPU has to show, in a few calls of ten minutes: `make gpu-evidence OUT=folder`.

stages.py    what is run: stages, and their units, each a process of its own
prices.py    the seconds that a unit is expected to take
runner.py    runs units: limits, budget, what is kept when a run is killed
state.py     the files under OUT
unit.py      one unit, in its own process: `python -m evidence.unit`
heads.py, rows.py, steps.py, tools.py    what units measure: heads, kernels, training steps; ncu and sanitizers
goals.py     the goals, and what was measured beside each
table.py     the plan and the summary as text
publish.py   results, report, chart and the README's lines, for benchmarks/report.py
"""
