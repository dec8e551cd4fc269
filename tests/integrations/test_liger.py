"""fused_po.integrations.liger in the installed Liger: `make integrations`, which also runs Liger's own tests."""

import pytest
import torch
from liger_batches import Batch

from fused_po import modules
from fused_po.integrations import liger

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")


def test_install_and_uninstall():
    theirs = chunked_loss.LigerFusedLinearDPOLoss
    from liger_kernel.chunked_loss import dpo_loss

    liger.install()
    try:
        liger.install()
        assert chunked_loss.LigerFusedLinearDPOLoss is liger.LigerFusedLinearDPOLoss
        assert dpo_loss.LigerFusedLinearDPOLoss is liger.LigerFusedLinearDPOLoss  # also imported into another module
    finally:
        liger.uninstall()
    assert chunked_loss.LigerFusedLinearDPOLoss is dpo_loss.LigerFusedLinearDPOLoss is theirs
    liger.uninstall()


def test_the_same_arguments_give_the_same_numbers(seed):
    batch, values = Batch(), []
    for cls in (liger.LigerFusedLinearDPOLoss, modules.FusedLinearDPOLoss, chunked_loss.LigerFusedLinearDPOLoss):
        hidden, weight, bias = batch.leaves()
        loss, _ = cls(beta=0.3)(weight, hidden, batch.target, bias, *batch.reference())
        values.append(loss)
    assert torch.equal(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


@pytest.mark.parametrize("cls", liger.CLASSES)
def test_arguments_about_how_liger_computes_warn(cls):
    with pytest.warns(UserWarning, match="compiled=False has no effect in fused_po"):
        cls(compiled=False)
    with pytest.warns(UserWarning, match="chunk_size=4 has no effect in fused_po"):
        cls(chunk_size=4)
