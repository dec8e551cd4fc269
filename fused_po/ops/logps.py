"""`logps_from_logits`: log-probs, entropy and the other statistics of labels from logits that exist already."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, Optional, overload

import torch
from torch import Tensor

from fused_po import checks
from fused_po.ops import backend as backends
from fused_po.ops.autograd import custom_op, differentiable, direct, public, transforms_active
from fused_po.parallel import WHOLE, ProcessGroupLike, Shards, given, row_passes, shards_of
from fused_po.reference import SAVED_FIELDS, stats_dtype


class TokenStats(NamedTuple):
    """Per-token statistics, each shaped like the labels, fp32 (float64 for float64 inputs); None if not asked for.

    With z the processed logits and p their softmax, at positions that are not ignored (those give exactly 0):

    logps: log p of the label. Carries gradients.
    entropy: -sum p log p, in nats. Carries gradients.
    lse: log sum exp z. Carries gradients.
    mean_logits: mean of z over the vocabulary.
    is_top1: bool, whether the label is the argmax (the first of equals).
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


def output_bits(outputs: tuple[str, ...]) -> int:
    """The outputs' names as bits, in the order of TokenStats."""
    if isinstance(outputs, str):
        raise TypeError(f"outputs: got the string {outputs!r}, expected a tuple of names such as ({outputs!r},)")
    bits, names = 0, TokenStats._fields
    for name in checks.several("outputs", outputs, "names"):
        if name not in names:
            checks.choice("outputs", name, names)
        bits |= 1 << names.index(name)
    if not bits:
        raise ValueError(f"outputs: got none, allowed are {', '.join(map(repr, TokenStats._fields))}")
    return bits


def token_stats(results: tuple[Tensor, ...], bits: int, shape: torch.Size) -> TokenStats:
    """An op's (logps, entropy, lse, aux) as TokenStats."""
    logps, entropy, lse, aux = results
    fields = [value.view(shape) if bits >> i & 1 else None for i, value in enumerate((logps, entropy, lse))]
    if not bits & 56:
        return TokenStats(*fields)
    fields += [aux[i].detach().clone().view(shape) if bits >> 3 + i & 1 else None for i in range(3)]
    fields[4] = None if fields[4] is None else fields[4] > 0.5
    return TokenStats(*fields)


def as_rows(logits: Tensor) -> Tensor:
    """logits [..., V] as [O, I, V] with columns side by side: a view wherever two strides can describe the rows."""
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


