"""Liger's chunked preference losses by fused_po, under Liger's names and with all of Liger's arguments.

    from fused_po.integrations.liger import LigerFusedLinearDPOLoss      # instead of liger_kernel.chunked_loss
    fused_po.integrations.liger.install()                                # or where Liger is imported by others

They are the classes of `fused_po.modules`, which say what differs; docs/integrations.md. Liger 0.8.5 need not be there.
As in Liger, arguments come by place or by name, and one that the loss does not read is accepted: it warns once.
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
HOW = ("compiled", "chunk_size")  # how Liger computes
READERS = {"DPO": liger.READERS, "GRPO": liger_grpo.READERS}
AFTER = {  # where those stand among Liger's arguments: behind which
    "CPO": {"compiled": "compute_nll_loss", "chunk_size": "average_log_prob"},
    "DPO": {"compiled": "compute_nll_loss", "chunk_size": "average_log_prob"},
    "GRPO": {"compiled": "beta", "chunk_size": "use_ref_model"},
    "KTO": {"compiled": "beta", "chunk_size": "average_log_prob"},
    "ORPO": {"compiled": "compute_nll_loss", "chunk_size": "compiled"},
    "SimPO": {"compiled": "compute_nll_loss", "chunk_size": "gamma"},
}


def _ligers_signature(name: str, ours: type) -> inspect.Signature:
    """Of the constructor, in Liger's order."""
    places = list(inspect.signature(ours).parameters.values())
    for argument, behind in AFTER[name].items():
        index = next(i for i, p in enumerate(places) if p.name == behind)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        places.insert(index + 1, inspect.Parameter(argument, kind, default=None))
    return inspect.Signature([p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in places])


def _unread_settings(name: str, loss_type: Optional[str]) -> dict[str, tuple[object, str]]:
    """What this loss, so constructed, does not read, for `at_defaults`."""
    found = READERS.get(name, {}).items()
    unread = {n: (default, f"loss_type in {of}") for n, (default, of) in found if loss_type not in of}
    if loss_type == "vespo":
        del unread["importance_sampling_level"]  # an error in Liger, too
    return unread


def _unread_in_call(name: str, settings: dict[str, Any]) -> dict[str, tuple[object, str]]:
    if name == "GRPO" and settings["loss_type"] not in liger_grpo.OF_STEP:
        return {"num_items_in_batch": (None, f"loss_type in {liger_grpo.OF_STEP}")}
    if name == "ORPO" and not settings["compute_nll_loss"]:
        return {"nll_target": (None, "compute_nll_loss=True")}
    return {}


def _with_ligers_arguments(name: str) -> type:
    """The class, with Liger's `compiled` and `chunk_size`, which say how Liger computes; asked for, they warn."""
    title, ours = f"LigerFusedLinear{name}Loss", getattr(modules, f"FusedLinear{name}Loss")

    def settle(given: dict[str, Any]) -> dict[str, Any]:
        for argument in HOW:
            value = given.pop(argument)
            if value is not None:
                warnings.warn(
                    f"{argument}={value} says how Liger computes and changes nothing in fused_po, which takes as many "
                    "tokens at a time as FUSED_PO_LOGITS_BUDGET allows; leave it out",
                    stacklevel=3,
                )
        return at_defaults(title, given, _unread_settings(name, given.get("loss_type")))

    made = accepting(
        title, ours, _ligers_signature(name, ours), settle,
        unread=lambda settings, given: _unread_in_call(name, settings),
        more="    `compiled` and `chunk_size` are taken and warn: they say how Liger computes.\n    ",
    )  # fmt: skip
    made.__module__ = __name__
    return made


LigerFusedLinearCPOLoss = _with_ligers_arguments("CPO")
LigerFusedLinearDPOLoss = _with_ligers_arguments("DPO")
LigerFusedLinearGRPOLoss = _with_ligers_arguments("GRPO")
LigerFusedLinearKTOLoss = _with_ligers_arguments("KTO")
LigerFusedLinearORPOLoss = _with_ligers_arguments("ORPO")
LigerFusedLinearSimPOLoss = _with_ligers_arguments("SimPO")
CLASSES = (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)


def install() -> None:
    """Put our classes where Liger's are, wherever they have been imported. Again: nothing.

    Raises:
        ImportError: Liger is not installed.
        RuntimeError: it lacks a class that is replaced. Nothing is changed then.
    """
    _swap.replace(("liger_kernel.chunked_loss", cls.__name__, cls) for cls in CLASSES)


def uninstall() -> None:
    """Give Liger its classes back."""
    _swap.undo()
