"""benchmarks/kl_variance.py on a briefly trained policy: means and errors of KL estimates over the same rollouts."""

import sys

import kl_variance
import pytest
import torch
from repository import ROOT

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import dpo  # noqa: E402
from trainer import comparisons  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of examples/dpo.py."""
    folder = tmp_path_factory.mktemp("kl")
    words = ["--output", str(folder / "run"), "--sft-steps", "12", "--steps", "6", "--batch-size", "8"]
    for option, source, count in (("--dataset", comparisons.TRAIN, 200), ("--test-dataset", comparisons.TEST, 10)):
        (folder / source.name).write_text("\n".join(source.read_text().splitlines()[:count]))
        words += [option, str(folder / source.name)]
    dpo.train(dpo.parse([*words, "--device", "cpu"]))
    return folder / "run"


def test_unbiased_estimates_agree_and_the_exact_kl_errs_least(run):
    values, added, lengths = kl_variance.study(run, rollouts=600, seed=0, longest=12)
    assert all(value.shape == (600,) and value.dtype == torch.float64 for value in values.values())
    assert values["exact"].mean() > 0.05 and (values["exact"] >= 0).all() and lengths.max() <= 12
    for kind in ("k1", "k3"):
        apart = values[kind] - values["exact"]
        assert abs(apart.mean()) < 4 * (apart.var() / 600).sqrt(), kind
        assert values[kind].var() > values["exact"].var(), kind
    # sampling adds the variance of a martingale, which matches the measured one for k1, since k1 has no long tail
    measured = (values["k1"] - values["exact"]).var()
    assert measured / added["k1"].mean() == pytest.approx(1, abs=0.3)
    assert (added["exact"] == 0).all() and added["k3"].mean() < added["k1"].mean()


def test_the_table(run, capsys):
    kl_variance.main([str(run), "--rollouts", "20", "--seed", "3"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("20 rollouts, seed 3, ")
    assert [line.split()[1] for line in printed[4:]] == ["exact", "k1", "k2", "k3"]
    assert {line.count("|") for line in printed[2:]} == {7}


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no finished run; make one with python examples/dpo.py --output"):
        kl_variance.main([str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--rollouts: got 1, expected at least 2"):
        kl_variance.main([str(tmp_path), "--rollouts", "1"])
