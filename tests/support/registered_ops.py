"""The package's ops by name, called through PyTorch's dispatcher with the arguments that the package passes."""

import torch

from fused_po.ops.register import Op, registered


def op(name: str) -> Op:
    """The op fused_po::<name>."""
    return {op.name: op for op in registered}[f"fused_po::{name}"]


def dispatched(name: str, *arguments):
    """The op's results."""
    return op(name).results(getattr(torch.ops.fused_po, name)(*op(name).flattened(arguments)))


def opcheck(name: str, *arguments) -> None:
    """torch.library.opcheck of the op."""
    torch.library.opcheck(getattr(torch.ops.fused_po, name).default, op(name).flattened(arguments))
