"""Complete default runs of sft.py, reward.py and kto.py; that of dpo.py is in test_dpo_script.py."""

import time
from pathlib import Path

import pytest
from example_runs import run, script

MINUTES = 60  # seconds


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto"])
def test_a_script_has_at_most_200_lines(name):
    assert len(Path(script(name).__file__).read_text().splitlines()) <= 200


@pytest.mark.slow
def test_supervised_fine_tuning_learns_to_answer(tmp_path):
    begin = time.time()
    shares = run("sft", [], tmp_path / "run")
    assert shares["before"]["correct"] == 0 and shares["after"]["correct"] >= 0.4
    assert shares["after"]["loss"] < 0.1 * shares["before"]["loss"]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert time.time() - begin < 5 * MINUTES


@pytest.mark.slow
def test_the_reward_model_ranks_right_above_wrong(tmp_path):
    begin = time.time()
    shares = run("reward", [], tmp_path / "run")
    assert shares["before"]["accuracy"] < 0.6
    assert shares["after"]["accuracy"] >= 0.85
    assert shares["after"]["calibration_error"] < 0.1
    assert (tmp_path / "run" / "calibration.png").stat().st_size > 10_000
    assert time.time() - begin < 5 * MINUTES


@pytest.mark.slow
def test_kto_learns_from_single_answers(tmp_path):
    begin = time.time()
    shares = run("kto", [], tmp_path / "run")
    assert shares["after"]["correct"] >= shares["before"]["correct"] + 0.1
    assert shares["after"]["auc"] > 0.9
    assert time.time() - begin < 5 * MINUTES
