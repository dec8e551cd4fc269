"""The zoo: pure functions of log-probs, unreduced, in plain PyTorch."""

from fused_po.losses.divergence import kl_loss
from fused_po.losses.pairwise import dpo

__all__ = ["dpo", "kl_loss"]
