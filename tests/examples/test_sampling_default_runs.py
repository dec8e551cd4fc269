"""Complete default runs of ppo.py, grpo.py, online_dpo.py and pipeline.py, and pipeline.py's comparison."""

import importlib.util
import time
from pathlib import Path

import pytest
from example_runs import EXAMPLES, metrics, run, script, small_data

MINUTES = 60  # seconds


@pytest.fixture(scope="module")
def whole():
    """examples/pipeline.py as a module."""
    found = importlib.util.spec_from_file_location("whole_pipeline", EXAMPLES / "pipeline.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_learning_rates_of_the_stages(whole):
    """Stages of the tiny Llama use its rates, although it comes by --model; a user's model has the script's rates."""
    for given, rates in (((), (1e-3, 5e-4, 1e-3)), (("--model", "m"), (1e-5, 3e-6, 1e-6))):
        args = whole.parse([*given, "--output", "none"])
        stages = ("reward", "ppo", "dpo")
        words = [whole.words_of(name, args, Path("none"), model="m") for name in stages]
        assert tuple(script(name).parse(flags).lr for name, flags in zip(stages, words)) == rates


def test_a_stage_that_was_stopped_is_resumed(whole, tmp_path):
    args = whole.parse(["--output", str(tmp_path / "none")])
    assert "--resume" not in whole.words_of("dpo", args, tmp_path)
    (tmp_path / "checkpoint-00000020").mkdir()
    assert "--resume" in whole.words_of("dpo", args, tmp_path)


@pytest.mark.parametrize("name", ["ppo", "grpo", "online_dpo", "pipeline"])
def test_a_script_has_at_most_200_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 200


def test_comparison_at_equal_kl(whole):
    curves = {
        "PPO": [(0.0, 0.5), (0.2, 0.6), (0.9, 0.55), (0.6, 0.9), (1.2, 0.95)],
        "DPO": [(0.0, 0.5), (0.3, 0.7), (0.5, 0.8)],
    }
    compared = whole.compare(curves, questions=10_000)
    assert [budget for budget, _, _ in compared] == pytest.approx([0.5 * (i + 1) / 6 for i in range(6)])
    for budget, shares, wins in compared:
        best = {name: max(y for x, y in points if x <= budget) for name, points in curves.items()}
        assert shares == best
        assert wins == ("equal" if best["PPO"] == best["DPO"] else max(best, key=best.get))
    assert {wins for *_, wins in compared} == {"PPO", "DPO", "equal"}
    assert whole.verdict({"PPO": 0.9, "DPO": 0.8}, questions=300) == "PPO"  # 2 standard errors are 0.058
    assert whole.verdict({"PPO": 0.85, "DPO": 0.8}, questions=300) == "equal"


def test_the_pipeline_runs_its_stages_and_continues(whole, tmp_path, monkeypatch, capsys):
    short = "--steps 2 --batch-size 4 --eval-every 1"
    flags = [f"--{stage}-flags={short}" for stage in ("sft", "ppo", "dpo")]
    flags += [f"--reward-flags={short} --samples 3 --max-completion-length 6", "--output", str(tmp_path / "run")]
    words = [*small_data(tmp_path, train=20), "--sft-flags=--steps 60 --batch-size 16 --eval-every 30", *flags[1:]]
    monkeypatch.setattr(whole.dpo, "train", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # stopped halfway
        whole.train(whole.parse(words))
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"--output: .* already exists; give --resume to continue"):
        whole.parse(words)
    monkeypatch.setattr(whole.ppo, "train", None)  # already done
    compared = whole.train(whole.parse([*words, "--resume"]))
    assert "--- dpo" in capsys.readouterr().out and len(compared) == 6
    assert (tmp_path / "run" / "pipeline.png").stat().st_size > 5_000
    assert {"eval_kl", "eval_correct"} <= metrics(tmp_path / "run" / "dpo")[-1].keys()


ENDS = {"ppo": ("objective/scores", 1.5), "grpo": ("reward", 1.5), "online_dpo": ("reward", 1.5)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_answers_become_right_at_a_bounded_kl(name, tmp_path):
    begin = time.time()
    shares = run(name, [], tmp_path / "run")
    assert shares["before"]["kl"] == 0
    assert shares["after"]["correct"] >= shares["before"]["correct"] + 0.2
    reward, nats = ENDS[name]
    rows = [row for row in metrics(tmp_path / "run") if reward in row]
    first, last = (sum(row[reward] for row in part) / len(part) for part in (rows[:10], rows[-10:]))
    assert last > first + 0.05
    assert all(row["eval_kl"] < nats for row in rows if "eval_kl" in row)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert time.time() - begin < 5 * MINUTES


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_the_kl_in_ppos_loss_acts_like_the_kl_in_the_reward(estimator, tmp_path):
    shares = run("ppo", ["--kl-in", "loss", "--kl-estimator", estimator], tmp_path / "run")
    assert shares["after"]["correct"] >= shares["before"]["correct"] + 0.15
    assert shares["after"]["kl"] < 1.5


@pytest.mark.slow
def test_the_whole_pipeline(whole, tmp_path):
    begin = time.time()
    compared = whole.train(whole.parse(["--output", str(tmp_path / "run")]))
    assert time.time() - begin < 12 * MINUTES
    assert compared[-1][0] > 0.1 and max(compared[-1][1].values()) > 0.7
    for name, nats in (("ppo", 1.5), ("dpo", 6)):  # only PPO's reward limits the KL
        points = whole.curve(tmp_path / "run" / name)
        assert max(share for _, share in points) >= 0.65 and all(kl < nats for kl, _ in points)
