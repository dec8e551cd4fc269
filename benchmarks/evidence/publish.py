"""From the JSON of a GPU run to the committed files: benchmarks/results/<gpu>/ and the marked lines of README.md.

Used by `benchmarks/report.py`. The same input gives the same files. What was not measured stays "not measured".
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import looks

from evidence import goals
from evidence.stages import ROOT, STAGES
from evidence.state import FORMAT, UNFINISHED, read_json, slug

NAME = "evidence.json"
COMPILES = "the kernels run in Triton's interpreter and compile for sm_80, sm_90, sm_100"
NOTHING = {  # the marked lines of README.md until something is measured
    "headline": "",
    "status": f"**not measured on a GPU yet**: {COMPILES}",
    "one-read": "**it has not run on a GPU yet**",
    "chart": "",
}


class Refused(Exception):
    """The input must not be published; the message says why and what to do."""


def load(path: Path) -> dict:
    """The evidence of one GPU."""
    try:
        found = read_json(path)
        if found["format"] != FORMAT:
            raise ValueError
        return found
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path}: expected the JSON that `make gpu-evidence` wrote") from error


def is_evidence(path: Path) -> bool:
    """Whether a path comes from `make gpu-evidence`: its OUT, or a JSON file in it."""
    if path.is_dir():
        return True
    try:
        return read_json(path).get("format", "").startswith("fused_po evidence")
    except (OSError, ValueError, AttributeError):
        return False


def files_of(path: Path) -> list[Path]:
    """The evidence of each GPU in OUT."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.glob("evidence*.json") if ".damaged" not in p.name)
    if not found:
        raise Refused(f"{path}: holds no evidence-*.json; expected the OUT of `make gpu-evidence`")
    return found


