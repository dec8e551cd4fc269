"""A plugin for axolotl: its models' losses from hidden states, its RL trainers' log-probs by fused_po.

    plugins:
      - fused_po.integrations.axolotl.FusedPOPlugin

axolotl imports the class by that name. Supervised training goes through `integrations.transformers`, `rl:` through
`integrations.trl`, which needs TRL 1.15 or later: axolotl 0.19 pins TRL 1.9, and 0.21 pins 1.14.1. Written for
axolotl 0.19.
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
                _patch_trl(cfg.get("rl"))

        def post_model_load(self, cfg: Any, model: Any) -> None:
            if not cfg.get("rl") and not cfg.get("reward_model"):
                from fused_po.integrations.transformers import fuse_lm_head

                fuse_lm_head(model, always=True)

    FusedPOPlugin.__module__ = __name__
    return FusedPOPlugin


def _patch_trl(rl: Any) -> None:
    from fused_po.integrations import trl

    try:
        trl.patch()
    except RuntimeError as error:
        got = str(getattr(rl, "value", rl))
        raise RuntimeError(
            f"rl: got {got!r} with FusedPOPlugin, which needs TRL >= 1.15 there, and axolotl pins an older one (0.19: "
            "1.9, 0.21: 1.14.1). Leave the plugin out of this run, or install such a TRL over the pin, which axolotl "
            f"has not tested; without rl: the plugin needs no TRL. ({error})"
        ) from error


def __getattr__(name: str) -> Any:
    if name != "FusedPOPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; the plugin is FusedPOPlugin")
    globals()[name] = _plugin()
    return globals()[name]
