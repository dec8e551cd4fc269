"""Losses as nn.Modules with the call signatures of Liger and OpenRLHF."""

from fused_po.modules.liger import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)
from fused_po.modules.liger_grpo import FusedLinearGRPOLoss
from fused_po.modules.openrlhf import (
    DPOLoss,
    GPTLMLoss,
    LogExpLoss,
    PairWiseLoss,
    PolicyLoss,
    SFTLoss,
    ValueLoss,
)

__all__ = [
    "DPOLoss",
    "FusedLinearCPOLoss",
    "FusedLinearDPOLoss",
    "FusedLinearGRPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearORPOLoss",
    "FusedLinearSimPOLoss",
    "GPTLMLoss",
    "LogExpLoss",
    "PairWiseLoss",
    "PolicyLoss",
    "SFTLoss",
    "ValueLoss",
]
