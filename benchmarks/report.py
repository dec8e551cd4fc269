"""Tables and plots from the JSON of `pytest benchmarks --benchmark-json=FILE`, or of `make gpu-evidence OUT=FOLDER`.

    python benchmarks/report.py FILE [FILE ...] -o DIRECTORY

writes report.md, and time.png and memory.png if cases differ only in vocabulary, tokens or prompt share.

    python benchmarks/report.py FOLDER

writes benchmarks/results/<gpu>/ (the unchanged JSON, report.md, charts), and the marked lines of README.md. With -o it
writes a report there and nothing else; use it for a rehearsal or a trial run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from evidence import publish
from looks import look

MODE = "forward+backward"
COLUMNS = (
    "provider",
    "forward",
    MODE,
    "over bare GEMMs",
    "over fused_po",
    "GEMMs",
    "peak MB",
    "log-prob error",  # or of the KL
    "gradient error",
)
AXES = {"vocabulary": "vocabulary", "tokens": "tokens", "prompt": "share of the batch that is prompt"}


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def row(name: str, report: dict) -> list[str]:
    """The line of one provider in the table of a case."""
    if "not run" in report:
        return [name, *[""] * (len(COLUMNS) - 2), "not run: " + report["not run"]]
    seconds, errors = report.get("seconds", {}), report.get("errors", {})
    gradients = [v for k, v in errors.items() if k.startswith("d_") and v is not None]
    peak, off = report.get("peak bytes"), next((v for k, v in errors.items() if k.endswith("_max")), None)
    cells = [number(seconds.get("forward"), ".4f"), number(seconds.get(MODE), ".4f")]
    cells += [
        number(report.get(key, {}).get(MODE)) for key in ("times the bare GEMMs", "times as long as fused_po", "GEMMs")
    ]
    cells += [number(None if peak is None else peak / 1e6, ".0f"), number(off, ".1e")]
    last = f"**wrong: {report['wrong']}**" if "wrong" in report else number(max(gradients, default=None), ".1e")
    return [name, *cells, last]


def case_table(reports: dict[str, dict], task: str = "logps") -> str:
    """A Markdown table of one case; times in seconds, medians over turns in which every provider ran once."""
    columns = [name.replace("log-prob", "KL") if task == "kl" else name for name in COLUMNS]
    rows = [columns, ["---"] * len(COLUMNS), *(row(name, report) for name, report in reports.items())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def load(path: Path) -> list[dict]:
    """The benchmarks' extra_info; exits with one line if there are none."""

    def fail(message: str) -> NoReturn:
        print(f"report.py: {path}: {message}", file=sys.stderr)
        sys.exit(2)

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = [b["extra_info"] for b in data["benchmarks"] if "providers" in b["extra_info"]]
    except OSError as error:
        fail(error.strerror)
    except (ValueError, KeyError, TypeError):
        fail("expected the JSON of pytest benchmarks --benchmark-json=FILE")
    if not found:
        fail(f"holds no benchmark of a head or a KL; run pytest benchmarks --benchmark-json={path}")
    return found


def curves(found: list[dict], axis: str) -> list[dict]:
    """The cases of the longest series in which only `axis` differs."""
    series: dict[tuple, list[dict]] = {}
    for info in found:
        rest = tuple(sorted((k, v) for k, v in info["case"].items() if k != axis))
        series.setdefault(rest, []).append(info)
    longest = max(series.values(), key=lambda infos: len({i["case"][axis] for i in infos}))
    return sorted(longest, key=lambda info: info["case"][axis]) if len(longest) > 1 else []


