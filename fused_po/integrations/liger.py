"""Liger's chunked preference losses computed by fused_po, with Liger's names and all of its arguments.

    from fused_po.integrations.liger import LigerFusedLinearDPOLoss      # instead of liger_kernel.chunked_loss
    fused_po.integrations.liger.install()                                # or replace them where Liger is imported

The classes are those of `fused_po.modules`, whose docstrings list the differences; see also docs/integrations.md. The
imports work without Liger; install() needs it (0.8.5). As in Liger, arguments may be positional or named, and one that
the loss does not use is accepted; it warns once.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, Optional

from fused_po import modules
from fused_po.integrations.swap import Swap
from fused_po.integrations.unread import accepting, at_defaults
from fused_po.modules import liger, liger_grpo

_swap = Swap()
LIGER_ONLY = ("compiled", "chunk_size")  # arguments that control Liger's computation
USED_BY = {"DPO": liger.USED_BY, "GRPO": liger_grpo.USED_BY}
AFTER = {  # their position in Liger's signatures: the argument they follow
    "CPO": {"compiled": "compute_nll_loss", "chunk_size": "average_log_prob"},
    "DPO": {"compiled": "compute_nll_loss", "chunk_size": "average_log_prob"},
    "GRPO": {"compiled": "beta", "chunk_size": "use_ref_model"},
    "KTO": {"compiled": "beta", "chunk_size": "average_log_prob"},
    "ORPO": {"compiled": "compute_nll_loss", "chunk_size": "compiled"},
    "SimPO": {"compiled": "compute_nll_loss", "chunk_size": "gamma"},
}


def _liger_signature(name: str, ours: type) -> inspect.Signature:
    """The constructor's signature in Liger's order."""
    parameters = list(inspect.signature(ours).parameters.values())
    for argument, previous in AFTER[name].items():
        index = next(i for i, p in enumerate(parameters) if p.name == previous)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.insert(index + 1, inspect.Parameter(argument, kind, default=None))
    return inspect.Signature([p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in parameters])


def _unused_settings(name: str, loss_type: Optional[str]) -> dict[str, tuple[object, str]]:
    """The constructor's arguments that this loss_type does not use, for `at_defaults`."""
    settings = USED_BY.get(name, {}).items()
    unused = {
        n: (default, "loss_type " + ", ".join(map(repr, types)))
        for n, (default, types) in settings
        if loss_type not in types
    }
    if loss_type == "vespo":
        del unused["importance_sampling_level"]  # an error in Liger too
    return unused


def _unused_in_call(name: str, settings: dict[str, Any]) -> dict[str, tuple[object, str]]:
    """The forward's arguments that a loss with these settings does not use, for `at_defaults`."""
    if name == "GRPO" and settings["loss_type"] not in liger_grpo.STEP_MEANS:
        return {"num_items_in_batch": (None, "loss_type " + ", ".join(map(repr, liger_grpo.STEP_MEANS)))}
    if name == "ORPO" and not settings["compute_nll_loss"]:
        return {"nll_target": (None, "compute_nll_loss=True")}
    return {}


def _liger_class(name: str) -> type:
    """Our class with Liger's name and its arguments `compiled` and `chunk_size`, which have no effect and warn."""
    title, ours = f"LigerFusedLinear{name}Loss", getattr(modules, f"FusedLinear{name}Loss")

    def convert(arguments: dict[str, Any]) -> dict[str, Any]:
        for argument in LIGER_ONLY:
            value = arguments.pop(argument)
            if value is not None:
                warnings.warn(
                    f"{argument}={value} has no effect in fused_po; leave it out (FUSED_PO_LOGITS_BUDGET bounds how "
                    "much memory the loss may keep)",
                    stacklevel=3,
                )
        return at_defaults(title, arguments, _unused_settings(name, arguments.get("loss_type")))

    made = accepting(
        title,
        ours,
        _liger_signature(name, ours),
        convert,
        unused=lambda settings, arguments: _unused_in_call(name, settings),
        extra_doc="    `compiled` and `chunk_size`, which control Liger's computation, have no effect and warn.\n    ",
    )
    made.__module__ = __name__
    return made


LigerFusedLinearCPOLoss = _liger_class("CPO")
LigerFusedLinearDPOLoss = _liger_class("DPO")
LigerFusedLinearGRPOLoss = _liger_class("GRPO")
LigerFusedLinearKTOLoss = _liger_class("KTO")
LigerFusedLinearORPOLoss = _liger_class("ORPO")
LigerFusedLinearSimPOLoss = _liger_class("SimPO")
CLASSES = (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)


def install() -> None:
    """Replace Liger's classes by ours, also where they have been imported. A second call does nothing.

    Raises:
        ImportError: Liger is not installed.
        RuntimeError: Liger does not have one of the classes. Nothing is replaced then.
    """
    _swap.replace(("liger_kernel.chunked_loss", cls.__name__, cls) for cls in CLASSES)


def uninstall() -> None:
    """Restore Liger's classes."""
    _swap.undo()
