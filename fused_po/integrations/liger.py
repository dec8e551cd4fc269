"""Liger's chunked preference losses by fused_po, under Liger's names and with all of Liger's arguments.

    from fused_po.integrations.liger import LigerFusedLinearDPOLoss      # in the place of liger_kernel.chunked_loss
    fused_po.integrations.liger.install()                                # or where Liger is imported by others

They are the classes of `fused_po.modules`, which say what differs; docs/integrations.md. Liger 0.8.5 need not be there.
"""

from __future__ import annotations

import warnings
from typing import Any, Optional

from fused_po import modules
from fused_po.integrations.swap import Swap

_swap = Swap()


def _with_ligers_arguments(name: str) -> type:
    """The class, with Liger's `compiled` and `chunk_size`, which say how Liger computes; asked for, they warn."""
    ours = getattr(modules, f"FusedLinear{name}Loss")

    def __init__(
        self: Any, *args: Any, compiled: Optional[bool] = None, chunk_size: Optional[int] = None, **kwargs: Any
    ) -> None:
        for argument, value in (("compiled", compiled), ("chunk_size", chunk_size)):
            if value is not None:
                warnings.warn(
                    f"{argument}={value} says how Liger computes and changes nothing in fused_po, which takes as many "
                    "tokens at a time as FUSED_PO_LOGITS_BUDGET allows; leave it out",
                    stacklevel=2,
                )
        ours.__init__(self, *args, **kwargs)

    more = "    `compiled` and `chunk_size` are taken by name and warn: they say how Liger computes.\n    "
    members = {"__init__": __init__, "__doc__": f"{ours.__doc__}\n{more}", "__module__": __name__}
    return type(f"LigerFusedLinear{name}Loss", (ours,), members)


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
    """Put our classes in the place of Liger's, wherever they have been imported. Again: nothing.

    Raises:
        ImportError: Liger is not installed.
        RuntimeError: it lacks a class that is replaced. Nothing is changed then.
    """
    _swap.replace(("liger_kernel.chunked_loss", cls.__name__, cls) for cls in CLASSES)


def uninstall() -> None:
    """Give Liger its classes back."""
    _swap.undo()
