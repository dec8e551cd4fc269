"""TRL's trainers on fused_po's log-probs: `patch()` once before training, or `with patched():` around it.

The trainers keep their losses, metrics and options; what changes is how log-probs, entropies and the like are made of
hidden states and head. docs/integrations.md says which trainers, and what stays TRL's.
"""

from fused_po.integrations.trl.seam import patch, patched, unpatch

__all__ = ["patch", "patched", "unpatch"]
