"""What a row of the zoo's table holds, and the loss and gradients that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

F64 = torch.float64


class Row(NamedTuple):
    """A loss of the zoo; test_zoo.py checks each row by hand, against its oracle, at extremes and by gradcheck.

    name: the function in fused_po.losses; case: its settings, for the name of the test.
    run: (*tensors) -> losses: the function with its settings bound.
    oracle: an independent implementation.
    values: inputs of an example worked out by hand, numbers or nested lists; expected: its losses.
    sample: () -> the inputs' random float64 values.
    grads: the indices of the inputs that get gradients. The others must get none.
    extremes: (log-ratio) -> fp32 inputs of a policy that far from its reference; None if the loss has no such inputs.
    peers: which libraries have this loss, and whether they agree or differ intentionally.
    true_gradient: False if something is held constant, so that the gradient is not that of the value.
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
    """Turn numbers into [1] tensors and nested lists into tensors of their shape; tensors are unchanged."""
    return [
        v if isinstance(v, Tensor) else torch.tensor([v] if isinstance(v, float) else v, dtype=dtype) for v in values
    ]


def with_gradients(row: Row, inputs: list) -> list:
    """The inputs, all with requires_grad, to check that some get no gradient."""
    return [v.detach().requires_grad_(v.is_floating_point()) for v in inputs]


def backward(row: Row, run, inputs: list) -> tuple[torch.Tensor, list]:
    """(losses, the gradients of their sum in the inputs, None where an input has none)."""
    inputs = with_gradients(row, inputs)
    value = run(*inputs)
    value.sum().backward()
    return value.detach(), [v.grad for v in inputs]