def fake_stats(values: Tensor, n_rows, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of (logps, entropy, lse, aux, saved)."""

    def new(*shape):
        return values.new_empty(shape, dtype=stats_dtype(values.dtype))

    logps, entropy, lse = (new(n_rows if bits & bit else 0) for bit in (1, 2, 4))
    return logps, entropy, lse, new(3, n_rows) if bits & 56 else new(0), new(SAVED_FIELDS, n_rows)


def with_entropy(saved: Tensor, results: list[Tensor], outputs: int) -> Tensor:
    """saved [SAVED_FIELDS, N], and a copy of the entropy if it is an output, which a caller may edit."""
    return torch.cat([saved, results[1][None]]) if outputs & 2 else saved


def fake_with_entropy(results: tuple[Tensor, ...], outputs: int) -> tuple[Tensor, ...]:
    """The shapes of `fake_stats` with those of `with_entropy`."""
    return *results[:4], with_entropy(results[4], list(results), outputs)


def without_entropy(saved: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """(saved [SAVED_FIELDS, N], entropy); saved stands for an entropy that nothing reads."""
    return (saved[:SAVED_FIELDS], saved[SAVED_FIELDS]) if outputs & 2 else (saved, saved)


@custom_op("fused_po::logps_fwd", mutates_args=())
def _forward(
    logits: Tensor, labels: Tensor, outer: float, inner: Optional[float], ignore_index: int, outputs: int,
    inplace_backward: bool, backend: str, group: str, sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shards = Shards(group, tuple(sizes))
    checks.overwritable(logits, inplace_backward)
    checks.label_range(labels, shards.n_cols(logits.shape[-1]), ignore_index)
    run = row_passes(backends.get(backend), shards)
    *results, saved = run.begin_score(as_rows(logits), labels.contiguous(), outer, inner, ignore_index, outputs, None)()
    return *results, with_entropy(saved, results, outputs)


@_forward.register_fake
def _(logits, labels, outer, inner, ignore_index, outputs, *others):
    return fake_with_entropy(fake_stats(logits, labels.numel(), outputs), outputs)


def dense(g: Optional[Tensor]) -> Optional[Tensor]:
    """An incoming gradient with its elements side by side."""
    return None if g is None else g.contiguous()


def on_rows(write, logits: Tensor, out: Tensor) -> None:
    """write(rows of logits, rows of out), of one shape; out is logits itself, or contiguous."""
    rows = as_rows(logits)
    target = rows if out is logits else out if out.shape == rows.shape else out.view(rows.shape)
    write(rows, target)
    if out is logits and rows.data_ptr() != logits.data_ptr():  # the rows had to be copied
        logits.copy_(rows.view(logits.shape))


def _gradient(logits, out, labels, saved, entropy, g_logps, g_entropy, g_lse, outer, inner, backend, first_col):
    def write(rows, target):
        how = dense(g_logps), dense(g_entropy), dense(g_lse), outer, inner, target
        backends.get(backend).gradient(rows, labels.contiguous(), saved, entropy, *how, first_col)

    on_rows(write, logits, out)


@custom_op("fused_po::logps_bwd", mutates_args=())
def _backward(
    logits: Tensor, labels: Tensor, saved: Tensor, entropy: Tensor, g_logps: Optional[Tensor],
    g_entropy: Optional[Tensor], g_lse: Optional[Tensor], outer: float, inner: Optional[float], backend: str,
    first_col: int,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _gradient(logits, out, labels, saved, entropy, g_logps, g_entropy, g_lse, outer, inner, backend, first_col)
    return out


@_backward.register_fake
def _(logits, *others):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@custom_op("fused_po::logps_bwd_", mutates_args=("logits",))
def _backward_(
    logits: Tensor, labels: Tensor, saved: Tensor, entropy: Tensor, g_logps: Optional[Tensor],
    g_entropy: Optional[Tensor], g_lse: Optional[Tensor], outer: float, inner: Optional[float], backend: str,
    first_col: int,
) -> None:  # fmt: skip
    _gradient(logits, logits, labels, saved, entropy, g_logps, g_entropy, g_lse, outer, inner, backend, first_col)


def requested(grads: tuple[Optional[Tensor], ...], bits: int) -> tuple[Optional[Tensor], ...]:
    """The incoming gradients of logps, entropy and lse; None for an output without elements."""
    return tuple(g if bits >> i & 1 else None for i, g in enumerate(grads))


Ops = tuple[Callable, Callable]  # one that returns the gradient, one that writes it over the logits


def gradient_by(ops: Ops, inplace: bool, logits: Tensor, *arguments) -> Tensor:
    """The gradient by a backward op; in place, by the second of the two, over the logits (not in torch.func)."""
    if not inplace or transforms_active():
        return ops[0](logits, *arguments)
    grad = logits.detach()
    ops[1](grad, *arguments)
    return grad


GRADIENT = direct(_backward), direct(_backward_)


def _setup_context(ctx, inputs, output):
    logits, labels, ctx.outer, ctx.inner, _, ctx.outputs, ctx.inplace, ctx.backend, group, sizes = inputs
    ctx.first_col = Shards(group, tuple(sizes)).start()
    ctx.save_for_backward(logits, labels, output[4])
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_logps, g_entropy, g_lse, g_aux, g_saved):
    grads = requested((g_logps, g_entropy, g_lse), ctx.outputs)
    if all(g is None for g in grads):
        return (None,) * 10
    logits, labels, saved = ctx.saved_tensors
    saved, entropy = without_entropy(saved, ctx.outputs)
    arguments = (labels, saved, entropy, *grads, ctx.outer, ctx.inner, ctx.backend, ctx.first_col)
    return gradient_by(GRADIENT, ctx.inplace, logits, *arguments), *(None,) * 9


score = differentiable(_forward, _autograd, _setup_context)


def logits_shards(logits: Tensor, process_group: ProcessGroupLike) -> Shards:
    """Where the vocabulary of logits [..., V] lies."""
    shards = shards_of(given(process_group), logits.shape[-1], "logits") if logits.ndim else WHOLE
    if logits.ndim < 1 or shards.n_cols(logits.shape[-1]) == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [..., V] with V >= 1")
    if shards.partial:
        raise ValueError("process_group: got sequence_dim or partial_grad, which are for hidden states; leave them out")
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
    """Log-probs of labels, and other statistics, from logits; one read forward, one read and one write backward.

    The softmax is over z = softcap * tanh(logits * logit_scale / softcap) / temperature, or without the softcap
    z = logits * logit_scale / temperature. Statistics are fp32 whatever the logits' dtype (float64 for float64).

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, any strides (columns that do not lie side by side, or
            rows that two strides cannot describe, cost a copy). -inf marks a masked token: probability 0, gradient 0.
            With a softcap it does not: the formula makes -softcap of it. Cap first, then mask, and pass no softcap.
        labels: [...], integers in [0, V) or ignore_index, aligned with the logits: see `shift_labels`. On a GPU they
            are checked under FUSED_PO_DEBUG=1 only.
        temperature, logit_scale, softcap: finite and > 0.
        ignore_index: label of positions that are not read and give exactly 0.
        outputs: names of TokenStats' fields.
        inplace_backward: the backward overwrites the logits with their gradient. They must not be used afterwards.
            Logits whose elements share memory, and leaves, are an error.
        process_group: the vocabulary is cut over its ranks: logits are this rank's columns, labels all the same. See
            `linear_logps`; costs one all_gather of a few numbers a token, and none backward.
        backend: "triton" or "reference"; None chooses by device. See `backends`.

    Returns:
        TokenStats; gradients flow through logps, entropy and lse.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, by name.
    """
    checks.floating("logits", logits)
    shards = logits_shards(logits, process_group)
    why = "the logits' shape without the vocabulary"
    labels = checks.integer("labels", labels, logits.shape[:-1], logits.device, why)
    outer, inner = checks.scaling(temperature, logit_scale, softcap)
    bits = output_bits(outputs)
    checks.inplace(inplace_backward, logits)
    checks.whole("ignore_index", ignore_index)
    name = backends.resolve(backend, logits.device, logits.dtype)
    flat = labels.reshape(-1)
    *results, _ = score(logits, flat, outer, inner, ignore_index, bits, inplace_backward, name, *shards[:2])
    return token_stats(tuple(results), bits, labels.shape)


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Align labels [..., T] with logits: position t gets the label of t + 1, the last one ignore_index.

    Models return at position t the logits of token t + 1; every function here wants the two aligned. The dtype stays,
    except that of integers too narrow for ignore_index, such as uint8 for -100: these become int64.
    """
    if checks.tensor("labels", labels).ndim < 1:
        raise ValueError("labels: got shape (), expected [..., T]")
    checks.whole("ignore_index", ignore_index)
    if labels.dtype == torch.bool and ignore_index not in (0, 1):
        raise TypeError(f"labels: got dtype torch.bool, expected an integer dtype, which can hold {ignore_index}")
    if labels.dtype in checks.INTEGERS:
        limits = torch.iinfo(labels.dtype)
        labels = labels if limits.min <= ignore_index <= limits.max else labels.long()
    last = labels.new_full((*labels.shape[:-1], 1), ignore_index)
    return torch.cat((labels[..., 1:], last), -1) if labels.shape[-1] else labels.clone()
