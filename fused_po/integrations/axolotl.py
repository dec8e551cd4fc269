"""A plugin for axolotl: supervised losses and the log-probs of its RL trainers are computed by fused_po.

    plugins:
      - fused_po.integrations.axolotl.FusedPOPlugin

axolotl imports the class by that name. Supervised training uses `integrations.transformers`. `rl:` uses
`integrations.trl`, which needs TRL 1.15 or later: axolotl 0.19 pins TRL 1.9, and 0.21 pins 1.14.1. Tested with
axolotl 0.19.0.
"""

from __future__ import annotations

from typing import Any


def _plugin() -> type:
    """The plugin class, created on first access because its base class is axolotl's."""
    from axolotl.integrations.base import BasePlugin

    class FusedPOPlugin(BasePlugin):
        """Fuses the LM head of the trained model; with `rl:`, patches TRL before the trainer is built."""

        def pre_model_load(self, cfg: Any) -> None:
            for option in ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy"):
                if cfg.get(option):
                    raise ValueError(
                        f"{option}: set together with FusedPOPlugin, but both replace the loss; remove one"
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
            f"rl: got {got!r} with FusedPOPlugin, which needs TRL >= 1.15 for it, but axolotl pins an older version "
            "(0.19: 1.9, 0.21: 1.14.1). Remove the plugin from this run, or install TRL >= 1.15 in spite of the pin, "
            f"which axolotl has not tested. Without rl: the plugin does not use TRL. ({error})"
        ) from error


def __getattr__(name: str) -> Any:
    if name != "FusedPOPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; the plugin is FusedPOPlugin")
    globals()[name] = _plugin()
    return globals()[name]
