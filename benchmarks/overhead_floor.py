"""The least that a PyTorch writing of a log-prob can cost here: the arithmetic of fused_po's contract, nothing else.

No package, no options, no backends: straight PyTorch calls in one autograd.Function. What stays is what every call
has to do: labels out of range are an error, ignored rows give 0, a log-prob close to 0 keeps its relative precision
(so the label stays out of the sum of exponentials), and the backward reads what the forward kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check(labels: Tensor, n_cols: int, ignore_index: int) -> bool:
    """Refuse labels out of range; whether none is ignored."""
    least, most = torch.aminmax(labels)
    if least.item() >= 0 and most.item() < n_cols:
        return True
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= n_cols))
    if bad.any():
        raise ValueError("labels out of range")
    return False


def statistics(z: Tensor, label: Tensor, room: Tensor | None) -> tuple[Tensor, ...]:
    """(log-probs, shift, norm, sum less 1, exponentials with the label's set to 0) of rows z, label [N, 1]."""
    shift = z.amax(1)
    target = z.gather(1, label).squeeze(1).sub_(shift)
    e = torch.sub(z, shift[:, None], out=room).exp_().scatter_(1, label, 0)
    rest = torch.expm1(target).add_(e.sum(1))
    norm = rest.log1p()
    return target - norm, shift, norm, rest, e


class Logits(torch.autograd.Function):
    """Log-probs of labels [N] from logits [N, V]; nothing but the row's statistics is kept."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        whole = check(labels, logits.shape[-1], ignore_index)
        z, label = logits.detach(), labels[:, None]
        logp, shift, norm, _, _ = statistics(z, label if whole else label.clamp(min=0), None)
        ctx.save_for_backward(logits, labels, logp, shift, norm)
        ctx.whole = whole
        return logp if whole else logp.where(labels != ignore_index, 0)

    @staticmethod
    def backward(ctx, g: Tensor):
        logits, labels, logp, shift, norm = ctx.saved_tensors
        if not ctx.whole:
            g, labels = g.where(labels >= 0, 0), labels.clamp(min=0)
        dz = torch.sub(logits, shift[:, None]).sub_(norm[:, None]).exp_().mul_((-g)[:, None])
        return dz.scatter_(1, labels[:, None], torch.expm1(logp).mul_(-g)[:, None]), None, None


class Linear(torch.autograd.Function):
    """Log-probs of labels [N] from hidden [N, H] and the head [V, H]; D, the log-prob's gradient, is kept."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        whole = check(labels, weight.shape[0], ignore_index)
        z = torch.mm(hidden, weight.t())
        label = labels[:, None] if whole else labels[:, None].clamp(min=0)
        logp, _, _, rest, e = statistics(z, label, z)
        if any(ctx.needs_input_grad):
            e.mul_((rest + 1).reciprocal_().neg_()[:, None]).scatter_(1, label, torch.expm1(logp).neg_()[:, None])
            ctx.save_for_backward(hidden, weight, labels, e)
        ctx.whole = whole
        return logp if whole else logp.where(labels != ignore_index, 0)

    @staticmethod
    def backward(ctx, g: Tensor):
        hidden, weight, labels, d = ctx.saved_tensors
        g = g[:, None] if ctx.whole else g.where(labels >= 0, 0)[:, None]
        d_hidden = torch.mm(d, weight).mul_(g) if ctx.needs_input_grad[0] else None
        d_weight = torch.mm(d.t(), hidden * g) if ctx.needs_input_grad[1] else None
        return d_hidden, d_weight, None, None


def logps_from_logits(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Log-probs, shaped like the labels."""
    return Logits.apply(logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index).view(labels.shape)


def linear_logps(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Log-probs, shaped like the labels."""
    states = hidden.view(-1, hidden.shape[-1])
    return Linear.apply(states, weight, labels.view(-1), ignore_index).view(labels.shape)
