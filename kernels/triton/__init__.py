"""The Triton backend: what fused_po's ops ask of a backend, with the kernels that do it.

unsupported    why a tensor cannot be served, or None
statistics     a row of logits to log-prob, entropy, lse, ...
score          the same, and the basis: the gradient of the label's log-prob in the logits
gradient       incoming gradients (or none: the basis) to a gradient in the logits
from_basis     the same from a kept basis, without the logits
pair_statistics, dpo, dpo_gradient    the same for DPO, fused
kl, kl_gradient    the exact KL of two rows of logits, and its gradient
merge_scores, merge_kl, mixture    whole rows' results out of those of parts of the vocabulary
policy         losses of tokens as PPO and GRPO have them, on request with the gradient in the logits' place
scale          times a number, for such a gradient
gae            rewards and values to generalised advantages and returns
"""

import torch

import triton

from .dpo import dpo, dpo_gradient, pair_statistics
from .gae import gae
from .gradient import from_basis, gradient, score
from .kl import kl, kl_gradient, mixture
from .policy import policy, scale
from .shards import merge_kl, merge_scores
from .statistics import statistics, statistics_kernel

__all__ = [
    "dpo", "dpo_gradient", "from_basis", "gae", "gradient", "kl", "kl_gradient", "merge_kl", "merge_scores", "mixture",
    "pair_statistics", "policy", "scale", "score", "statistics", "unsupported",
]  # fmt: skip

INTERPRETED = not isinstance(statistics_kernel, triton.runtime.JITFunction)
if INTERPRETED:
    from .interpreter import round_as_hardware

    round_as_hardware()


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype cannot be served, or None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {dtype} (the Triton kernels take float32, bfloat16 and float16)"
    if device.type == "cuda" or (device.type == "cpu" and INTERPRETED):
        return None
    return f"a {device.type} tensor (the Triton kernels run on CUDA, or on CPU under TRITON_INTERPRET=1)"
