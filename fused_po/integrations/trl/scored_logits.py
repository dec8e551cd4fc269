"""A stand-in for logits [..., V] that answers the operations of TRL's loss code from statistics of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
INSTEAD = "call fused_po.integrations.trl.unpatch() so that TRL computes its logits, and report this to fused_po"


class ScoredLogits:
    """Replaces logits [..., V]; only the label of each row was scored.

    It can be sliced, reshaped and detached like logits, and supports the operations of the trainers in experimental.py:
    the log-prob of the label, cross-entropy with the label, entropy, the mean, and whether the label is the argmax. All
    other operations raise TypeError. The log-prob of a token that is not the row's label is NaN.
    """

    def __init__(self, n_vocab: int, rows: dict[str, Optional[Tensor]], normalized: bool = False) -> None:
        """rows: "labels" and "log_probs"; "entropy", "mean_logits" and "is_top1", which may be None. Each is [...]."""
        self.n_vocab, self.rows, self.normalized = n_vocab, rows, normalized

    def _of_each(self, change: Callable[[Tensor], Tensor]) -> ScoredLogits:
        rows = {name: None if value is None else change(value) for name, value in self.rows.items()}
        return ScoredLogits(self.n_vocab, rows, self.normalized)

    def _row(self, name: str) -> Tensor:
        value = self.rows[name]
        if value is None:
            raise TypeError(f"fused_po: {name} was not computed for these logits; {INSTEAD}")
        return value

    # Shape operations.

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows["labels"].shape, self.n_vocab))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return self.rows["labels"].device

    def __getitem__(self, index: Any) -> ScoredLogits:
        index = index if isinstance(index, tuple) else (index,)
        at = next((i for i, part in enumerate(index) if part is Ellipsis), None)
        if at is not None:
            whole = [slice(None)] * (self.ndim - len(index) + 1)
            index = (*index[:at], *whole, *index[at + 1 :])
        if len(index) == self.ndim:
            *index, last = index
            if not (isinstance(last, slice) and last == slice(None)):
                self._refuse("a part of the vocabulary")
        return self._of_each(lambda value: value[tuple(index)])

    def view(self, *shape: int) -> ScoredLogits:
        if shape[-1] != self.n_vocab:
            self._refuse(f"view{shape}")
        return self._of_each(lambda value: value.reshape(shape[:-1]))

    def chunk(self, chunks: int, dim: int = 0) -> list[ScoredLogits]:
        if not 0 <= dim < self.ndim - 1:
            self._refuse(f"chunk(dim={dim})")
        pieces = {name: None if v is None else v.chunk(chunks, dim) for name, v in self.rows.items()}
        count = len(pieces["labels"])
        each = [{name: None if v is None else v[i] for name, v in pieces.items()} for i in range(count)]
        return [ScoredLogits(self.n_vocab, rows, self.normalized) for rows in each]

    def contiguous(self) -> ScoredLogits:
        return self

    def detach(self) -> ScoredLogits:
        return self._of_each(Tensor.detach)

    # Operations on the values.

    def log_probs(self, index: Tensor) -> Tensor:
        """[...] log-prob of index [...] where it is the label, NaN for other tokens; 0 where TRL masks the row later.

        TRL masks rows without a scored label, and rows where it replaces an ignored label by token 0.
        """
        labels, logps = self.rows["labels"], self.rows["log_probs"]
        masked = (labels == IGNORE) | ((index == 0) & (labels != 0))
        return torch.where(index == labels, logps, torch.where(masked, 0.0, torch.nan))

    def log_probs_and_entropy(
        self, index: Tensor, temperature: float, row_mask: Optional[Tensor]
    ) -> tuple[Tensor, Optional[Tensor]]:
        if temperature != 1.0:
            self._refuse(f"temperature={temperature}")
        logps, entropy = self.log_probs(index), self.rows["entropy"]
        if row_mask is not None:
            logps = logps.masked_fill(row_mask == 0, 0.0)
            entropy = None if entropy is None else entropy.masked_fill(row_mask == 0, 0.0)
        return logps, entropy

    def log_softmax(self, dim: int) -> ScoredLogits:
        self._last(dim)
        return ScoredLogits(self.n_vocab, self.rows, normalized=True)

    def mean(self, dim: Optional[int] = None) -> Tensor:
        mean = self._row("mean_logits")
        if dim is None:
            return mean.mean()
        self._last(dim)
        return mean

    def argmax(self, dim: int) -> Tensor:
        """[...]: the label where it is the argmax, -1 where another token is."""
        self._last(dim)
        return torch.where(self._row("is_top1"), self.rows["labels"], -1)

    # Functions of torch.

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Tensor:
        if func is F.cross_entropy:
            return cls._cross_entropy(*args, **(kwargs or {}))
        if func is torch.take_along_dim:
            return cls._take_along_dim(*args, **(kwargs or {}))
        name = torch.overrides.resolve_name(func) or func
        raise TypeError(f"fused_po: TRL calls {name} on logits, which is not supported; {INSTEAD}")

    def _cross_entropy(self, target: Tensor, ignore_index: int = IGNORE, **options: Any) -> Tensor:
        defaults = {"weight": None, "size_average": None, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}
        for name, value in options.items():
            if value != defaults.get(name, value):
                self._refuse(f"cross_entropy({name}={value!r})")
        kept = target != ignore_index
        logps = torch.where(target == self.rows["labels"], self.rows["log_probs"], torch.nan)
        return -torch.where(kept, logps, 0).sum() / kept.sum()

    def _take_along_dim(self, indices: Tensor, dim: int) -> Tensor:
        self._last(dim)
        if not self.normalized or indices.shape[-1] != 1:
            self._refuse("take_along_dim other than for one token of a log_softmax")
        return self.log_probs(indices.squeeze(-1)).unsqueeze(-1)

    def _last(self, dim: int) -> None:
        if dim not in (-1, self.ndim - 1):
            self._refuse(f"dim={dim}")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(f"fused_po: TRL uses {what} on logits, which is not supported; {INSTEAD}")
