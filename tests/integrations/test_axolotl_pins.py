"""The axolotl plugin with the TRL version that axolotl pins: `rl:` raises an error. axolotl itself is a stand-in."""

import importlib
import os
import sys
import types

import pytest
import torch
from repository import ROOT, python
from transformers import LlamaConfig, LlamaForCausalLM

trl = pytest.importorskip("trl")
PINNED = ("1.9.0", "1.14.1")  # pinned by axolotl 0.19 and 0.21
NEEDS = r"rl: got 'dpo' with FusedPOPlugin, which needs TRL >= 1\.15 .*Remove the plugin.*got version {}"
BASE = """
import sys, types
base = types.ModuleType("axolotl.integrations.base")
base.BasePlugin = type("BasePlugin", (), {})
for name in ("axolotl", "axolotl.integrations"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["axolotl.integrations.base"] = base
"""


@pytest.fixture
def plugin(monkeypatch):
    """The plugin on a base class like axolotl's."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    module = importlib.import_module("fused_po.integrations.axolotl")
    yield module.FusedPOPlugin()
    vars(module).pop("FusedPOPlugin", None)


@pytest.mark.parametrize("version", PINNED)
def test_rl_with_the_pinned_trl(version, plugin, monkeypatch):
    from fused_po.integrations.trl import is_patched

    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(RuntimeError, match=NEEDS.format(version.replace(".", r"\."))):
        plugin.pre_model_load({"rl": "dpo"})
    assert not is_patched()


def test_supervised_training_with_the_pinned_trl(plugin, monkeypatch):
    """Supervised training does not need TRL."""
    monkeypatch.setattr(trl, "__version__", PINNED[0])
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model, ids = LlamaForCausalLM(LlamaConfig(vocab_size=53, **shape)), torch.randint(0, 53, (2, 7))
    expected = model(ids, labels=ids).loss
    plugin.pre_model_load({})
    plugin.post_model_load({}, model)
    out = model(ids, labels=ids)
    assert out.token_stats is not None
    torch.testing.assert_close(out.loss, expected)


def test_rl_with_a_supported_trl(plugin):
    from fused_po.integrations.trl import is_patched, unpatch

    plugin.pre_model_load({"rl": "dpo"})
    try:
        assert is_patched()
    finally:
        unpatch()


CODE = """
import trl
assert trl.__version__ == "1.14.1", trl.__version__
from fused_po.integrations.axolotl import FusedPOPlugin
try:
    FusedPOPlugin().pre_model_load({"rl": "dpo"})
except RuntimeError as error:
    print(error)
"""


def test_the_real_pinned_trl(tmp_path):
    """Needs FUSED_PO_TRL_1_14, a folder made by `pip install --no-deps --target FOLDER trl==1.14.1`."""
    folder = os.environ.get("FUSED_PO_TRL_1_14")
    if not folder:
        pytest.skip("FUSED_PO_TRL_1_14 names no folder with TRL 1.14.1")
    path = os.pathsep.join((folder, str(ROOT)))
    warned = python(BASE + CODE, tmp_path, {"PYTHONPATH": path})
    assert "needs TRL >= 1.15" in warned and "got version 1.14.1" in warned
