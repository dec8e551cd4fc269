"""A pytest plugin: records each test when it ends, skips tests that have passed, and runs a share of a file.

Environment variables: EVIDENCE_TESTS, the file of JSON lines [outcome, code, test]; EVIDENCE_CODE, the digest of the
code that is tested; EVIDENCE_SHARD, "1/3" for the second of three shares.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def in_shard(nodeid: str, shard: str) -> bool:
    part, of = map(int, shard.split("/"))
    return int(hashlib.md5(nodeid.encode("utf-8", "replace")).hexdigest(), 16) % of == part


def outcomes(path: Path, code: str) -> dict[str, str]:
    """The last outcome of each test with this code. A truncated line is ignored."""
    found: dict[str, str] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            outcome, with_code, nodeid = json.loads(line)
        except (ValueError, TypeError):
            continue
        if with_code == code:
            found[nodeid] = outcome
    return found


def counts(path: Path, files: list[str], shard: str, code: str) -> dict:
    """{"passed": n, "skipped": n, "failed": names} for the tests of these files in this share."""
    mine = {
        nodeid: outcome
        for nodeid, outcome in outcomes(path, code).items()
        if nodeid.split("::")[0] in files and in_shard(nodeid, shard)
    }
    number = {name: sum(outcome == name for outcome in mine.values()) for name in ("passed", "skipped")}
    return number | {"failed": [nodeid for nodeid, outcome in mine.items() if outcome == "failed"]}


def pytest_collection_modifyitems(config, items):
    before = outcomes(Path(os.environ["EVIDENCE_TESTS"]), os.environ["EVIDENCE_CODE"])
    left, dropped = [], []
    for item in items:
        wanted = in_shard(item.nodeid, os.environ["EVIDENCE_SHARD"]) and before.get(item.nodeid) not in (
            "passed",
            "skipped",
        )
        (left if wanted else dropped).append(item)
    items[:] = left
    config.hook.pytest_deselected(items=dropped)


_ends: dict[str, str] = {}


def pytest_runtest_logreport(report):
    """The outcome is known after the test's teardown."""
    known = _ends.get(report.nodeid, "passed")
    if report.failed:
        known = "failed"
    elif report.skipped and known != "failed":
        known = "passed" if hasattr(report, "wasxfail") else "skipped"
    _ends[report.nodeid] = known
    if report.when == "teardown":
        line = json.dumps([_ends.pop(report.nodeid), os.environ["EVIDENCE_CODE"], report.nodeid]) + "\n"
        descriptor = os.open(os.environ["EVIDENCE_TESTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
