"""Plain PyTorch that replaces the fused ops in tests of the examples: all logits, then log_softmax."""

from __future__ import annotations

import fused_po
from fused_po import losses


def log_probs(hidden, weight, bias=None, *, temperature=1.0, logit_scale=1.0, softcap=None):
    """Log-probs [..., V]."""
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    return (z / temperature).log_softmax(-1)


def linear_logps(hidden, weight, labels, bias=None, *, outputs=("logps",), **how):
    """Like `fused_po.linear_logps`; always returns log-probs, entropy and top-1."""
    logs = log_probs(hidden, weight, bias, **how)
    scored = labels >= 0
    at = labels.clamp(min=0)[..., None]
    logps = logs.gather(-1, at).squeeze(-1).where(scored, 0)
    entropy = -(logs.exp() * logs).sum(-1).where(scored, 0)
    top = (logs.argmax(-1) == labels) & scored
    return fused_po.TokenStats(logps, entropy, None, None, top, None)


def linear_dpo(hidden, weight, labels, *, ref_logps, bias=None, beta=0.1, kl="k3", kl_coef=0.0, **how):
    """Like `fused_po.linear_dpo` with reference log-probs and the k3 penalty."""
    assert kl == "k3"
    logps = linear_logps(hidden, weight, labels, bias, **how).logps
    mask = labels >= 0
    ratio = (ref_logps - logps).where(mask, 0)
    per_token = ratio.exp() - 1 - ratio
    mean = per_token.sum() / mask.sum()
    sums, refs = logps.sum(-1).chunk(2), ref_logps.where(mask, 0).sum(-1).chunk(2)
    each = losses.dpo(*sums, *refs, beta=beta)
    rewards = [beta * (a - b).detach() for a, b in zip(sums, refs)]
    margins = rewards[0] - rewards[1]
    accuracy = (margins > 0).to(margins.dtype)
    loss = each.mean() + kl_coef * mean
    return fused_po.DPOOutput(loss, each, *sums, *rewards, margins, accuracy, mean.detach(), per_token.detach())


def install(patch) -> None:
    """Replace the fused ops by these functions, through pytest's monkeypatch."""
    for function in (linear_logps, linear_dpo):
        patch.setattr(fused_po, function.__name__, function)
