"""The ops of the flagship, DPO with a per-token KL penalty, fused down to the loss; dpo.py has what is public.

From logits: two launches forward (scores of policy and reference; everything from there to the loss), one backward.
From log-probs of tokens: the second launch alone.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.ops import backend as backends
from fused_po.ops.autograd import custom_op, differentiable, direct
from fused_po.ops.logps import as_rows, dense, gradient_by, on_rows
from fused_po.reference import preference as buffers
from fused_po.reference import stats_dtype


def _finish(run, tokens, labels, ref_sums, beta, label_smoothing, kl, kl_coef, ignore_index):
    """From per-token log-probs to Results: those for callers lie apart from those that the backward reads."""
    sums = run.dpo(tokens, labels, ref_sums, beta, label_smoothing, kl, ignore_index)
    losses, sequences, pairs, kl_tokens = sums
    share = 1.0 / max(1, losses.numel())
    weights = losses.new_full((2,), share)
    loss, mean_kl = losses.sum().mul_(share), losses.new_zeros(())
    if kl is not None:
        count = pairs[buffers.TOKENS].sum().clamp(min=1)
        weights[1] = kl_coef / count
        mean_kl = pairs[buffers.KL_SUM].sum() / count
        if kl_coef:  # 0 times an infinite KL would be NaN
            loss = loss + kl_coef * mean_kl
    halves, fields = (half.clone() for half in sequences.chunk(2)), pairs.unbind(0)
    metrics = (fields[i].clone() for i in METRICS)
    return loss, losses, *halves, mean_kl, kl_tokens, *metrics, pairs, tokens, weights


def _fake_finish(values, labels, kl):
    n, b = labels.numel(), labels.shape[0] // 2

    def new(*shape):
        return values.new_empty(shape, dtype=stats_dtype(values.dtype))

    halves, metrics = (new(b), new(b)), (new(b) for _ in METRICS)
    private = new(buffers.PAIR_FIELDS, b), new(4, n), new(2)
    return new(), new(b), *halves, new(), new(n if kl else 0), *metrics, *private


# loss, losses, log-probs of chosen and rejected answers, KL, KL per token, the metrics; then what the backward reads:
# pairs, tokens, weights.
Results = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # fmt: skip
METRICS = buffers.CHOSEN_REWARD, buffers.REJECTED_REWARD, buffers.MARGIN, buffers.ACCURACY


@custom_op("fused_po::dpo_logits_fwd", mutates_args=())
def logits_forward(
    logits: Tensor, labels: Tensor, ref_logits: Optional[Tensor], ref_logps: Optional[Tensor], beta: float,
    label_smoothing: float, kl: Optional[str], kl_coef: float, outer: float, inner: Optional[float],
    ignore_index: int, inplace_backward: bool, backend: str,
) -> Results:  # fmt: skip
    checks.overwritable(logits, inplace_backward, ref_logits)
    checks.label_range(labels, logits.shape[-1], ignore_index)
    run = backends.get(backend)
    labels = labels.contiguous()
    ref_rows = None if ref_logits is None else as_rows(ref_logits)
    tokens = run.pair_statistics(as_rows(logits), ref_rows, labels.flatten(), outer, inner, ignore_index)
    ref_sums = dense(ref_logps) if ref_logps is not None and ref_logps.ndim == 1 else None
    if ref_logps is not None and ref_logps.ndim == 2:
        tokens[buffers.REF_LOGP] = ref_logps.flatten()
    return _finish(run, tokens, labels, ref_sums, beta, label_smoothing, kl, kl_coef, ignore_index)


@logits_forward.register_fake
def _(logits, labels, ref_logits, ref_logps, beta, label_smoothing, kl, *others):
    return _fake_finish(logits, labels, kl)


def _write_gradient(
    logits, out, labels, tokens, pairs, weights, g_loss, g_losses, g_sequences, kl, outer, inner, backend
):
    def write(rows, target):
        grads = g_loss, dense(g_losses), dense(g_sequences)
        run = backends.get(backend).dpo_gradient
        run(rows, labels.contiguous(), tokens, pairs, weights, *grads, kl, outer, inner, target)

    on_rows(write, logits, out)


@custom_op("fused_po::dpo_logits_bwd", mutates_args=())
def _logits_backward(
    logits: Tensor, labels: Tensor, tokens: Tensor, pairs: Tensor, weights: Tensor, g_loss: Optional[Tensor],
    g_losses: Optional[Tensor], g_sequences: Optional[Tensor], kl: Optional[str], outer: float,
    inner: Optional[float], backend: str,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(
        logits, out, labels, tokens, pairs, weights, g_loss, g_losses, g_sequences, kl, outer, inner, backend
    )
    return out


@_logits_backward.register_fake
def _(logits, *others):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@custom_op("fused_po::dpo_logits_bwd_", mutates_args=("logits",))
def _logits_backward_(
    logits: Tensor, labels: Tensor, tokens: Tensor, pairs: Tensor, weights: Tensor, g_loss: Optional[Tensor],
    g_losses: Optional[Tensor], g_sequences: Optional[Tensor], kl: Optional[str], outer: float,
    inner: Optional[float], backend: str,
) -> None:  # fmt: skip
    _write_gradient(
        logits, logits, labels, tokens, pairs, weights, g_loss, g_losses, g_sequences, kl, outer, inner, backend
    )


def _logits_context(ctx, inputs, output):
    logits, labels, _, _, _, _, ctx.kl, _, ctx.outer, ctx.inner, _, ctx.inplace, ctx.backend = inputs
    pairs, tokens, weights = output[-3:]
    ctx.save_for_backward(logits, labels, tokens, pairs, weights)
    ctx.set_materialize_grads(False)


def _of_sequences(g_chosen: Optional[Tensor], g_rejected: Optional[Tensor]) -> Optional[Tensor]:
    """[2B] from the incoming gradients of both halves; None if neither has one."""
    if g_chosen is None and g_rejected is None:
        return None
    like = g_rejected if g_chosen is None else g_chosen
    return torch.cat([torch.zeros_like(like) if g is None else g for g in (g_chosen, g_rejected)])


def _logits_autograd(ctx, g_loss, g_losses, g_chosen, g_rejected, *g_detached):
    grads = g_loss, g_losses, _of_sequences(g_chosen, g_rejected)
    if all(g is None for g in grads):
        return (None,) * 13
    logits, labels, tokens, pairs, weights = ctx.saved_tensors
    arguments = (labels, tokens, pairs, weights, *grads, ctx.kl, ctx.outer, ctx.inner, ctx.backend)
    return gradient_by(_GRADIENT, ctx.inplace, logits, *arguments), *(None,) * 12


_GRADIENT = direct(_logits_backward), direct(_logits_backward_)
from_logits = differentiable(logits_forward, _logits_autograd, _logits_context)


@custom_op("fused_po::dpo_fwd", mutates_args=())
def forward(
    logps: Tensor, labels: Tensor, ref_logps: Tensor, beta: float, label_smoothing: float, kl: Optional[str],
    kl_coef: float, ignore_index: int, backend: str,
) -> Results:  # fmt: skip
    labels = labels.contiguous()
    norm = torch.zeros_like(logps).masked_fill_(labels == ignore_index, torch.inf)
    ref_tokens = ref_logps.to(logps.dtype) if ref_logps.ndim == 2 else torch.zeros_like(logps)
    tokens = torch.stack([torch.zeros_like(logps), norm, logps, ref_tokens]).flatten(1)
    ref_sums = dense(ref_logps) if ref_logps.ndim == 1 else None
    run = backends.get(backend)
    return _finish(run, tokens, labels, ref_sums, beta, label_smoothing, kl, kl_coef, ignore_index)


@forward.register_fake
def _(logps, labels, ref_logps, beta, label_smoothing, kl, *others):
    return _fake_finish(logps, labels, kl)


@custom_op("fused_po::dpo_bwd", mutates_args=())
def _backward(
    labels: Tensor, tokens: Tensor, pairs: Tensor, weights: Tensor, g_loss: Optional[Tensor],
    g_losses: Optional[Tensor], g_sequences: Optional[Tensor], kl: Optional[str],
) -> Tensor:  # fmt: skip
    return buffers.dpo_token_gradient(labels, tokens, pairs, weights, g_loss, g_losses, g_sequences, kl)


@_backward.register_fake
def _(labels, tokens, *others):
    return tokens.new_empty(labels.shape)


def _context(ctx, inputs, output):
    ctx.kl = inputs[5]
    pairs, tokens, weights = output[-3:]
    ctx.save_for_backward(inputs[1], tokens, pairs, weights)
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_loss, g_losses, g_chosen, g_rejected, *g_detached):
    grads = g_loss, g_losses, _of_sequences(g_chosen, g_rejected)
    if all(g is None for g in grads):
        return (None,) * 9
    labels, tokens, pairs, weights = ctx.saved_tensors
    grad = _token_gradient(labels, tokens, pairs, weights, *grads, ctx.kl)
    return grad, *(None,) * 8


_token_gradient = direct(_backward)
from_logps = differentiable(forward, _autograd, _context)
