"""Every loss_type in the source of the installed TRL is supported; a new one fails this test."""

import pytest
import torch
from trl_source import compared_names, function, trainer

from fused_po import losses

B, T = 2, 3


def pairs():
    return [-torch.rand(B) for _ in range(4)]


def dpo(name):
    smoothing = 0.1 if name == "exo_pair" else 0.0
    lengths = {"chosen_length": torch.tensor([3, 4]), "rejected_length": torch.tensor([2, 1])}
    return losses.preference_loss(*pairs(), loss_type=name, label_smoothing=smoothing, **lengths)


def kto(name):
    kl = {} if name == "apo_zero_unpaired" else {"kl": torch.tensor(0.1)}
    return losses.kto(*pairs()[:2], torch.tensor([True, False]), **kl, loss_type=name)


def cpo(name):
    return losses.cpo(*pairs()[:2], loss_type=name, alpha=0.25 if name == "alphapo" else 0.0)


def tpo(name):
    return losses.tpo(*pairs()[:2], loss_type=name)


def sft(name):
    return losses.sft(-torch.rand(B, T), loss_type=name)


def grpo(name):
    logps = -torch.rand(B, T)
    return losses.grpo(logps, logps, torch.randn(B), torch.ones(B, T), loss_type=name)


# (the trainer's file, its function with the losses, our function for these names, names that are errors in TRL)
TRAINERS = [
    ("trainer/dpo_trainer.py", "_compute_loss", dpo, set()),
    ("trainer/kto_trainer.py", "_compute_loss", kto, set()),
    ("trainer/grpo_trainer.py", "_compute_loss", grpo, set()),
    ("trainer/sft_trainer.py", "__init__", sft, set()),
    ("experimental/cpo/cpo_trainer.py", "cpo_loss", cpo, set()),
    ("experimental/tpo/tpo_trainer.py", "_compute_loss", tpo, set()),
]


@pytest.mark.parametrize("path, method, ours, errors", TRAINERS, ids=[row[0].split("/")[-1] for row in TRAINERS])
def test_every_name_of_trl_is_supported(path, method, ours, errors):
    names = compared_names(function(trainer(path), method)) - errors
    assert names, f"no loss_type found in {path}: TRL now distinguishes its losses differently"
    for name in sorted(names):
        assert ours(name).isfinite().all(), name


def test_names_of_configurations():
    """Names that a TRL config replaces by others before the trainer reads them."""
    assert "alphapo" in compared_names(function(trainer("experimental/cpo/cpo_config.py"), "__post_init__"))
    assert cpo("alphapo").shape == (B,)


@pytest.mark.parametrize("ours", (dpo, kto, cpo, tpo, sft, grpo))
def test_the_error_of_an_unknown_name_suggests_the_nearest(ours):
    warned = 0
    for right in ("sigmoid", "kto", "dft", "dapo"):
        with pytest.raises(ValueError, match=r"loss_type: got '.*', allowed are") as error:
            ours(right + right[-1])
        if f"'{right}'" in str(error.value).split(";")[0]:
            assert f"did you mean '{right}'" in str(error.value)
            warned += 1
    assert warned == 1
