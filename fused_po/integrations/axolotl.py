"""A plugin for axolotl: its models' losses from hidden states, its RL trainers' log-probs by fused_po.

    plugins:
      - fused_po.integrations.axolotl.FusedPOPlugin

axolotl imports the class by that name. Supervised training goes through `integrations.transformers`, `rl:` through
`integrations.trl`. Written for axolotl 0.19.
"""

from __future__ import annotations

from typing import Any


def _plugin() -> type:
    """The class, made when axolotl asks for it: its base is axolotl's."""
    from axolotl.integrations.base import BasePlugin

    class FusedPOPlugin(BasePlugin):
        """Fuses the LM head of the model that is trained; with `rl:`, patches TRL before its trainer is built."""

        def pre_model_load(self, cfg: Any) -> None:
            for option in ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy"):
                if cfg.get(option):
                    raise ValueError(
                        f"{option}: is set beside FusedPOPlugin, and both replace the loss head; leave one of them out"
                    )
            if cfg.get("rl"):
                from fused_po.integrations import trl

                trl.patch()

        def post_model_load(self, cfg: Any, model: Any) -> None:
            if not cfg.get("rl") and not cfg.get("reward_model"):
                from fused_po.integrations.transformers import fuse_lm_head

                fuse_lm_head(model, always=True)

    FusedPOPlugin.__module__ = __name__
    return FusedPOPlugin


def __getattr__(name: str) -> Any:
    if name != "FusedPOPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; the plugin is FusedPOPlugin")
    globals()[name] = _plugin()
    return globals()[name]
