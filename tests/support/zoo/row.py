"""What a row of the zoo's table holds, and the loss and gradients that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

F64 = torch.float64


class Row(NamedTuple):
    """A loss of the zoo; test_zoo.py holds every row against its oracle, by hand, at extremes, and by gradcheck.

    name: of the function in fused_po.losses; case: which of its settings, for the test's name.
    run: (*tensors) -> losses: the function with its settings bound.
    oracle: the same in the test's own words.
    values: inputs worked through by hand, numbers or nested lists; expected: what the loss gives for them.
    sample: () -> the inputs' random float64 values.
    grads: the numbers of the inputs that carry gradients. The others must get none.
    extremes: (log-ratio) -> fp32 inputs of a policy that far from its reference; None where the loss has no such.
    peers: who in the field has this loss, and whether it agrees or, on purpose, differs.
    true_gradient: False where something is held constant, so that the gradient is not that of the value.
    """

    name: str
    case: str
    run: Callable
    oracle: Callable
    values: tuple
    expected: object
    sample: Callable
    grads: tuple[int, ...]
    extremes: Callable | None
    peers: str
    true_gradient: bool = True

    @property
    def id(self) -> str:
        return f"{self.name}-{self.case}" if self.case else self.name


def tensors(values: tuple, dtype: torch.dtype = F64) -> list[Tensor]:
    """Numbers become [1] tensors, nested lists tensors of their shape; a tensor stays."""
    return [
        v if isinstance(v, Tensor) else torch.tensor([v] if isinstance(v, float) else v, dtype=dtype) for v in values
    ]


def with_gradients(row: Row, inputs: list) -> list:
    """The inputs, all of which require grad, so that those which must get none can be seen to."""
    return [v.detach().requires_grad_(v.is_floating_point()) for v in inputs]


def backward(row: Row, run, inputs: list) -> tuple[torch.Tensor, list]:
    """(losses, the gradients of their sum in the inputs; None where there is none)."""
    inputs = with_gradients(row, inputs)
    value = run(*inputs)
    value.sum().backward()
    return value.detach(), [v.grad for v in inputs]
