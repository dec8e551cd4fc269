"""DPO from logits, GAE and the reduction of token losses in plain PyTorch, for comparison with the ops."""

import torch
from numerics import IGNORE, k3


def dpo_in_torch(logits, labels, ref_logps, beta, smoothing, kl, kl_coef, dtype):
    """The DPO loss and all reported values from logits [..., 2B, T, V], computed in `dtype`.

    labels: [2B, T]; ref_logps: [..., 2B, T], or [..., 2B] sums.
    """
    valid = labels != IGNORE
    at = labels.clamp(min=0).expand(logits.shape[:-1])[..., None]
    logp = torch.where(valid, logits.to(dtype).log_softmax(-1).gather(-1, at).squeeze(-1), 0)
    ref = ref_logps.to(dtype)
    ref = torch.where(valid, ref, 0) if ref.ndim == logp.ndim else ref
    chosen, rejected = logp.sum(-1).chunk(2, -1)
    ref_chosen, ref_rejected = (ref.sum(-1) if ref.ndim == logp.ndim else ref).chunk(2, -1)
    rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    h = rewards[0] - rewards[1]
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)
    out = dict(losses=losses, chosen_logps=chosen, rejected_logps=rejected)
    out |= dict(chosen_rewards=rewards[0], rejected_rewards=rewards[1], margins=h)
    out["loss"] = losses.sum(-1) / max(1, losses.shape[-1])
    if kl:
        r = logp - ref
        k = {"k1": r, "k2": r * r / 2, "k3": k3(r)}[kl]
        out["kl_per_token"], out["kl"] = k, k.sum((-1, -2)) / valid.sum().clamp(min=1)
        out["loss"] = out["loss"] + kl_coef * out["kl"]
    return out


def gae_loop(rewards, values, mask, last, gamma, lam):
    """(advantages, returns) token by token, in the dtype of the rewards."""
    advantages = torch.empty_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    ahead = torch.zeros_like(advantage) if last is None else last
    for t in reversed(range(rewards.shape[1])):
        result = rewards[:, t] + gamma * ahead - values[:, t] + gamma * lam * advantage
        advantage = result if mask is None else torch.where(mask[:, t], result, advantage)
        ahead = values[:, t] if mask is None else torch.where(mask[:, t], values[:, t], ahead)
        advantages[:, t] = advantage
    returns = advantages + values
    return (advantages, returns) if mask is None else tuple(torch.where(mask, x, 0) for x in (advantages, returns))


def aggregate_in_torch(rows, mode, max_length=None, num_tokens=None, num_sequences=None):
    """The loss of a list of token losses [..., n], one entry per sequence, by the definition of the mode."""
    full = [row for row in rows if row.shape[-1]]
    num_tokens = sum(row.shape[-1] for row in full) if num_tokens is None else num_tokens
    num_sequences = len(full) if num_sequences is None else num_sequences
    if mode == "token-mean":
        return sum(row.sum(-1) for row in full) / num_tokens
    if mode == "seq-mean-token-mean":
        return sum(row.mean(-1) for row in full) / num_sequences
    return sum(row.sum(-1) for row in full) / num_sequences / (1 if max_length is None else max_length)
