"""The plan and the summary of a run, as text."""

from __future__ import annotations

from collections.abc import Iterable

from evidence import goals, prices
from evidence.stages import STAGES, Unit
from evidence.state import State

CALLS = 3  # number of calls, of BUDGET seconds each, for which a machine is available


def columns(rows: Iterable[tuple]) -> str:
    """Rows of text in aligned columns, numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if text[:1].isdigit() or text == "-" else text.ljust(width)

    return "\n".join("  ".join(cell(*pair) for pair in zip(row, widths)).rstrip() for row in texts)


def pack(units: list[Unit], machine: prices.Machine, budget: float, jobs: int) -> list[float]:
    """Seconds of each call as the runner would make them, if every unit takes as long as expected."""
    calls, now = [prices.CALL], 0
    waves: list[tuple[float, list[Unit]]] = []
    for stage in STAGES.values():
        mine = [u for u in units if u.stage == stage.name]
        for alone in (False, True):
            some = [u for u in mine if u.alone == alone]
            width = 1 if alone else max(1, min(stage.jobs, jobs))
            # in parallel: at least the longest, and the sum divided by the number of jobs
            for at in range(0, len(some), width):
                part = some[at : at + width]
                waves.append((max(u.price(machine) for u in part), part))
    for seconds, _ in waves:
        if calls[now] + seconds > budget and calls[now] > prices.CALL:
            calls.append(prices.CALL)
            now += 1
        calls[now] += seconds
    return calls


def plan(units: list[Unit], machine: prices.Machine, budget: float, jobs: int) -> str:
    """Expected seconds per unit and stage, and how they fit into calls."""
    rows: list[tuple] = [("unit", "seconds", "GiB", "needs")]
    sums: list[tuple] = [("stage", "units", "seconds", "minutes", "what")]
    for stage in STAGES.values():
        mine = [u for u in units if u.stage == stage.name]
        if not mine:
            continue
        for u in mine:
            rows.append((u.key, f"{u.price(machine):.0f}", f"{u.memory / prices.GIB:.0f}", ", ".join(u.needs)))
        taken = sum(pack(mine, machine, 1e9, jobs)) - prices.CALL
        beside = f", {min(stage.jobs, jobs)} at once" if min(stage.jobs, jobs) > 1 else ""
        sums.append((stage.name + beside, f"{len(mine)}", f"{taken:.0f}", f"{taken / 60:.1f}", stage.about))
    calls = pack(units, machine, budget, jobs)
    total = sum(calls)
    sums.append(("all, with the start of each call", f"{len(units)}", f"{total:.0f}", f"{total / 60:.1f}", ""))
    said = ", ".join(f"{seconds:.0f}" for seconds in calls)
    return (
        f"expected on one {machine.name}; none of this is measured (benchmarks/evidence/prices.py)\n\n"
        f"{columns(rows)}\n\n{columns(sums)}\n\n{len(calls)} calls of at most {budget:.0f} s: {said} s"
    )


def counts(units: list[Unit], state: State) -> list[tuple]:
    """One row per stage: done, failed, not run, left; seconds measured and expected for what is done."""
    rows: list[tuple] = [("stage", "done", "failed", "not run", "left", "seconds", "expected")]
    for stage in dict.fromkeys(u.stage for u in units):
        mine = [state.units.get(u.key, {}) | {"key": u.key} for u in units if u.stage == stage]
        done = [m for m in mine if m.get("status") == "done"]
        failed = [m for m in mine if m.get("status") == "failed" or state.given_up(m["key"])]
        cannot = [m for m in mine if m.get("status") == "cannot"]
        left = len(mine) - len(done) - len(failed) - len(cannot)
        seconds = sum(m["seconds"] for m in done + failed if m.get("seconds"))
        expected = sum(m["expected"] for m in done + failed if m.get("expected"))
        rows.append((stage, len(done), len(failed), len(cannot), left, f"{seconds:.0f}", f"{expected:.0f}"))
    return rows


def peers_that_failed(units: dict) -> dict[str, str]:
    """Installed providers that raised, with the first reason, except for too little memory."""
    found: dict[str, str] = {}
    for _, result in goals.results(units, "benchmark/"):
        for name, report in result.get("providers", {}).items():
            reason = str(report.get("not run", ""))
            if reason.startswith("failed:") and "OutOfMemory" not in reason:
                found.setdefault(name, reason)
    return found


def troubles(units: list[Unit], state: State) -> list[str]:
    """One line per reason why units failed or cannot run, and per peer that raised."""
    found: dict[str, list[str]] = {}
    for unit in units:
        known = state.units.get(unit.key, {})
        if known.get("status") in ("failed", "cannot"):
            said = f"{'failed' if known['status'] == 'failed' else 'not run'}: {known['reason']}"
            found.setdefault(said, []).append(unit.key)
        elif state.given_up(unit.key):
            found.setdefault(f"given up after {known['attempts']} tries: {known['reason']}", []).append(unit.key)
    lines = [f"{', '.join(keys)}: {said}" for said, keys in found.items()]
    return lines + [f"peer {name}: {reason}" for name, reason in peers_that_failed(state.units).items()]


def summary(units: list[Unit], state: State, stopped: str | None) -> str:
    """The table, the goals, and at the end what went wrong."""
    about = state.about
    kind = ", a rehearsal: no evidence" if about["rehearsal"] else "" if about["evidence"] else ": no evidence"
    parts = [f"{about['device']}{kind}; code {state.code}", columns(counts(units, state))]
    rows = [("goal", "bound", "measured", "worst at"), *goals.lines(state.units)]
    parts.append(columns(rows))
    steps = goals.steps(state.units)
    if steps:
        parts.append(columns([("step", "by", "tokens a second", "peak beyond weights", "longest sequence"), *steps]))
    old = [key for key, unit in state.units.items() if unit.get("code") not in (None, state.code)]
    if old:
        parts.append(f"measured with other code than the current: {', '.join(old)}")
    said = state.notes + ([stopped] if stopped else []) + troubles(units, state)
    return "\n\n".join([*parts, *(["\n".join(said)] if said else [])])
