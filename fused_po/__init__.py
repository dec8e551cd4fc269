"""Fused log-probs and preference losses for training language models."""

from fused_po import losses, modules
from fused_po.backend.choose import backends
from fused_po.lm_head.chunked import chunked_loss
from fused_po.lm_head.dpo import linear_dpo
from fused_po.lm_head.kl import linear_kl
from fused_po.lm_head.logps import linear_logps
from fused_po.ops.dpo import DPOOutput, dpo_from_logits
from fused_po.ops.gae import gae
from fused_po.ops.kl import KLStats, kl_from_logits
from fused_po.ops.logps import logps_from_logits, shift_labels
from fused_po.ops.outputs import TokenStats
from fused_po.ops.policy import PolicyOutput, policy_loss_from_logits
from fused_po.parallel.vocab import VocabParallel
from fused_po.reduce import aggregate, sequence_logps, token_weights
from fused_po.schedule import Schedule

__version__ = "0.1.0"
__all__ = [
    "DPOOutput",
    "KLStats",
    "PolicyOutput",
    "Schedule",
    "TokenStats",
    "VocabParallel",
    "aggregate",
    "backends",
    "chunked_loss",
    "dpo_from_logits",
    "gae",
    "kl_from_logits",
    "linear_dpo",
    "linear_kl",
    "linear_logps",
    "logps_from_logits",
    "losses",
    "modules",
    "policy_loss_from_logits",
    "sequence_logps",
    "shift_labels",
    "token_weights",
]