def markdown(rows: list[tuple]) -> str:
    """A Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def circumstances(found: dict) -> list[str]:
    versions = ", ".join(f"{name} {value or '(absent)'}" for name, value in found["versions"].items())
    memory = f", {found['memory'] / 2**30:.0f} GiB" if found["memory"] else ""
    calls = [f"- {c['began']}, {c['seconds']:.0f} s, code {c['code']}: `{c['command']}`" for c in found["calls"]]
    return [f"{found['device']}{memory}; commit {found['commit'] or 'not known'}. {versions}.", "", *calls]


def stage_table(units: dict) -> str:
    rows = [("stage", "done", "failed", "not run", "seconds")]
    for name in STAGES:
        mine = [u for u in units.values() if u["stage"] == name]
        count = {s: sum(u["status"] == s for u in mine) for s in ("done", "failed")}
        seconds = sum(u.get("seconds") or 0 for u in mine)
        rows.append((name, count["done"], count["failed"], len(mine) - sum(count.values()), f"{seconds:.0f}"))
    return markdown(rows)


def kernel_tables(units: dict) -> list[str]:
    parts = []
    for key in ("benchmark/rows-bf16", "benchmark/rows-fp32", "cuda/one-read"):
        for name, result in goals.results(units, key):
            rows = [("pass", "ms", "GB/s", "of a copy", "bytes a logit")]
            for what, row in result["rows"].items():
                share, size = (
                    format(row[k], form) if k in row else "" for k, form in (("share", ".1%"), ("bytes a logit", ".0f"))
                )
                rows.append((what, f"{row['seconds'] * 1e3:.3f}", f"{row['GB/s']:.0f}", share, size))
            parts += [f"## {name}: row passes beside a copy of the same logits, timed in turns", markdown(rows)]
    for _, result in goals.results(units, "benchmark/ceilings"):
        rows = [("shape", "scores", "d hidden", "d weight")]
        for shape, rates in result["products"].items():
            rows.append((shape, *(f"{rates['TFLOP/s'][n]:.0f}" for n in ("scores", "d hidden", "d weight"))))
        parts += [f"## Upper bounds: bare GEMMs in TFLOP/s; a copy: {result['copy GB/s']:.0f} GB/s", markdown(rows)]
    return parts


def head_tables(units: dict) -> list[str]:
    from report import case_table, title

    parts = []
    for name, result in goals.results(units, "benchmark/"):
        if "case" in result:
            table = case_table(result["providers"], result["case"]["task"])
            parts += [f"## {title(result['case'])} ({name.rsplit('.', 1)[1]})", table]
    return parts


def tool_tables(units: dict) -> list[str]:
    parts = []
    for name, result in goals.results(units, "ncu/"):
        fields = list(dict.fromkeys(field for kernel in result["kernels"] for field in kernel))
        rows = [tuple(fields), *(tuple(kernel.get(field, "") for field in fields) for kernel in result["kernels"])]
        parts += [f"## ncu: {name}", markdown(rows)]
    errors = dict(goals.dirty(units))
    if errors:
        rows = [("compute-sanitizer", "errors"), *((name, int(count)) for name, count in errors.items())]
        parts += ["## compute-sanitizer", markdown(rows)]
    steps = goals.steps(units)
    if steps:
        head = ("model", "by", "tokens a second", "peak beyond weights", "longest sequence")
        parts += ["## DPO steps: one pair per step, half of each sequence is prompt", markdown([head, *steps])]
    return parts


def troubles(units: dict) -> list[str]:
    bad = [(key, u) for key, u in units.items() if u["status"] != "done"]
    if not bad:
        return []
    said = {"failed": "failed", "cannot": "not run"} | dict.fromkeys(UNFINISHED, "not finished")
    return ["## Not measured", "\n".join(f"- {key}: {said[u['status']]}: {u.get('reason') or ''}" for key, u in bad)]


def report(found: dict) -> str:
    """The whole report of one GPU in Markdown."""
    units = found["units"]
    kind = "" if found["evidence"] else ": a rehearsal, no evidence" if found["rehearsal"] else ": no evidence"
    listed = [("goal", "bound", "measured", "worst at"), *goals.lines(units)]
    parts = [f"# Measured on {found['device']}{kind}", "\n".join(circumstances(found)), "## Goals", markdown(listed)]
    codes = sorted({u["code"] for u in units.values() if u.get("code")})
    if len(codes) > 1:
        parts.append(f"Units were run with different code: {', '.join(codes)}.")
    parts += ["## Stages", stage_table(units), *kernel_tables(units), *head_tables(units), *tool_tables(units)]
    return "\n\n".join([*parts, *troubles(units)]) + "\n"


def bars(units: dict) -> dict[str, list[tuple[str, float, str]]]:
    """(label, share of an upper bound, colour) by panel: row passes and heads. Ours have the colour of fused_po."""
    passes = [
        (name, row["share"], looks.OURS)
        for _, result in goals.results(units, "benchmark/rows-bf16")
        for name, row in result["rows"].items()
        if "share" in row
    ]
    heads = []
    for name, case, reports in goals.cases(units):
        about = f"V={case['vocabulary']} H={case['width']} {case['head']} {case['task']}, prompt {case['prompt']:g}"
        for who, given in reports.items() if name.endswith(".main") else ():
            times = given.get("times the bare GEMMs")
            if times and who != "bare GEMMs":
                colour = looks.OURS if "fused_po" in who else looks.GREY
                heads.append((f"{who}: {about}", 1 / times[goals.BOTH], colour))
    found = {
        "row passes in bf16, share of copy bandwidth": passes,
        "heads, share of the speed of their bare GEMMs": heads,
    }
    return {title: rows for title, rows in found.items() if rows}


def draw(units: dict, path: Path) -> bool:
    """Draw the bars; False if there are none."""
    panels = bars(units)
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tall = 1 + 0.22 * max(map(len, panels.values()))
    how = dict(figsize=(8 * len(panels), tall), squeeze=False, layout="constrained")
    figure, axes = pyplot.subplots(1, len(panels), **how)
    for plot, (title, rows) in zip(axes[0], panels.items()):
        names, values, colours = zip(*reversed(rows))
        plot.barh(range(len(names)), values, color=colours)
        plot.set_yticks(range(len(names)), names, fontsize=7)
        plot.axvline(1, color="#000000", linewidth=0.8)
        plot.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


def write_folder(source: Path, found: dict, folder: Path) -> list[str]:
    """Write the unchanged JSON, the report and the charts; returns the names of the charts."""
    from report import draw as draw_curves

    folder.mkdir(parents=True, exist_ok=True)
    if source.resolve() != (folder / NAME).resolve():
        shutil.copyfile(source, folder / NAME)
    (folder / "report.md").write_text(report(found), encoding="utf-8")
    drawn = ["evidence.png"] if draw(found["units"], folder / "evidence.png") else []
    infos = [r for name, r in goals.results(found["units"], "benchmark/") if "case" in r and name.endswith(".main")]
    return drawn + [f"{w}.png" for w in ("time", "memory") if infos and draw_curves(infos, w, folder / f"{w}.png")]


def readme_lines(results: Path) -> dict[str, str]:
    """The marked lines, for all GPUs whose evidence is committed."""
    said = {name: [] for name in NOTHING}
    for path in sorted(results.glob(f"*/{NAME}")):
        found, where = load(path), f"benchmarks/results/{path.parent.name}"
        lines = goals.lines(found["units"])
        measured = [f"{name} {value}" for name, _, value, _ in lines if value != "not measured"]
        missing = [name for name, _, value, _ in lines if value == "not measured"]
        if not measured:
            continue
        rest = f"; not measured: {', '.join(missing)}" if missing else ""
        said["status"].append(f"{found['device']} ([report]({where}/report.md)): {', '.join(measured)}{rest}")
        heads = [text for text in measured if "head" in text or text.startswith("TRL")]
        if heads:
            said["headline"].append(f"On one {found['device']} ([report]({where}/report.md)): {', '.join(heads)}.")
        one = next((text for text in measured if text.startswith("one read")), None)
        if one:
            said["one-read"].append(f"{found['device']}: {one}")
        if (path.parent / "evidence.png").exists():
            said["chart"].append(f"![Shares of the upper bounds on {found['device']}]({where}/evidence.png)")
    ends = {"headline": "\n", "status": "; ", "one-read": "; ", "chart": "\n"}
    return {name: ends[name].join(texts) or NOTHING[name] for name, texts in said.items()}


def marked(page: str, lines: dict[str, str]) -> str:
    """A page with these lines between their markers, <!-- gpu:name --> and <!-- /gpu:name -->."""
    for name, text in lines.items():
        pattern = re.compile(rf"(<!-- gpu:{name} -->)(.*?)(<!-- /gpu:{name} -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise Refused(f"README.md: expected one pair of markers <!-- gpu:{name} --> and <!-- /gpu:{name} -->")
        page = pattern.sub(lambda m, t=text: m[1] + t + m[3], page)
    return page


def publish(paths: list[Path], output: Path | None, root: Path = ROOT) -> list[str]:
    """Write the committed files, or a report in `output`; returns a line for each folder that was written."""
    sources = [(path, load(path)) for given in paths for path in files_of(given)]
    if output is not None and len(sources) > 1:
        names = ", ".join(path.name for path, _ in sources)
        raise Refused(f"-o: one folder for several GPUs: {names}; name one of the files")
    said = []
    for path, found in sources:
        if output is None and not found["evidence"]:
            kind = "a rehearsal" if found["rehearsal"] else f"device {found['device']}, suite {found['suite']}"
            raise Refused(f"{path}: {kind}: no evidence of a GPU; -o FOLDER writes a report elsewhere")
    for path, found in sources:
        folder = output or root / "benchmarks" / "results" / slug(found["device"])
        drawn = write_folder(path, found, folder)
        said.append(f"{folder / 'report.md'}: {len(found['units'])} units; {', '.join(drawn) or 'no charts'}")
    if output is None:
        page = root / "README.md"
        old = page.read_text(encoding="utf-8")
        new = marked(old, readme_lines(root / "benchmarks" / "results"))
        if new != old:
            page.write_text(new, encoding="utf-8")
        said.append(f"{page}: {'changed' if new != old else 'unchanged'}")
    return said
