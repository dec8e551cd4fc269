"""The row passes in plain PyTorch: the backend for CPU tensors and for float64, and what the kernels must agree with.

The functions of `fused_po.backend.interface.Backend`, over blocks of rows small enough to stay in a core's cache.
Nothing here is [N, V] in size.
"""

from fused_po.reference.dpo import dpo, dpo_gradient, pair_statistics
from fused_po.reference.gae import gae
from fused_po.reference.gradient import from_basis, gradient
from fused_po.reference.kl import kl, kl_gradient, mixture
from fused_po.reference.policy import policy, scale
from fused_po.reference.shards import merge_kl, merge_scores
from fused_po.reference.statistics import score, statistics, unsupported

__all__ = [
    "dpo",
    "dpo_gradient",
    "from_basis",
    "gae",
    "gradient",
    "kl",
    "kl_gradient",
    "merge_kl",
    "merge_scores",
    "mixture",
    "pair_statistics",
    "policy",
    "scale",
    "score",
    "statistics",
    "unsupported",
]
