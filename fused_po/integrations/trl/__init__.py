"""TRL's trainers with fused_po's log-probs: call `patch()` once before training, or train inside `with patched():`.

The trainers keep their losses, metrics and options; only the computation of log-probs, entropies and similar statistics
from hidden states and LM head changes. docs/integrations.md lists the trainers and what is not replaced.
`PaddingFreeDPOTrainer` is TRL's DPOTrainer running its models without padding.
"""

from fused_po.integrations.trl.patching import is_patched, patch, patched, unpatch

__all__ = ["PaddingFreeDPOTrainer", "is_patched", "patch", "patched", "unpatch"]


def __getattr__(name: str) -> type:
    """Import the trainer on first access: it needs TRL at import, unlike the rest of this module."""
    if name == "PaddingFreeDPOTrainer":
        from fused_po.integrations.trl.padding_free import PaddingFreeDPOTrainer

        return PaddingFreeDPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
