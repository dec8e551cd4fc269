"""The replacements for TRL's functions: log-probs, entropies and other statistics of tokens, computed by fused_po."""

from __future__ import annotations

import contextlib
import warnings
from contextvars import ContextVar
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.integrations.probe import Processing
from fused_po.integrations.trl.scored_logits import ScoredLogits
from fused_po.lm_head.logps import linear_logps
from fused_po.ops.logps import logps_from_logits
from fused_po.schedule import Schedule

IGNORE = -100
DEVICES = ("cpu", "cuda")  # on other devices TRL's own code runs
# TRL's output name -> the field of TokenStats, in the order of TRL's results.
OUTPUTS = {
    "log_probs": "logps",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}


class Request(NamedTuple):
    """What to compute for the rows that reach the head, for a trainer that uses logits. See experimental.py."""

    labels: Tensor  # one per row, -100 where only the mean logit is needed
    outputs: tuple[str, ...]
    processing: Processing  # scale and softcap of the logits as measured; TRL reads them from the config by name


REQUEST: ContextVar[Optional[Request]] = ContextVar("request", default=None)


def why_stock(weight: Tensor) -> Optional[str]:
    """Why TRL's own code must be used for this head, or None."""
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 releases the head between forward and backward"
    if weight.device.type not in DEVICES:
        return f"the head is on {weight.device}, supported are {' and '.join(DEVICES)}"
    return None


class Scoring:
    """The functions that replace those of TRL. Attributes `stock_...` hold TRL's own functions."""

    def __init__(self, utils: Any, schedule: Schedule) -> None:
        self.schedule = schedule
        self.stock_head = utils._ChunkedLogProbFunction
        self.stock_logits = getattr(utils, "_fused_logprob_entropy", None)
        self.stock_serves = utils._supports_trl_loss_kernel
        self.stock_compacts = getattr(utils, "_use_triton", None)

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: Optional[float] = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(OUTPUTS),
    ) -> tuple[Optional[Tensor], ...]:
        """(log-probs, entropy, log sum p^2, mean logit, whether top 1), each [N] or None, as TRL's autograd function.

        hidden [N, H], weight [V, H], bias [V], targets [N]. chunk_size is ignored: `self.schedule` replaces it.
        """
        reason = why_stock(weight)
        if reason is not None:
            warnings.warn(f"fused_po: TRL's own kernel computes the log-probs: {reason}", stacklevel=2)
            return self.stock_head.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        scaling = dict(temperature=temperature, logit_scale=logit_scale, softcap=final_logit_softcapping)
        for name in outputs:
            checks.choice("outputs", name, OUTPUTS)
        request = REQUEST.get()
        if request is not None:
            targets, outputs = request.labels.reshape(-1).to(hidden.device), request.outputs
            scaling |= request.processing._asdict()
        fields = {OUTPUTS[name] for name in outputs} | {"logps"}
        if request is not None:
            fields.discard("mean_logits")
        narrow = hidden.dtype != weight.dtype and torch.promote_types(hidden.dtype, weight.dtype) != hidden.dtype
        low = torch.autocast(hidden.device.type, hidden.dtype) if narrow else contextlib.nullcontext()
        with low:  # TRL computes logits in the dtype of the hidden states
            stats = linear_logps(
                hidden, weight, targets, bias, outputs=tuple(fields), schedule=self.schedule, **scaling
            )
        if request is not None and "mean_logits" in outputs:
            stats = stats._replace(mean_logits=mean_of_all(hidden, weight, bias, scaling, self.schedule))
        return tuple(getattr(stats, name) for name in OUTPUTS.values())

    def compacts(self, device: torch.device) -> bool:
        """Whether the head gets labeled tokens only. Replaces `_use_triton`."""
        return device.type in DEVICES or self.stock_compacts(device)

    def serves_logits(
        self, logits: Tensor | ScoredLogits, index: Optional[Tensor] = None, row_mask: Optional[Tensor] = None
    ) -> bool:
        """Whether `from_logits` supports these: logits [..., V], others [...]. Replaces `_supports_trl_loss_kernel`."""
        if not self._ours(logits):
            return self.stock_logits is not None and self.stock_serves(logits, index, row_mask)
        rows = [t for t in (index, row_mask) if t is not None]
        return all(t.shape == logits.shape[:-1] and t.device == logits.device for t in rows)

    def _ours(self, logits: Tensor | ScoredLogits) -> bool:
        """Whether fused_po handles these logits. Not in low precision on CPU, where TRL rounds each step."""
        return isinstance(logits, ScoredLogits) or (
            logits.device.type in DEVICES
            and (logits.dtype in (torch.float32, torch.float64) or logits.device.type == "cuda")
            and logits.is_floating_point()
            and logits.ndim > 0
            and logits.shape[-1] > 0
        )

    def from_logits(
        self, logits: Tensor | ScoredLogits, index: Tensor, temperature: float = 1.0, row_mask: Optional[Tensor] = None
    ) -> tuple[Tensor, Tensor]:
        """(log-probs, entropy), each [...], of logits [..., V]; rows whose mask is 0 give 0."""
        if not self._ours(logits):
            return self.stock_logits(logits, index, temperature=temperature, row_mask=row_mask)
        if isinstance(logits, ScoredLogits):
            return logits.log_probs_and_entropy(index, temperature, row_mask)
        labels = index if row_mask is None else index.masked_fill(row_mask == 0, IGNORE)
        stats = logps_from_logits(logits, labels, temperature=temperature, outputs=("logps", "entropy"))
        return stats.logps, stats.entropy


@torch.no_grad()
def mean_of_all(hidden: Tensor, weight: Tensor, bias: Optional[Tensor], scaling: dict, schedule: Schedule) -> Tensor:
    """The mean logit [N] of every row, including ignored ones: a product with the mean of the head's rows.

    A softcap is not linear, so with a softcap it needs one GEMM over all rows.
    """
    if scaling["softcap"] is not None:
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        outputs = ("mean_logits",)
        return linear_logps(hidden, weight, labels, bias, outputs=outputs, schedule=schedule, **scaling).mean_logits
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.to(wide) @ weight.mean(0, dtype=wide)
    if bias is not None:
        mean = mean + bias.mean(dtype=wide)
    return mean * (scaling["logit_scale"] / scaling["temperature"])
