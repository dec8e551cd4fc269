"""Losses as nn.Modules, with the call signatures people already have in their trainers."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from fused_po import checks, losses
from fused_po.ops.linear_logps import linear_logps
from fused_po.reduce import sequence_logps


class DPOLoss(nn.Module):
    """The DPO loss from sequence log-probs, called as OpenRLHF calls its own. Math and source: `losses.dpo`.

    Args:
        beta: > 0. label_smoothing: in [0, 0.5).
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta = checks.positive("beta", beta)
        allowed = "0 <= label_smoothing < 0.5"
        self.label_smoothing = checks.number("label_smoothing", label_smoothing, allowed, lambda v: 0 <= v < 0.5)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(mean loss, chosen rewards [B], rejected rewards [B]) from four [B] log-probs; the rewards are detached."""
        policy = (policy_chosen_logps, policy_rejected_logps)
        reference = (reference_chosen_logps, reference_rejected_logps)
        loss = losses.dpo(*policy, *reference, beta=self.beta, label_smoothing=self.label_smoothing)
        rewards = (self.beta * (ours - theirs).detach() for ours, theirs in zip(policy, reference))
        return loss.mean(), *rewards


class FusedLinearDPOLoss(nn.Module):
    """The DPO loss from hidden states and heads, called as Liger's `LigerFusedLinearDPOLoss`.

    Differences: it takes pairs without scored tokens (log-probs 0), its logits' means are over scored positions, and
    what decides how rather than what (`compiled`, `chunk_size`) is `Schedule`'s.

    Args:
        ignore_index: the label of positions that do not count.
        beta: > 0. label_smoothing: in [0, 0.5).
        alpha, compute_nll_loss: add alpha * (mean NLL of the chosen answers' tokens) to the loss.
        use_ref_model: False takes a reference of log-prob 0.
        average_log_prob: log-probs of sequences are means over tokens, not sums.
        loss_type: "sigmoid".
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        checks.choice("loss_type", loss_type, ("sigmoid",))
        self.ignore_index, self.alpha, self.compute_nll_loss = ignore_index, alpha, compute_nll_loss
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.loss = DPOLoss(beta, label_smoothing)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Optional[Tensor] = None,
        ref_input: Optional[Tensor] = None,
        ref_weight: Optional[Tensor] = None,
        ref_bias: Optional[Tensor] = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
        rejected_rewards)) from lin_weight [V, H], _input [2B, T, H] (chosen first), target [2B, T] (aligned), and the
        reference's like."""
        if self.use_ref_model and (ref_input is None or ref_weight is None):
            raise ValueError("ref_input, ref_weight: got None; pass both, or construct with use_ref_model=False")
        outputs = ("logps", "mean_logits")
        stats = linear_logps(_input, lin_weight, target, bias, ignore_index=self.ignore_index, outputs=outputs)
        mask = target != self.ignore_index
        sequences = sequence_logps(stats.logps, mask, average=self.average_log_prob)
        if sequences.numel() % 2:
            raise ValueError(f"_input: got {sequences.numel()} sequences, expected an even number, chosen first")
        reference = torch.zeros_like(sequences)
        if self.use_ref_model and ref_input is not None and ref_weight is not None:
            with torch.no_grad():
                ref = linear_logps(ref_input, ref_weight, target, ref_bias, ignore_index=self.ignore_index)
                reference = sequence_logps(ref.logps, mask, average=self.average_log_prob)
        loss, *rewards = self.loss(*sequences.chunk(2), *reference.chunk(2))
        counts = mask.sum(-1).view(2, -1).sum(-1).clamp(min=1)
        logits_means = (stats.mean_logits.sum(-1).view(2, -1).sum(-1) / counts).unbind(0)
        nll = loss.new_zeros(())
        if self.compute_nll_loss:
            nll = -stats.logps.chunk(2)[0].sum() / counts[0]
            loss = loss + self.alpha * nll
        return loss, (*sequences.chunk(2), *logits_means, nll, *rewards)
