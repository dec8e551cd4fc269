"""All measurements on a GPU, in a few calls of ten minutes: `make gpu-evidence OUT=folder`.

stages.py    what is run: stages, and their units, each in its own process
prices.py    the expected seconds of each unit
runner.py    runs the units: limits, budget, what is kept when a run is killed
state.py     the files under OUT
unit.py      one unit, in its own process: `python -m evidence.unit`
heads.py, rows.py, steps.py, tools.py    what units measure: heads, kernels, training steps; ncu and sanitizers
goals.py     the goals, each beside its measurement
table.py     the plan and the summary as text
publish.py   results, report, chart and the lines of the README, for benchmarks/report.py
"""
