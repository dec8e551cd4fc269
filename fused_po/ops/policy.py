"""The ops under `policy_loss_from_logits`; policy_loss.py has what is public.

`forward` scores the rows and forms the tokens' losses; the backward is that of `logps_from_logits`, with the losses'
slopes. `forward_` writes the gradient over the logits at once, and `link` hands it on: the row is read while it is
still in the cache, and the backward is left with multiplying by the loss's own gradient, which mostly is 1.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fused_po import checks
from fused_po.ops import backend as backends
from fused_po.ops.autograd import custom_op, differentiable, direct
from fused_po.ops.logps import GRADIENT, as_rows, dense, gradient_by
from fused_po.reference import stats_dtype
from fused_po.reference.policy import ENTROPY, LOGP, LOSS, NORM, SHIFT, SLOPE, TOKEN_FIELDS, Form, Given
from fused_po.reference.preference import times


def _run(logits, labels, given, form, outer, ignore_index, backend, overwrite):
    """(loss, tokens): see `reference.policy`."""
    checks.label_range(labels, logits.shape[-1], ignore_index)
    rows, given = as_rows(logits), Given(*map(dense, given))
    tokens = backends.get(backend).policy(rows, labels.contiguous(), given, Form(*form), outer, ignore_index, overwrite)
    if overwrite and rows.data_ptr() != logits.data_ptr():  # the rows had to be copied
        logits.copy_(rows.view(logits.shape))
    return times(given.weights, tokens[LOSS]).sum(), tokens


N_SAVED = len((SHIFT, NORM, LOGP, ENTROPY, SLOPE))  # rows of tokens that the backward reads


def _saved(tokens: Tensor) -> Tensor:
    """A copy of the rows that the backward reads: the others go to callers."""
    return torch.cat((tokens[: ENTROPY + 1], tokens[SLOPE:]))


def _fake(logits, labels, *rows):
    new = {"dtype": stats_dtype(logits.dtype)}
    return logits.new_empty((), **new), *(logits.new_empty((n, labels.numel()), **new) for n in rows)


@custom_op("fused_po::policy_fwd", mutates_args=())
def forward(
    logits: Tensor, labels: Tensor, advantages: Tensor, weights: Tensor, old_logps: Optional[Tensor],
    ref_logps: Optional[Tensor], kind: str, low: float, high: float, bound: float, kl: Optional[str], kl_coef: float,
    kl_times_ratio: bool, entropy_coef: float, outer: float, ignore_index: int, inplace_backward: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = advantages, weights, old_logps, ref_logps
    form = kind, low, high, bound, kl, kl_coef, kl_times_ratio, entropy_coef
    checks.overwritable(logits, inplace_backward)
    loss, tokens = _run(logits, labels, given, form, outer, ignore_index, backend, False)
    return loss, tokens, _saved(tokens)


@forward.register_fake
def _(logits, labels, *others):
    return _fake(logits, labels, TOKEN_FIELDS, N_SAVED)


def _context(ctx, inputs, output):
    logits, labels, _, weights, *_, ctx.entropy_coef, ctx.outer, _, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, weights, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, g_loss, *g_others):
    if g_loss is None:
        return (None,) * 18
    logits, labels, weights, saved = ctx.saved_tensors
    entropy, slope = saved[3:]
    g_entropy = weights * (-ctx.entropy_coef * g_loss) if ctx.entropy_coef else None
    grads = slope * g_loss, g_entropy, None
    arguments = labels, saved[:3], entropy, *grads, ctx.outer, None, ctx.backend, 0
    return gradient_by(GRADIENT, ctx.inplace, logits, *arguments), *(None,) * 17


losses = differentiable(forward, _autograd, _context)


@custom_op("fused_po::policy_fwd_", mutates_args=("logits",))
def forward_(
    logits: Tensor, labels: Tensor, advantages: Tensor, weights: Tensor, old_logps: Optional[Tensor],
    ref_logps: Optional[Tensor], kind: str, low: float, high: float, bound: float, kl: Optional[str], kl_coef: float,
    kl_times_ratio: bool, entropy_coef: float, outer: float, ignore_index: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = advantages, weights, old_logps, ref_logps
    form = kind, low, high, bound, kl, kl_coef, kl_times_ratio, entropy_coef
    checks.overwritable(logits, True)
    return _run(logits, labels, given, form, outer, ignore_index, backend, True)


@forward_.register_fake
def _(logits, labels, *others):
    return _fake(logits, labels, TOKEN_FIELDS)


@custom_op("fused_po::policy_link", mutates_args=())
def _link(grad: Tensor, loss: Tensor, backend: str) -> Tensor:
    """The loss of logits in whose place its gradient lies already."""
    return loss.clone()


@_link.register_fake
def _(grad, loss, backend):
    return torch.empty_like(loss)


@custom_op("fused_po::policy_scale_", mutates_args=("grad",))
def _scale_(grad: Tensor, factor: Tensor, backend: str) -> None:
    backends.get(backend).scale(grad, factor)


def _link_context(ctx, inputs, output):
    ctx.backend = inputs[2]
    ctx.save_for_backward(inputs[0])
    ctx.set_materialize_grads(False)


def _link_autograd(ctx, g_loss):
    if g_loss is None:
        return None, None, None
    grad = ctx.saved_tensors[0].detach()
    _scale(grad, g_loss, ctx.backend)
    return grad, None, None


_scale = direct(_scale_)
write_forward = direct(forward_)
link = differentiable(_link, _link_autograd, _link_context)
