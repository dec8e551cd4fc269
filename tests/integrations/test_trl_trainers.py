"""Five steps of each TRL trainer, stock and patched: losses, metrics, gradients, weights."""

import pytest
from peft import PromptTuningConfig
from tiny_trl import assert_equal_training
from trl_source import compared_names, function
from trl_source import trainer as source
from trl_trainers import a2po, cpo, dpo, grpo, kto, lora, online_dpo, orpo, rloo, sft, tpo


def losses_of(file: str, name: str) -> list[str]:
    """The trainer's loss_type names, as its source compares with them."""
    return sorted(compared_names(function(source(file), name)))


SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}


@pytest.mark.parametrize("loss_type", losses_of("trainer/dpo_trainer.py", "_compute_loss"))
def test_dpo(loss_type, tmp_path):
    assert_equal_training(dpo(tmp_path, loss_type=loss_type, label_smoothing=SMOOTHED.get(loss_type, 0.0)))


@pytest.mark.parametrize("loss_type", losses_of("trainer/kto_trainer.py", "_compute_loss"))
def test_kto(loss_type, tmp_path):
    assert_equal_training(kto(tmp_path, loss_type=loss_type))


@pytest.mark.parametrize("loss_type", losses_of("trainer/sft_trainer.py", "__init__"))
def test_sft(loss_type, tmp_path):
    assert_equal_training(sft(tmp_path, loss_type=loss_type))


@pytest.mark.parametrize("loss_type", losses_of("trainer/grpo_trainer.py", "_compute_loss"))
def test_grpo(loss_type, tmp_path):
    level = "sequence" if loss_type == "luspo" else "token"
    assert_equal_training(grpo(tmp_path, loss_type=loss_type, importance_sampling_level=level))


def test_rloo(tmp_path):
    assert_equal_training(rloo(tmp_path))


@pytest.mark.parametrize("loss_type", losses_of("experimental/cpo/cpo_trainer.py", "cpo_loss"))
def test_cpo(loss_type, tmp_path):
    assert_equal_training(cpo(tmp_path, loss_type=loss_type))


def test_orpo(tmp_path):
    assert_equal_training(orpo(tmp_path))


@pytest.mark.parametrize("loss_type", losses_of("experimental/tpo/tpo_trainer.py", "_compute_loss"))
def test_tpo(loss_type, tmp_path):
    assert_equal_training(tpo(tmp_path, loss_type=loss_type))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_online_dpo(loss_type, tmp_path):
    assert_equal_training(online_dpo(tmp_path, loss_type=loss_type))


def test_a2po(tmp_path):
    assert_equal_training(a2po(tmp_path))


@pytest.mark.parametrize("trainer", [dpo, sft, grpo, rloo, cpo, orpo, tpo, online_dpo], ids=lambda f: f.__name__)
def test_lora(trainer, tmp_path):
    """The head is frozen; the reference is the model without its adapters."""
    assert_equal_training(trainer(tmp_path, peft_config=lora(), learning_rate=0.5))


@pytest.mark.parametrize("trainer", [dpo, sft], ids=lambda f: f.__name__)
def test_prompt_learning(trainer, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_equal_training(trainer(tmp_path, peft_config=config, learning_rate=0.5))


@pytest.mark.parametrize("trainer", [dpo, kto, sft, grpo, rloo, cpo, tpo, online_dpo], ids=lambda f: f.__name__)
def test_gradient_accumulation(trainer, tmp_path):
    assert_equal_training(trainer(tmp_path, gradient_accumulation_steps=2))
