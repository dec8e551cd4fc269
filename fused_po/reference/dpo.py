"""DPO with a KL penalty: the loss from log-probs of policy and reference, and its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_po.backend.interface import LOGPS, DPORow, PairRow, SavedRow
from fused_po.reference.gradient import gradient
from fused_po.reference.statistics import statistics

SATURATION = 20.0  # k3 goes on along its tangent where the reference is more nats above the policy


def pair_statistics(
    logits: Tensor, ref_logits: Tensor | None, labels: Tensor, outer: float, inner: float | None, ignore_index: int
) -> Tensor:
    """tokens[4, N] for logits[O, I, V] and ref_logits[O', I', V] (or None) with O * I = O' * I' = N; labels[N]."""
    stats = statistics(logits, labels, outer, inner, ignore_index, LOGPS)
    ref_logps = torch.zeros_like(stats.logps)
    if ref_logits is not None:
        ref_logps = statistics(ref_logits, labels, outer, inner, ignore_index, LOGPS).logps.to(ref_logps.dtype)
    return torch.stack([*stats.saved, ref_logps])


def kl_estimate(k1: Tensor, kl: str) -> tuple[Tensor, Tensor]:
    """(estimate, its derivative in the policy's log-prob) for k1 = log-ratio of policy to reference."""
    if kl == "k1":
        return k1, torch.ones_like(k1)
    if kl == "k2":
        return 0.5 * k1 * k1, k1
    inside = (-k1).clamp(max=SATURATION)
    slope = -torch.expm1(inside)
    k3 = -inside - slope * (1 + torch.relu(-k1 - SATURATION))  # no difference of infinities
    return torch.where(k1.abs() < 1e-3, k1 * k1 * (0.5 - k1 / 6), k3), slope


def times(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is 0, also for infinities."""
    return torch.where(weight == 0, 0, weight * value)


def dpo(
    tokens: Tensor,
    labels: Tensor,
    ref_sums: Tensor | None,
    beta: float,
    label_smoothing: float,
    kl: str | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses [B], sequence log-probs [2B], pairs [7, B], KL per token [2B * T]) of tokens[4, 2B * T], labels[2B, T].

    ref_sums: [2B] reference log-probs of whole sequences, in place of those in `tokens`. kl: "k1", "k2", "k3" or None.
    """
    valid = labels != ignore_index
    both = torch.where(valid, tokens[DPORow.LOGP :].view(2, *labels.shape), 0)
    sequences, of_reference = both.sum(2).unbind(0)
    rewards = (sequences - (of_reference if ref_sums is None else ref_sums)).mul_(beta)
    chosen_reward, rejected_reward = rewards.chunk(2)
    h = chosen_reward - rejected_reward
    losses = torch.nn.functional.logsigmoid(h) * (label_smoothing - 1)
    slope = torch.sigmoid(-h).mul_(beta * (label_smoothing - 1))
    if label_smoothing:  # 0 times an infinite loss would be NaN
        losses = losses - label_smoothing * torch.nn.functional.logsigmoid(-h)
        slope = slope + beta * label_smoothing * torch.sigmoid(h)
    n_pairs = h.shape[0]
    counts = valid.sum(1, dtype=h.dtype).view(2, n_pairs).sum(0)
    if kl:
        kl_tokens = torch.where(valid, kl_estimate(both[0] - both[1], kl)[0], 0)
        kl_sums = kl_tokens.sum(1).view(2, n_pairs).sum(0)
    else:
        kl_tokens, kl_sums = h.new_empty(0), torch.zeros_like(h)
    accuracy = (h > 0).to(h.dtype)
    pairs = torch.stack([slope, chosen_reward, rejected_reward, h, accuracy, kl_sums, counts])
    return losses, sequences, pairs, kl_tokens.flatten()


def dpo_token_gradient(
    labels: Tensor,
    tokens: Tensor,
    pairs: Tensor,
    weights: Tensor,
    g_loss: Tensor | None,
    g_losses: Tensor | None,
    g_sequences: Tensor | None,
    kl: str | None,
) -> Tensor:
    """The gradient [2B, T] in the policy's token log-probs. weights [2]: d loss / d one pair's loss, / d one KL."""
    weights = torch.zeros_like(weights) if g_loss is None else weights * g_loss
    slope = times(weights[0] if g_losses is None else weights[0] + g_losses, pairs[PairRow.SLOPE])
    g_sequence = torch.cat([slope, -slope])
    if g_sequences is not None:
        g_sequence = g_sequence + g_sequences
    g = g_sequence[:, None].expand(labels.shape)
    if kl:
        g = g + times(weights[1], kl_estimate((tokens[DPORow.LOGP] - tokens[DPORow.REF_LOGP]).view_as(labels), kl)[1])
    return torch.where(tokens[DPORow.NORM].view_as(labels) != math.inf, g, 0)


def dpo_gradient(
    logits: Tensor,
    labels: Tensor,
    tokens: Tensor,
    pairs: Tensor,
    weights: Tensor,
    g_loss: Tensor | None,
    g_losses: Tensor | None,
    g_sequences: Tensor | None,
    kl: str | None,
    outer: float,
    inner: float | None,
    out: Tensor,
) -> None:
    """Write into out[O, I, V] the gradient with respect to the policy's logits[O, I, V]; both may be the same."""
    g = dpo_token_gradient(labels, tokens, pairs, weights, g_loss, g_losses, g_sequences, kl)
    saved = tokens[: SavedRow.COUNT]
    gradient(logits, labels.flatten(), saved, tokens[:0], g.flatten(), None, None, outer, inner, out)
