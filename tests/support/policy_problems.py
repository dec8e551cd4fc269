"""Random policy-gradient problems, and their losses and gradients in plain PyTorch, written independently."""

import math

import torch
from numerics import DEVICE, IGNORE, k3, random_labels

import fused_po


def clipped(rho, a, logp, low=0.8, high=1.2, most=math.inf):
    """PPO's loss per token: rho is clamped to [low, most] where A < 0, and to at most `high` elsewhere."""
    return -a * torch.where(a < 0, rho.clamp(low, most), rho.clamp(max=high))


def gated(rho, a, logp, tau_pos=1.0, tau_neg=1.05):
    tau = torch.where(a > 0, tau_pos, tau_neg)
    return -a * 4 / tau / (1 + torch.exp(tau - tau * rho))


# loss_type, its settings, an independent formula of the loss, how tokens are weighted in the batch
LOSSES = {
    "ppo": ("ppo", {}, clipped, "tokens"),
    "ppo, dual clip": ("ppo", {"dual_clip": 2.0}, lambda *t: clipped(*t, most=2.0), "tokens"),
    "grpo": ("grpo", {}, clipped, "answers"),
    "bnpo, two-sided": ("bnpo", {"delta": 2.0}, lambda *t: clipped(*t, most=2.0), "tokens"),
    "dapo": ("dapo", {"epsilon_high": 0.28}, lambda *t: clipped(*t, high=1.28), "tokens"),
    "cispo": ("cispo", {"epsilon_high": 2.0}, lambda rho, a, lp: -rho.detach().clamp(max=2.0) * a * lp, "tokens"),
    "sapo": ("sapo", {}, gated, "answers"),
    "sapo, sharp": (
        "sapo",
        {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
        lambda *t: gated(*t, 2.0, 3.0),
        "answers",
    ),
    "gspo": ("gspo", {"epsilon": 0.2, "epsilon_high": 0.2}, clipped, "answers"),
    "luspo": ("luspo", {"delta": 2.0}, lambda *t: clipped(*t, most=2.0), "sums"),
    "reinforce": ("reinforce", {}, lambda rho, a, logp: -a * logp, "tokens"),
    "sft": ("sft", {}, lambda rho, a, logp: -logp, "tokens"),
}
ANSWERS = ("gspo", "luspo")  # losses with one ratio per answer


def in_torch(t, row, dtype, kl=None, kl_coef=0.0, entropy_coef=0.0, temperature=1.0, times_ratio=True):
    """All results for a problem t, computed in `dtype`; row: one of LOSSES."""
    loss_type, _, formula, weighing = row
    counts = (t["labels"] != IGNORE) & t["mask"]
    log_p = (t["logits"].to(dtype) / temperature).log_softmax(-1)
    logp = log_p.gather(-1, t["labels"].clamp(min=0)[..., None]).squeeze(-1)
    logp = torch.where(counts, logp, 0)
    entropy = torch.where(counts, -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1), 0)
    old = logp.detach() if t.get("old_logps") is None else torch.where(counts, t["old_logps"].to(dtype), 0)
    lengths = counts.sum(-1, keepdim=True).clamp(min=1)
    log_rho = (logp - old).sum(-1, keepdim=True) / lengths if loss_type in ANSWERS else logp - old
    rho = log_rho.exp()
    out = {"losses": formula(rho, t["advantages"].to(dtype)[:, None], logp), "logps": logp, "entropy": entropy}
    if kl:
        r = torch.where(counts, logp - t["ref_logps"].to(dtype), 0)
        out["kl"] = (k3(r) if kl == "k3" else r * r / 2) * (rho if times_ratio else 1)
        out["losses"] = out["losses"] + kl_coef * out["kl"]
    if loss_type not in ("reinforce", "sft"):
        out["ratio"] = rho.expand(counts.shape)
    out["losses"] = out["losses"] - entropy_coef * entropy
    out = {name: torch.where(counts, value, 0) for name, value in out.items()}
    answers = (counts.sum(-1) > 0).sum().clamp(min=1)
    weights = {"tokens": 1 / counts.sum().clamp(min=1), "answers": 1 / (lengths * answers), "sums": 1 / answers}
    return out | {"loss": (out["losses"] * weights[weighing]).sum()}


def problem(dtype, b=3, length=4, v=70, loss_type="ppo", kl=None, temperature=1.0):
    """A random problem. Ratios are not close to a clipping bound, where fp32 and float64 may differ legitimately."""
    logits = (torch.randn(b, length, v, device=DEVICE) * 2).to(dtype)
    labels = random_labels(b * length, v).view(b, length)
    labels[:, 0] = 0
    mask = torch.rand(b, length, device=DEVICE) < 0.9
    log_p = (logits.double() / temperature).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    shape = (b, 1) if loss_type in ANSWERS else (b, length)
    ratios = torch.tensor([0.3, 0.5, 0.9, 1.05, 1.5, 2.5, 4.0], dtype=torch.float64, device=DEVICE)
    ratio = ratios[torch.randint(0, 7, shape, device=DEVICE)] * (1 + 0.02 * torch.rand(shape, device=DEVICE))
    t = {"logits": logits, "labels": labels, "mask": mask}
    t["advantages"] = None if loss_type == "sft" else torch.randn(b, device=DEVICE)
    t["old_logps"] = None if loss_type in ("reinforce", "sft") else (log_p - ratio.log()).float()
    t["ref_logps"] = (log_p - 0.5 * torch.randn(b, length, device=DEVICE)).float() if kl else None
    return t


def given(t):
    """The positional arguments after the logits."""
    return [t[name] for name in ("labels", "advantages", "old_logps", "ref_logps", "mask")]


def ours_of(t, row, **how):
    """(PolicyOutput, gradient in the logits)."""
    x = t["logits"].detach().clone().requires_grad_()
    out = fused_po.policy_loss_from_logits(x * 1, *given(t), loss_type=row[0], **row[1], **how)
    out.loss.backward()
    return out, x.grad


def torch_of(t, row, dtype, **how):
    """Values and gradient of plain PyTorch in the logits' dtype and fp32, or the exact ones in float64."""
    if t["advantages"] is None:
        t = t | {"advantages": torch.ones(len(t["labels"]), device=DEVICE)}
    x = (t["logits"].double() if dtype == torch.float64 else t["logits"]).detach().requires_grad_()
    out = in_torch(t | {"logits": x}, row, dtype, **how)
    out["loss"].backward()
    return {name: value.detach() for name, value in out.items()} | {"gradient": x.grad}
