"""TRL's trainers on fused_po's log-probs: `patch()` once before training, or `with patched():` around it.

The trainers keep their losses, metrics and options; what changes is how log-probs, entropies and the like are made of
hidden states and head. docs/integrations.md says which trainers, and what stays TRL's. `PaddingFreeDPOTrainer` is TRL's
DPOTrainer, its models run without padding.
"""

from fused_po.integrations.trl.patching import is_patched, patch, patched, unpatch

__all__ = ["PaddingFreeDPOTrainer", "is_patched", "patch", "patched", "unpatch"]


def __getattr__(name: str) -> type:
    """The trainer needs TRL, which the rest imports only when it is used."""
    if name == "PaddingFreeDPOTrainer":
        from fused_po.integrations.trl.padding_free import PaddingFreeDPOTrainer

        return PaddingFreeDPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
