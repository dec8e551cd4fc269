"""The plugin under axolotl's own plugin manager: `make integrations`."""

import pytest
import torch

base = pytest.importorskip("axolotl.integrations.base")

from axolotl.utils.dict import DictDefault  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

NAME = "fused_po.integrations.axolotl.FusedPOPlugin"


@pytest.fixture
def manager():
    found = base.PluginManager.get_instance()
    found.register(NAME)
    yield found
    found.plugins.clear()


@pytest.fixture
def model(seed):
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, **shape))


def test_supervised_training_is_fused(manager, model):
    ids = torch.randint(0, 53, (2, 7))
    expected = model(ids, labels=ids).loss
    cfg = DictDefault({"plugins": [NAME]})
    manager.pre_model_load(cfg)
    manager.post_model_load(cfg, model)
    out = model(ids, labels=ids)
    assert out.token_stats is not None and out.get("logits") is None
    torch.testing.assert_close(out.loss, expected)


def test_reward_models_are_not_changed(manager, model):
    manager.post_model_load(DictDefault({"reward_model": True}), model)
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits is not None


def test_rl_patches_trl(manager, model):
    trl = pytest.importorskip("fused_po.integrations.trl")
    utils = pytest.importorskip("trl.trainer.utils")
    before = utils._ChunkedLogProbFunction
    cfg = DictDefault({"rl": "dpo"})
    manager.pre_model_load(cfg)
    manager.post_model_load(cfg, model)
    try:
        assert utils._ChunkedLogProbFunction is not before
        assert "forward" not in vars(model)
    finally:
        trl.unpatch()
    assert utils._ChunkedLogProbFunction is before


def test_two_heads_are_refused(manager):
    with pytest.raises(ValueError, match="cut_cross_entropy: set together with FusedPOPlugin"):
        base.load_plugin(NAME).pre_model_load(DictDefault({"cut_cross_entropy": True}))


def test_an_unknown_plugin():
    with pytest.raises(AttributeError, match="has no attribute 'Plugin'; the plugin is FusedPOPlugin"):
        base.load_plugin("fused_po.integrations.axolotl.Plugin")