def chart(found: list[dict], what: str):
    """A figure: one panel per axis, one curve per provider; None if no axis has two points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(axis, infos) for axis in AXES if (infos := curves(found, axis))]
    if not panels:
        return None
    names = list(dict.fromkeys(name for info in found for name in info["providers"]))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.4), squeeze=False, layout="constrained")
    for plot, (axis, infos) in zip(axes[0], panels):
        for name in names:
            points = [(info["case"][axis], value(info["providers"].get(name, {}), what)) for info in infos]
            points = [point for point in points if point[1] is not None]
            if points:
                plot.plot(*zip(*points), label=name, **look(name))
        fixed = {
            k: v for k, v in infos[0]["case"].items() if k != axis and k in ("tokens", "vocabulary", "width", "dtype")
        }
        plot.set(xlabel=AXES[axis], ylabel="seconds, forward + backward" if what == "time" else "peak memory, MB")
        plot.set_title(", ".join(f"{k} {v}" for k, v in fixed.items()), fontsize=9)
        plot.set_ylim(bottom=0)
        plot.grid(alpha=0.3)
    handles = {label: handle for plot in axes[0] for handle, label in zip(*plot.get_legend_handles_labels())}
    columns = max(2, 2 * len(panels) - 1)
    figure.set_figheight(4 + 0.2 * -(-len(handles) // columns))  # room for the legend's rows
    how = dict(loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handlelength=3.5)
    figure.legend(handles.values(), handles.keys(), **how)
    return figure


def draw(found: list[dict], what: str, path: Path) -> bool:
    """Write the chart to a file; False if there is nothing to draw."""
    figure = chart(found, what)
    if figure is None:
        return False
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def value(report: dict, what: str) -> float | None:
    """The value of a provider in a plot."""
    if what == "time":
        return report.get("seconds", {}).get(MODE)
    return report["peak bytes"] / 1e6 if "peak bytes" in report and "wrong" not in report else None


def title(case: dict) -> str:
    """A case in words, without the fields that do not apply to it."""
    idle = {("task", "logps"), ("reference", "cached")}
    if case["task"] == "kl":
        idle = {("reference", "live")}
    elif "direction" in case:
        idle.add(("direction", case["direction"]))
    return ", ".join(f"{k} {v}" for k, v in case.items() if (k, v) not in idle)


def markdown(found: list[dict]) -> str:
    """All cases of a file, with machine and versions at the top."""
    about = found[0]["circumstances"]
    kinds = {"the exact KL" if info["case"]["task"] == "kl" else "the head": None for info in found}
    versions = ", ".join(f"{k} {v or '(absent)'}" for k, v in about["versions"].items())
    head = [
        f"# Benchmark of {' and '.join(kinds)}",
        "",
        f"{about['machine']}; copy {about['copy GB/s']:.0f} GB/s; commit {about['commit']}; `{about['command']}`.",
        f"{versions}.",
        "",
        "Times in seconds: medians over turns in which every provider ran once. `over bare GEMMs`: divided by the time",
        "of the products that a head needs (3 trainable, 2 frozen; 1 more for a reference's scores) for the scored",
        "tokens. `GEMMs`: counted, in units of one. Peak: beyond the inputs. Errors against float64: log-probs or KLs",
        "in nats, the largest; gradients relative, in norm.",
    ]
    for info in found:
        head += ["", f"## {title(info['case'])}", "", case_table(info["providers"], info["case"]["task"])]
    return "\n".join(head) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "a file of --benchmark-json, or OUT of `make gpu-evidence`"
    parser.add_argument("files", type=Path, nargs="+", metavar="file", help=what)
    parser.add_argument("-o", "--output", type=Path, help="a directory; created if it does not exist")
    args = parser.parse_args()
    if all(map(publish.is_evidence, args.files)):
        try:
            print("\n".join(publish.publish(args.files, args.output)))
        except publish.Refused as error:
            print(f"report.py: {error}", file=sys.stderr)
            sys.exit(2)
        return
    args.output = args.output or Path()
    files = [load(path) for path in args.files]
    found = [info for infos in files for info in infos]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.md").write_text("\n".join(map(markdown, files)), encoding="utf-8")
    drawn = [name for name in ("time", "memory") if draw(found, name, args.output / f"{name}.png")]
    plots = ", ".join(f"{name}.png" for name in drawn) or "no plots: no two cases differ in one quantity only"
    print(f"{args.output / 'report.md'}: {len(found)} cases; {plots}")


if __name__ == "__main__":
    main()
