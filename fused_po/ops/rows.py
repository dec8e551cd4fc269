"""Logits as rows for a backend, and gradients in a new tensor or in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_po.ops.autograd import transforms_active
from fused_po.ops.register import Op


def as_rows(logits: Tensor) -> Tensor:
    """logits [..., V] as [O, I, V] with contiguous columns; a view if two strides can describe the rows."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    leading = logits.shape[:-1]
    if len(leading) == 2:
        return logits
    try:
        return logits.view(1, leading.numel(), logits.shape[-1])
    except RuntimeError:
        inner = leading[-1]
        try:
            return logits.view(leading[:-1].numel(), inner, logits.shape[-1])
        except RuntimeError:
            return logits.reshape(1, leading.numel(), logits.shape[-1])


def on_rows(write: Callable[[Tensor, Tensor], None], logits: Tensor, out: Tensor) -> None:
    """write(rows of logits, rows of out), of one shape; out is logits itself, or contiguous."""
    rows = as_rows(logits)
    target = rows if out is logits else out if out.shape == rows.shape else out.view(rows.shape)
    write(rows, target)
    if out is logits and rows.data_ptr() != logits.data_ptr():  # the rows had to be copied
        logits.copy_(rows.view(logits.shape))


def empty_gradient(logits: Tensor, *_) -> Tensor:
    """Uninitialised, in the shape of the logits; also the fake of an op that returns their gradient."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class GradientOps(NamedTuple):
    """The two forms of a backward: one returns the gradient in the logits, one writes it over them."""

    beside: Op
    over: Op

    def __call__(self, inplace: bool, logits: Tensor, *arguments) -> Tensor:
        """The gradient; with inplace in the memory of the logits, except inside torch.func's transforms."""
        if not inplace or transforms_active():
            return self.beside(logits, *arguments)
        grad = logits.detach()
        self.over(grad, *arguments)
        return grad
