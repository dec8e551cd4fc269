"""The end-to-end benchmark: its search for the longest sequence, and that wrong losses are not timed."""

import contextlib

import pytest
import training
from tiny_trl import PlainHead, utils


def test_the_longest_sequence_that_fits():
    for most, limit, expected in ((256, 130, 128), (256, 10**9, 256), (256, 10, 0), (4096, 64, 64)):
        assert training.longest(lambda n, limit=limit: n <= limit, most) == expected


@pytest.mark.slow
def test_a_case_is_measured():
    (case,) = training.suite("tiny")
    reports = training.compare(case, "cpu")
    assert list(reports) == list(training.PROVIDERS)
    assert all(report["seconds a step"] > 0 and report["peak bytes"] > 0 for report in reports.values())
    assert reports["fused_po"]["peak bytes"] < reports["TRL"]["peak bytes"]
    assert reports["fused_po"]["longest"] > reports["TRL"]["longest"]
    assert training.table(case, reports).count("\n") == 4


@pytest.mark.slow
def test_wrong_losses_are_not_timed(monkeypatch):
    class Off(PlainHead):
        @staticmethod
        def apply(*args):
            logps, *others = PlainHead.apply(*args)
            return logps * 1.01, *others

    @contextlib.contextmanager
    def provided(name):
        with monkeypatch.context() as changed:
            if name != "TRL":
                changed.setattr(utils, "_ChunkedLogProbFunction", Off)
            yield

    monkeypatch.setattr(training, "provided", provided)
    (case,) = training.suite("tiny")
    reports = training.compare(case, "cpu")
    assert "seconds a step" in reports["TRL"]
    assert reports["fused_po"]["wrong"].startswith("losses differ") and "seconds a step" not in reports["fused_po"]
    assert "**wrong: losses differ" in training.table(case, reports)
