"""Per-token outputs of the ops: the requested statistics, their fakes, and TokenStats for callers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend.interface import DIFFERENTIABLE, AuxRow, Outputs, RowStats, SavedRow, stats_dtype


class TokenStats(NamedTuple):
    """Per-token statistics, each shaped like the labels, fp32 (float64 for float64 inputs); None if not requested.

    z are the logits after scale, softcap and temperature, p is their softmax. Ignored positions give exactly 0.

    logps: log p of the label. Has gradients.
    entropy: -sum p log p, in nats. Has gradients.
    lse: log sum exp z. Has gradients.
    mean_logits: mean of z over the vocabulary.
    is_top1: bool, whether the label is the argmax (the first one in a tie).
    log_sum_sq_probs: log sum p^2.
    """

    logps: Optional[Tensor] = None
    entropy: Optional[Tensor] = None
    lse: Optional[Tensor] = None
    mean_logits: Optional[Tensor] = None
    is_top1: Optional[Tensor] = None
    log_sum_sq_probs: Optional[Tensor] = None


if TYPE_CHECKING:
    # At run time every result is a TokenStats. These tell a type checker which fields are not None.
    from typing_extensions import Unpack

    LogpsFirst = tuple[Literal["logps"], Unpack[tuple[str, ...]]]
    LogpsEntropy = tuple[Literal["logps"], Literal["entropy"], Unpack[tuple[str, ...]]]

    class LogpsStats(TokenStats):
        """The results of outputs=("logps", ...), the default."""

        logps: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    class EntropyStats(LogpsStats):
        """The results of outputs=("logps", "entropy", ...)."""

        entropy: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]


def outputs_of(names: tuple[str, ...]) -> Outputs:
    """The argument `outputs`, checked: names of TokenStats' fields."""
    if isinstance(names, str):
        raise TypeError(f"outputs: got the string {names!r}, expected a tuple of names such as ({names!r},)")
    asked = dict.fromkeys(checks.as_tuple("outputs", names, "names"), True)
    for name in asked:
        if name not in TokenStats._fields:
            checks.choice("outputs", name, TokenStats._fields)
    if not asked:
        raise ValueError(f"outputs: got an empty tuple, allowed are {', '.join(map(repr, TokenStats._fields))}")
    return Outputs(**asked)


def token_stats(stats: RowStats, outputs: Outputs, shape: torch.Size) -> TokenStats:
    """An op's statistics in the shape of the labels."""
    fields = [value.view(shape) if asked else None for _, value, asked in zip(DIFFERENTIABLE, stats, outputs)]
    if not any(outputs.auxiliary):
        return TokenStats(*fields)
    mean_logits, is_top1, log_sum_sq_probs = (
        row.detach().clone().view(shape) if asked else None for row, asked in zip(stats.aux, outputs.auxiliary)
    )
    return TokenStats(*fields, mean_logits, None if is_top1 is None else is_top1 > 0.5, log_sum_sq_probs)


def empty_stats(values: Tensor, n_rows, outputs: Outputs) -> RowStats:
    """Uninitialised statistics of n_rows rows of logits like `values`."""

    def new(*shape):
        return values.new_empty(shape, dtype=stats_dtype(values.dtype))

    logps, entropy, lse = (new(n_rows if asked else 0) for asked in outputs.differentiable)
    return RowStats(
        logps,
        entropy,
        lse,
        new(AuxRow.COUNT, n_rows) if any(outputs.auxiliary) else new(0),
        new(SavedRow.COUNT, n_rows),
    )


def with_entropy(stats: RowStats, outputs: Outputs) -> RowStats:
    """With a copy of the entropy as one more row of `saved`, if it is an output: a caller may edit the output."""
    return stats._replace(saved=torch.cat([stats.saved, stats.entropy[None]])) if outputs.entropy else stats


def without_entropy(saved: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """(saved [SavedRow.COUNT, N], entropy [N]); `saved` stands for an entropy that nothing reads."""
    return (saved[: SavedRow.COUNT], saved[SavedRow.COUNT]) if outputs.entropy else (saved, saved)
