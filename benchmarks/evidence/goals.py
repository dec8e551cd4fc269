"""The goals, each beside its measurement. A goal without a measurement is "not measured", never met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

BOTH = "forward+backward"
WIDE = 3584  # the goals for heads hold from this hidden width


class Goal(NamedTuple):
    """`found` yields (where, value) of each measurement. The worst value counts."""

    name: str
    bound: float
    found: Callable[[dict], Iterator[tuple[str, float]]]
    at_most: bool = False
    form: str = ".1%"

    def worst(self, units: dict) -> tuple[str, float] | None:
        values = [pair for pair in self.found(units) if pair[1] is not None]
        pick = max if self.at_most else min
        return pick(values, key=lambda pair: pair[1]) if values else None

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def results(units: dict, prefix: str) -> Iterator[tuple[str, dict]]:
    """(name, result) of the units that are done."""
    for key, unit in units.items():
        if key.startswith(prefix) and unit["status"] == "done" and unit.get("result"):
            yield key.split("/", 1)[1], unit["result"]


def kernel(part: str) -> Callable:
    """Share of copy bandwidth of a row pass in bf16."""

    def found(units: dict) -> Iterator[tuple[str, float]]:
        for _, result in results(units, "benchmark/rows-bf16"):
            for name, row in result["rows"].items():
                if name.startswith(part):
                    yield name, row["share"]

    return found


def cases(units: dict, **wanted) -> Iterator[tuple[str, dict, dict]]:
    """(name, case, reports by provider) of the heads with these fields."""
    for name, result in results(units, "benchmark/"):
        case = result.get("case")
        if case and all(case[key] == value for key, value in wanted.items()):
            yield name, case, result["providers"]


def share_of_gemms(head: str, provider: str) -> Callable:
    """The time of the bare GEMMs over that of a provider: its share of their speed."""

    def found(units: dict) -> Iterator[tuple[str, float]]:
        for name, case, reports in cases(units, task="logps", head=head, prompt=0.0):
            times = reports.get(provider, {}).get("times the bare GEMMs")
            if times and case["width"] >= WIDE:
                yield name, 1 / times[BOTH]

    return found


def over(*parts: str, **wanted) -> Callable:
    """The time of a peer over ours. `parts` are parts of the peer's name."""

    def found(units: dict) -> Iterator[tuple[str, float]]:
        for name, _, reports in cases(units, **wanted):
            for provider, report in reports.items():
                times = report.get("times as long as fused_po")
                if all(part in provider for part in parts) and times and "wrong" not in report:
                    yield f"{name}, {provider}", times[BOTH]

    return found


def peak(units: dict) -> Iterator[tuple[str, float]]:
    """Our peak memory over TRL's."""
    for name, _, reports in cases(units):
        ours, theirs = (reports.get(who, {}).get("peak bytes") for who in ("fused_po", "TRL"))
        if ours and theirs:
            yield name, ours / theirs


def one_read(units: dict) -> Iterator[tuple[str, float]]:
    for _, result in results(units, "cuda/one-read"):
        for name, row in result["rows"].items():
            if "one read" in name:
                yield name, row["share"]


def dirty(units: dict) -> Iterator[tuple[str, float]]:
    """Errors that compute-sanitizer counted."""
    for key, unit in units.items():
        if ("/memcheck" in key or "/racecheck" in key) and unit["status"] in ("done", "failed"):
            errors = (unit.get("result") or {}).get("errors")
            if errors is not None:
                yield key.split("/", 1)[1], errors


GOALS = (
    Goal("statistics kernel, share of copy bandwidth", 0.90, kernel("statistics, log-probs")),
    Goal("gradient kernel, share of copy bandwidth", 0.93, kernel("gradient")),
    Goal(
        "trainable head, bf16 tiles, share of the speed of 3 bare GEMMs",
        0.94,
        share_of_gemms("trainable", "fused_po, bf16 tiles"),
    ),
    Goal(
        "trainable head, fp32 tiles, share of the speed of 3 bare GEMMs", 0.91, share_of_gemms("trainable", "fused_po")
    ),
    Goal("frozen head, share of the speed of 2 bare GEMMs", 0.92, share_of_gemms("frozen", "fused_po")),
    Goal("TRL's time over ours, trainable head", 1.30, over("TRL", task="logps", head="trainable"), form=".2f"),
    Goal("TRL's time over ours, frozen head", 1.45, over("TRL", task="logps", head="frozen"), form=".2f"),
    Goal(
        "time of Liger's DPO over ours, half of each sequence prompt",
        2.0,
        over("Liger", task="dpo", prompt=0.5, reference="live"),
        form=".2f",
    ),
    Goal(
        "time of Liger's scaled cross entropy over ours",
        1.3,
        over("Liger", "scaled", tokens=4096, vocabulary=131072, width=4096),
        form=".2f",
    ),
    Goal("our peak memory over TRL's", 1.0, peak, at_most=True, form=".2f"),
    Goal("one read, share of copy bandwidth at 4 bytes per logit", 0.85, one_read),
    Goal("errors found by compute-sanitizer", 0, dirty, at_most=True, form=".0f"),
)


def lines(units: dict) -> list[tuple[str, str, str, str]]:
    """(goal, bound, measured, where) of each goal as text."""
    found = []
    for goal in GOALS:
        bound = ("at most " if goal.at_most else "at least ") + format(goal.bound, goal.form)
        worst = goal.worst(units)
        if worst is None:
            found.append((goal.name, bound, "not measured", ""))
        else:
            said = format(worst[1], goal.form) + ("" if goal.met(worst[1]) else ", missed")
            found.append((goal.name, bound, said, worst[0]))
    return found


def steps(units: dict) -> list[tuple[str, str, str, str, str]]:
    """(model, who, tokens per second, peak, longest sequence) of the training steps as text."""
    found = []
    for key, unit in units.items():
        result = unit.get("result") or {}
        if not key.startswith("step/") or "training" not in result:
            continue
        case = result["training"]
        name = case["label"] or f"V={case['vocabulary']} H={case['width']} L={case['layers']}"
        for who, report in result["reports"].items():
            if "tokens a second" in report:
                more = " or more" * (report["longest"] == (case["longest"] or 8 * case["length"]))
                numbers = f"{report['tokens a second']:.0f}", f"{report['peak bytes'] / 2**30:.2f} GiB"
                longest = f"{report['longest']}{more} in {case['memory'] / 2**30:.2f} GiB"
                found.append((name, who, *numbers, longest))
    return found
