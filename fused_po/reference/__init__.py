"""The row passes in plain PyTorch: the backend for CPU tensors and for float64, and what the kernels must agree with.

The same entry points as a kernel backend, over blocks of rows small enough to stay in a core's cache. Nothing here is
[N, V] in size.
"""

from fused_po.reference.divergence import kl, kl_gradient, mixture
from fused_po.reference.policy import policy, scale
from fused_po.reference.preference import dpo, dpo_gradient, pair_statistics
from fused_po.reference.rows import SAVED_FIELDS, from_basis, gradient, score, statistics, stats_dtype, unsupported
from fused_po.reference.scan import gae
from fused_po.reference.shards import merge_kl, merge_scores

__all__ = [
    "SAVED_FIELDS",
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
    "stats_dtype",
    "unsupported",
]
