"""The arithmetic of a log-prob as in fused_po, in PyTorch calls only: a lower bound for what a call costs.

There are no options, no backends, no package, only what every call has to do: labels out of range are an error, ignored
rows give 0, a log-prob close to 0 keeps its relative precision (the label is left out of the sum of exponentials), and
the backward reads what the forward kept. It is a lower bound for this arithmetic; a different one may cost less.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100


def none_ignored(labels: Tensor, n_cols: int) -> bool:
    """Raise for labels out of range; returns whether none is ignored."""
    least, most = torch.aminmax(labels)
    if least.item() >= 0 and most.item() < n_cols:
        return True
    if ((labels != IGNORE) & ((labels < 0) | (labels >= n_cols))).any():
        raise ValueError("labels out of range")
    return False


def statistics(z: Tensor, labels: Tensor, room: Tensor | None) -> tuple[Tensor, ...]:
    """(log-probs, shift, norm, sum less 1, exponentials with the label's set to 0, labels or 0 [N, 1]) of rows z."""
    whole = none_ignored(labels, z.shape[1])
    label = labels[:, None] if whole else labels[:, None].clamp(min=0)
    shift = z.amax(1)
    target = z.gather(1, label).squeeze(1).sub_(shift)
    e = torch.sub(z, shift[:, None], out=room).exp_().scatter_(1, label, 0)
    rest = torch.expm1(target).add_(e.sum(1))
    norm = rest.log1p()
    logp = target - norm
    return logp if whole else logp.where(labels != IGNORE, 0), shift, norm, rest, e, label


class Logits(torch.autograd.Function):
    """Log-probs of labels [N] from logits [N, V]; keeps only the statistics of each row."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        logp, shift, norm, _, _, label = statistics(logits.detach(), labels, None)
        ctx.save_for_backward(logits, labels, label, logp, shift, norm)
        return logp

    @staticmethod
    def backward(ctx, g: Tensor):
        logits, labels, label, logp, shift, norm = ctx.saved_tensors
        g = g.where(labels >= 0, 0)[:, None].neg_()
        dz = torch.sub(logits, shift[:, None]).sub_(norm[:, None]).exp_().mul_(g)
        return dz.scatter_(1, label, torch.expm1(logp)[:, None].mul_(g)), None


class Linear(torch.autograd.Function):
    """Log-probs of labels [N] from hidden [N, H] and the head [V, H]; keeps D, the gradient of the log-prob."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        z = torch.mm(hidden, weight.t())
        logp, _, _, rest, e, label = statistics(z, labels, z)
        e.mul_((rest + 1).reciprocal_().neg_()[:, None]).scatter_(1, label, torch.expm1(logp).neg_()[:, None])
        ctx.save_for_backward(hidden, weight, labels, e)
        return logp

    @staticmethod
    def backward(ctx, g: Tensor):
        hidden, weight, labels, d = ctx.saved_tensors
        g = g.where(labels >= 0, 0)[:, None]
        d_hidden = torch.mm(d, weight).mul_(g)
        d_weight = torch.mm(d.t(), hidden * g) if ctx.needs_input_grad[1] else None
        return d_hidden, d_weight, None


def logps_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs, shaped like the labels."""
    rows, flat = logits.view(-1, logits.shape[-1]), labels.view(-1)
    found = Logits.apply(rows, flat) if torch.is_grad_enabled() else statistics(rows, flat, None)[0]
    return found.view(labels.shape)


def linear_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs, shaped like the labels."""
    rows, flat = hidden.view(-1, hidden.shape[-1]), labels.view(-1)
    if torch.is_grad_enabled():
        return Linear.apply(rows, weight, flat).view(labels.shape)
    z = torch.mm(rows, weight.t())
    return statistics(z, flat, z)[0].view(labels.shape)
