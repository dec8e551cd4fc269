"""Stand-ins for the units of `make gpu-evidence`, and a function that runs them."""

import sys
from pathlib import Path

from evidence import prices, runner, state
from evidence.stages import Unit

ABOUT = {
    "device": "NVIDIA H100 80GB HBM3",
    "memory": 80 << 30,
    "versions": {"torch": "2.11.0"},
    "rehearsal": False,
    "evidence": True,
    "suite": "gpu",
    "commit": "abc",
    "reason": None,
    "capability": [9, 0],
}
H100 = prices.MACHINES["H100"]


def unit(name: str, code: str = "", stage: str = "benchmark", price: float = 0.1, **more) -> Unit:
    """A unit that runs Python code, with the variables `here` (a folder) and `result` (the file for its result)."""
    return Unit(stage, name, (code,), lambda machine: price, **more)


def argv(given: Unit, settings, out: Path, result: Path) -> list[str]:
    begin = f"import json, pathlib, sys, time; here = pathlib.Path({str(out.parent)!r}); result = {str(result)!r}\n"
    note = f"open(here / 'ran', 'a').write({given.name + chr(10)!r})\n"
    end = "\npathlib.Path(result).write_text(json.dumps({'name': 1.5}))"
    return [sys.executable, "-S", "-c", begin + note + given.arguments[0] + end]


def call(tmp_path: Path, units: list[Unit], retry: bool = False, **settings) -> tuple[runner.Runner, list[str]]:
    """(the runner, the lines it printed) after one call with OUT in tmp_path."""
    out, said = tmp_path / "out", []
    state.open_folder(out, None)
    kept = state.State(out, ABOUT)
    if retry:
        kept.forget_failures()
    kept.begin_call("test", settings.get("budget", 60.0))
    made = runner.Settings(**{"machine": H100, "budget": 60.0} | settings)
    run = runner.Runner(units, kept, made, argv=argv, say=said.append)
    run.run()
    return run, said
