"""Random problems for the exact KL, and its values in plain PyTorch."""

import math

import torch
from numerics import DEVICE, IGNORE, Scaling, entropy_of

DIRECTIONS = {"reverse": ("reverse", 0.5), "forward": ("forward", 0.5), "js": ("js", 0.3)}


def terms(a, b):
    """a (log a - log b) of log-probs, 0 where a is 0."""
    counted = a > -torch.inf
    return torch.where(counted, a.exp() * (torch.where(counted, a, 0) - torch.where(counted, b, 0)), 0)


def mixture(p, q, weight):
    """log(w q + (1 - w) p) of log-probs, without underflow; 0 where both forbid the token."""
    neither = (p == -torch.inf) & (q == -torch.inf)
    return torch.logaddexp(
        q.masked_fill(neither, 0) + math.log(weight), p.masked_fill(neither, 0) + math.log1p(-weight)
    )


def in_torch(logits, ref_logits, labels, direction, weight, scaling=None, ref_scaling=None):
    """(kl, logps, ref_logps, entropy) [..., N] in plain PyTorch, in the dtype of the logits [..., N, V]."""
    scaling, ref_scaling = scaling or Scaling(), ref_scaling or Scaling()
    p, q = scaling.apply(logits).log_softmax(-1), ref_scaling.apply(ref_logits).log_softmax(-1)
    if direction == "reverse":
        kl = terms(p, q).sum(-1)
    elif direction == "forward":
        kl = terms(q, p).sum(-1)
    else:
        m = mixture(p, q, weight)
        kl = weight * terms(q, m).sum(-1) + (1 - weight) * terms(p, m).sum(-1)
    valid, at = labels != IGNORE, labels.clamp(min=0).expand(p.shape[:-1])[..., None]
    values = kl, p.gather(-1, at).squeeze(-1), q.gather(-1, at).squeeze(-1), entropy_of(p)
    return tuple(torch.where(valid, v, 0) for v in values)


def pair(n, v, dtype=torch.float32, distance=0.5, ref_dtype=None):
    logits = (torch.randn(n, v, device=DEVICE) * 2).to(dtype)
    return logits, (logits.float() + distance * torch.randn(n, v, device=DEVICE)).to(ref_dtype or dtype)


def loss_of(stats, g):
    """A weighted sum of all results that carry gradients."""
    return sum((value * w).sum() for value, w in zip((stats[0], stats[1], stats[3]), g))
