"""`logps_from_logits`: log-probs, entropy and other per-token statistics from existing logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Optional, overload

import torch
from torch import Tensor

from fused_po import checks
from fused_po.backend import choose as backends
from fused_po.backend.interface import Grads, Outputs, RowStats, Scaling
from fused_po.ops.autograd import public
from fused_po.ops.outputs import (
    TokenStats,
    empty_stats,
    outputs_of,
    token_stats,
    with_entropy,
    without_entropy,
)
from fused_po.ops.register import custom_op, differentiable
from fused_po.ops.rows import GradientOps, as_rows, empty_gradient, on_rows
from fused_po.parallel.row_passes import row_passes
from fused_po.parallel.vocab import WHOLE, ProcessGroupLike, Shards, shards_of, vocab_parallel

if TYPE_CHECKING:
    from fused_po.ops.outputs import EntropyStats, LogpsEntropy, LogpsFirst, LogpsStats


class LogpsSettings(NamedTuple):
    """How logits are scored."""

    scaling: Scaling
    ignore_index: int
    outputs: Outputs
    inplace_backward: bool
    backend: str
    shards: Shards

    @property
    def gradient(self) -> GradientSettings:
        """How their gradient is formed."""
        return GradientSettings(self.scaling, self.backend, self.shards.start())


class GradientSettings(NamedTuple):
    """How the gradient in the logits is formed from that of the statistics."""

    scaling: Scaling
    backend: str
    first_col: int = 0  # the vocabulary index of the logits' first column


@custom_op("fused_po::logps_fwd")
def _forward(logits: Tensor, labels: Tensor, settings: LogpsSettings) -> RowStats:
    scaling, ignore_index, outputs, inplace, backend, shards = settings
    checks.overwritable(logits, inplace)
    checks.label_range(labels, shards.n_cols(logits.shape[-1]), ignore_index)
    run = row_passes(backends.get(backend), shards)
    stats = run.begin_score(as_rows(logits), labels.contiguous(), scaling, ignore_index, outputs, None)()
    return with_entropy(stats, outputs)


@_forward.register_fake
def _(logits, labels, settings):
    return with_entropy(empty_stats(logits, labels.numel(), settings.outputs), settings.outputs)


def _write_gradient(
    logits: Tensor, out: Tensor, labels: Tensor, saved: Tensor, entropy: Tensor, grads: Grads, how: GradientSettings
) -> None:
    labels, grads, run = labels.contiguous(), grads.contiguous(), backends.get(how.backend)

    def write(rows, target):
        run.gradient(rows, labels, saved, entropy, *grads, *how.scaling, target, how.first_col)

    on_rows(write, logits, out)


@custom_op("fused_po::logps_bwd")
def _backward(
    logits: Tensor,
    labels: Tensor,
    saved: Tensor,
    entropy: Tensor,
    g_logps: Optional[Tensor],
    g_entropy: Optional[Tensor],
    g_lse: Optional[Tensor],
    how: GradientSettings,
) -> Tensor:
    out = empty_gradient(logits)
    _write_gradient(logits, out, labels, saved, entropy, Grads(g_logps, g_entropy, g_lse), how)
    return out


_backward.register_fake(empty_gradient)


@custom_op("fused_po::logps_bwd_", mutates_args=("logits",))
def _backward_(
    logits: Tensor,
    labels: Tensor,
    saved: Tensor,
    entropy: Tensor,
    g_logps: Optional[Tensor],
    g_entropy: Optional[Tensor],
    g_lse: Optional[Tensor],
    how: GradientSettings,
) -> None:
    _write_gradient(logits, logits, labels, saved, entropy, Grads(g_logps, g_entropy, g_lse), how)


logits_gradient = GradientOps(_backward, _backward_)


def _setup_context(ctx, inputs, results):
    logits, labels, ctx.settings = inputs
    ctx.save_for_backward(logits, labels, results.saved)
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_logps, g_entropy, g_lse, g_aux, g_saved):
    grads = Grads(g_logps, g_entropy, g_lse).requested(ctx.settings.outputs)
    if grads.absent:
        return ()
    logits, labels, saved = ctx.saved_tensors
    saved, entropy = without_entropy(saved, ctx.settings.outputs)
    how = ctx.settings.gradient
    return (logits_gradient(ctx.settings.inplace_backward, logits, labels, saved, entropy, *grads, how),)


score = differentiable(_forward, _autograd, _setup_context)


def logits_shards(logits: Tensor, process_group: ProcessGroupLike) -> Shards:
    """The shards of the vocabulary of logits [..., V]."""
    shards = shards_of(vocab_parallel(process_group), logits.shape[-1], "logits") if logits.ndim else WHOLE
    if logits.ndim < 1 or shards.n_cols(logits.shape[-1]) == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [..., V] with V >= 1")
    if shards.partial:
        raise ValueError("process_group: sequence_dim and partial_grad are only for hidden states; leave them out")
    return shards


@overload
def logps_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: Optional[float] = ...,
    ignore_index: int = ...,
    outputs: LogpsEntropy,
    inplace_backward: bool = ...,
    process_group: ProcessGroupLike = ...,
    backend: Optional[str] = ...,
) -> EntropyStats: ...


@overload
def logps_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: Optional[float] = ...,
    ignore_index: int = ...,
    outputs: LogpsFirst = ...,
    inplace_backward: bool = ...,
    process_group: ProcessGroupLike = ...,
    backend: Optional[str] = ...,
) -> LogpsStats: ...


@overload
def logps_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: Optional[float] = ...,
    ignore_index: int = ...,
    outputs: tuple[str, ...],
    inplace_backward: bool = ...,
    process_group: ProcessGroupLike = ...,
    backend: Optional[str] = ...,
) -> TokenStats: ...


@public
def logps_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logps",),
    inplace_backward: bool = False,
    process_group: ProcessGroupLike = None,
    backend: Optional[str] = None,
) -> TokenStats:
    """Log-probs of labels, and other statistics, from logits.

    The forward reads the logits once; the backward reads them once and writes the gradient once. The softmax is over
    z = softcap * tanh(logits * logit_scale / softcap) / temperature, or without a softcap over
    z = logits * logit_scale / temperature. Statistics are fp32 (float64 for float64 logits).

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, with any strides (a copy is made if columns are not
            contiguous, or if two strides cannot describe the rows). -inf marks a forbidden token: probability 0,
            gradient 0. With a softcap, -inf would become -softcap: apply the softcap yourself, then mask, and do not
            pass softcap.
        labels: [...], integers in [0, V) or ignore_index, aligned with the logits: see `shift_labels`. On a GPU the
            range is checked only with FUSED_PO_DEBUG=1.
        temperature, logit_scale, softcap: finite and > 0.
        ignore_index: the label of positions that are not read and give exactly 0.
        outputs: the fields of TokenStats to compute.
        inplace_backward: overwrite the logits with their gradient in the backward. Do not use them afterwards. Leaves,
            and logits whose elements share memory, are an error.
        process_group: the ranks over which the vocabulary is sharded: logits are the columns of this rank, labels are
            the same on all ranks. See `linear_logps`. The forward does one all_gather of a few numbers per token, the
            backward does none.
        backend: "triton", "cuda" (log-probs, entropy, lse; no softcap, no process_group) or "reference"; None selects
            one by device. See `backends`.

    Returns:
        TokenStats; gradients flow through logps, entropy and lse.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, by name.
    """
    checks.floating("logits", logits)
    shards = logits_shards(logits, process_group)
    why = "the shape of logits without the vocabulary"
    labels = checks.integer("labels", labels, logits.shape[:-1], logits.device, why)
    scaling = Scaling(*checks.scaling(temperature, logit_scale, softcap))
    asked = outputs_of(outputs)
    checks.inplace(inplace_backward, logits)
    checks.whole_number("ignore_index", ignore_index)
    name = backends.resolve(backend, logits.device, logits.dtype)
    settings = LogpsSettings(scaling, ignore_index, asked, inplace_backward, name, shards)
    return token_stats(score(logits, labels.reshape(-1), settings), asked, labels.shape)


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Align labels [..., T] with logits: position t gets the label of t + 1, the last position gets ignore_index.

    A causal LM predicts token t + 1 at position t; the functions of this package expect aligned labels. The dtype is
    kept, unless it cannot hold ignore_index (uint8 for -100, for example): then the result is int64.
    """
    if checks.tensor("labels", labels).ndim < 1:
        raise ValueError("labels: got shape (), expected [..., T]")
    checks.whole_number("ignore_index", ignore_index)
    if labels.dtype == torch.bool and ignore_index not in (0, 1):
        raise TypeError(f"labels: got dtype torch.bool, expected an integer dtype, which can hold {ignore_index}")
    if labels.dtype in checks.INTEGERS:
        limits = torch.iinfo(labels.dtype)
        labels = labels if limits.min <= ignore_index <= limits.max else labels.long()
    last = labels.new_full((*labels.shape[:-1], 1), ignore_index)
    return torch.cat((labels[..., 1:], last), -1) if labels.shape[-1] else labels.clone()
