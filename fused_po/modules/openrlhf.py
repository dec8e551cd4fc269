"""Losses with the signatures of openrlhf/models/loss.py in OpenRLHF 0.11.2.

docs/api.md, "Modules", describes them. Formulas are those of `losses`, reductions those of `reduce.aggregate`.
Log-probs are per token, [B, T], or [B] where the class says so. Masks may be boolean, integer or floating; masked
values may be NaN. A batch without counted tokens gives 0, where OpenRLHF's losses give NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_po import checks, losses
from fused_po.losses.policy import clip_sides, importance_ratio, sequence_mean
from fused_po.ops.logps import logps_from_logits, shift_labels
from fused_po.reduce import aggregate, mean


@checks.rename_in_errors(num_tokens="batch_num_tokens", num_sequences="global_batch_size", world_size="dp_size")
def step_loss(
    loss: Tensor,
    mask: Tensor,
    token_level_loss: bool,
    dp_size: int,
    batch_num_tokens: Optional[float],
    global_batch_size: Optional[float],
) -> Tensor:
    """The mean over tokens, or over sequences of their token means. With counts: this rank's share of the step."""
    checks.whole_number("world_size", dp_size, 1)
    counts = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
    name, other = counts if token_level_loss else reversed(counts)
    if counts[name] is None and (dp_size != 1 or counts[other] is not None):
        reason = "dp_size > 1" if counts[other] is None else f"{other} is set"
        raise ValueError(f"{name}: got None, expected the count of the whole step, since {reason}")
    mode = "token-mean" if token_level_loss else "seq-mean-token-mean"
    return aggregate(loss, mask, mode, num_tokens=batch_num_tokens, num_sequences=global_batch_size, world_size=dp_size)


def action_mask_like(action_mask: Optional[Tensor], log_probs: Tensor) -> Tensor:
    """The mask as booleans, all True for None. log_probs: log-probs or values of the mask's shape."""
    if action_mask is None:
        return torch.ones_like(log_probs, dtype=torch.bool)
    return checks.mask_like("action_mask", action_mask, log_probs, "the log-probs or values")


class PolicyLoss(nn.Module):
    """PPO's or GSPO's loss, and metrics. Math: `losses.ppo_clip`, `losses.gspo`, `losses.importance_weights`.

    Args:
        clip_eps_low, clip_eps_high: the clip range, 1 - low to 1 + high.
        dual_clip: > 1, the bound where the advantage is negative, or None.
        token_level_loss: True: mean over the tokens of the batch. False: mean over sequences of their token means;
            "gspo" always uses this.
        policy_loss_type: "ppo" or "gspo".
        is_correction_level: "off", "token" or "seq": correct for a sampler that differs from the old policy. "gspo"
            uses the sampler's log-probs as the old ones at both levels. "ppo" multiplies the loss of each token by
            pi_old / pi_sampler, and drops tokens ("token") or whole sequences ("seq") by the next three arguments:
        is_correction_mode: "mask" drops what is outside the threshold, "clip" clamps the weight of a token to it.
        is_correction_gating: the quantity that is compared with the threshold. "ratio": pi_old / pi_sampler, for a
            sequence its geometric mean. "binary_kl", "tv": the KL from sampler to old policy, or the total variation
            distance, of the sampled token against all other tokens; for a sequence the mean.
        is_correction_threshold: (low, high). low must be <= 0 for "binary_kl" and "tv", which have no lower bound.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: Optional[float] = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        checks.flags(token_level_loss=token_level_loss)
        checks.number("clip_eps_low", clip_eps_low, "numbers in (0, 1]", lambda v: 0 < v <= 1)
        checks.positive("clip_eps_high", clip_eps_high)
        checks.choice("policy_loss_type", policy_loss_type, ("ppo", "gspo"))
        checks.choice("is_correction_level", is_correction_level, ("off", "token", "seq"))
        checks.choice("is_correction_mode", is_correction_mode, ("mask", "clip"))
        checks.choice("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv"))
        if dual_clip is not None:
            checks.number("dual_clip", dual_clip, "numbers > 1, or None", lambda v: v > 1)
        weighs = is_correction_level != "off" and policy_loss_type == "ppo"
        where = 'policy_loss_type="ppo" and is_correction_level="token" or "seq"'
        checks.only_with("is_correction_gating", is_correction_gating, "ratio", weighs, where)
        clips = weighs and is_correction_level == "token" and is_correction_gating == "ratio"
        where = 'policy_loss_type="ppo", is_correction_level="token" and is_correction_gating="ratio"'
        checks.only_with("is_correction_mode", is_correction_mode, "mask", clips, where)
        is_correction_threshold = checks.as_tuple("is_correction_threshold", is_correction_threshold, "two numbers")
        low = is_correction_threshold[0] if len(is_correction_threshold) == 2 else None
        if low is None or (is_correction_gating != "ratio" and low > 0):
            allowed = "(low, high)" if is_correction_gating == "ratio" else "(low, high) with low <= 0: an upper bound"
            raise ValueError(f"is_correction_threshold: got {is_correction_threshold}, expected {allowed}")
        self.token_level_loss = token_level_loss and policy_loss_type == "ppo"
        self.policy_loss_type, self.is_correction_level = policy_loss_type, is_correction_level
        self.dual_clip, self.clip_eps_low, self.clip_eps_high = dual_clip, clip_eps_low, clip_eps_high
        self.is_correction_mode, self.is_correction_gating = is_correction_mode, is_correction_gating
        self.is_correction_threshold = is_correction_threshold

    @checks.rename_in_errors(logps="log_probs", old_logps="old_log_probs", mask="action_mask")
    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Optional[Tensor] = None,
        rollout_log_probs: Optional[Tensor] = None,
        dp_size: int = 1,
        batch_num_tokens: Optional[float] = None,
        global_batch_size: Optional[float] = None,
    ) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
        """Compute (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio).

        Args:
            log_probs, old_log_probs: [B, T]. advantages: [B] or [B, T].
            action_mask: [B, T]. None: every token counts.
            rollout_log_probs: [B, T], log-probs of the sampler; required with the correction, else ignored.
            dp_size: the number of data-parallel ranks.
            batch_num_tokens, global_batch_size: the number of tokens and of sequences of the whole step, over all
                ranks. The mean over tokens divides by the first, the mean over sequences by the second. None: those of
                this batch.

        Returns:
            clip_ratio: the share of tokens whose clipped term is smaller. ppo_kl: the mean of old_log_probs -
            log_probs. vllm_kl: the mean of rollout_log_probs - old_log_probs. is_filter_ratio: the share of tokens or
            sequences outside the threshold. The last two are None except for "ppo" with the correction.
        """
        corrects = self.is_correction_level != "off"
        if corrects and rollout_log_probs is None:
            got = f"is_correction_level={self.is_correction_level!r}"
            raise ValueError(f"rollout_log_probs: got None with {got}, expected the log-probs of the sampler")
        rollout_log_probs = rollout_log_probs if corrects else None
        sampler = checks.not_none(rollout_log_probs=rollout_log_probs)
        checks.same_shape(log_probs=log_probs, old_log_probs=old_log_probs, **sampler)
        mask = action_mask_like(action_mask, log_probs)
        clip = dict(epsilon=self.clip_eps_low, epsilon_high=self.clip_eps_high)
        vllm_kl = filtered = None
        if self.policy_loss_type == "gspo":
            old = rollout_log_probs if corrects else old_log_probs
            loss = losses.gspo(log_probs, old, advantages, mask, delta=self.dual_clip, **clip)
            log_ratio = torch.where(mask, log_probs - old, 0).detach()
            log_ratio = sequence_mean(log_ratio, mask)
        else:
            loss = losses.ppo_clip(log_probs, old_log_probs, advantages, mask, dual_clip=self.dual_clip, **clip)
            log_ratio = (log_probs - old_log_probs).detach()
            if corrects:
                weights, filtered = self._weights(old_log_probs, rollout_log_probs, mask)
                loss = loss * weights
                vllm_kl = losses.masked_mean(rollout_log_probs - old_log_probs, mask)
        counts = (dp_size, batch_num_tokens, global_batch_size)
        ratio = importance_ratio(log_ratio, 20.0)
        a = advantages if advantages.ndim == 2 else advantages[:, None]
        below, above = clip_sides(ratio, a, self.clip_eps_low, self.clip_eps_high)
        clip_ratio = losses.masked_mean((below | above).expand_as(mask).to(log_probs.dtype), mask)
        ppo_kl = losses.masked_mean(old_log_probs - log_probs, mask)
        return step_loss(loss, mask, self.token_level_loss, *counts), clip_ratio, ppo_kl, vllm_kl, filtered

    def _weights(self, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(importance weights [B, T] without gradient, the share of tokens or sequences outside the threshold)."""
        low, high = self.is_correction_threshold
        logps = (old_log_probs.detach(), rollout_log_probs, mask)
        weights = losses.importance_weights(*logps, high=None)
        if self.is_correction_gating == "ratio":
            level = {"token": "token", "seq": "geometric"}[self.is_correction_level]
            measure = losses.importance_weights(*logps, level=level, high=None)
        else:
            measure = sampled_token_divergence(*logps, self.is_correction_gating)
            if self.is_correction_level == "seq":
                measure = sequence_mean(measure, mask)
        measure = measure.expand_as(weights)
        outside = mask & ((measure < low) | (measure > high))
        share = losses.masked_mean(outside.to(weights.dtype), mask)
        if self.is_correction_level == "seq":
            share = outside.any(-1).sum().to(weights.dtype) / mask.any(-1).sum().clamp(min=1)
        if self.is_correction_mode == "clip":
            return weights.clamp(low, high), share
        return torch.where(outside, 0, weights), share


def sampled_token_divergence(old_logps: Tensor, sampler_logps: Tensor, mask: Tensor, kind: str) -> Tensor:
    """[B, T], the divergence of two Bernoulli distributions: the sampled token or any other. 0 where masked."""
    eps = 1e-6  # OpenRLHF clamps probabilities to [eps, 1 - eps]
    p, q = (torch.where(mask, v, 0).exp().clamp(eps, 1 - eps) for v in (sampler_logps, old_logps))
    divergence = (p - q).abs() if kind == "tv" else p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return torch.where(mask, divergence, 0)


class ValueLoss(nn.Module):
    """The loss of the critic. Math: `losses.value_loss`, with the factor 1/2.

    Args:
        clip_eps: > 0, how far values may move from the old ones. None: no clip.
        token_level_loss: True: mean over the tokens of the batch. False: mean over sequences of their token means.
    """

    def __init__(self, clip_eps: Optional[float] = None, token_level_loss: bool = True) -> None:
        super().__init__()
        checks.flags(token_level_loss=token_level_loss)
        self.clip_eps = None if clip_eps is None else checks.positive("clip_eps", clip_eps)
        self.token_level_loss = token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Optional[Tensor] = None,
        dp_size: int = 1,
        batch_num_tokens: Optional[float] = None,
        global_batch_size: Optional[float] = None,
    ) -> Tensor:
        """The loss of values, old values and returns [B, T]. Other arguments as in `PolicyLoss.forward`."""
        mask = action_mask_like(action_mask, checks.floating("values", values))
        loss = losses.value_loss(values, old_values, returns, mask, clip_eps=self.clip_eps)
        return step_loss(loss, mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)


class SFTLoss(nn.Module):
    """The mean NLL of tokens. Math: `losses.sft`.

    Args:
        token_level_loss: True: mean over the tokens of the batch. False: mean over sequences of their token means.
    """

    def __init__(self, token_level_loss: bool = True) -> None:
        super().__init__()
        checks.flags(token_level_loss=token_level_loss)
        self.token_level_loss = token_level_loss

    @checks.rename_in_errors(token_loss="per_token_logps", mask="loss_mask")
    def forward(
        self,
        per_token_logps: Tensor,
        loss_mask: Tensor,
        dp_size: int = 1,
        batch_num_tokens: Optional[float] = None,
        global_batch_size: Optional[float] = None,
    ) -> Tensor:
        """The loss of log-probs [B, T] with a mask [B, T]. Other arguments as in `PolicyLoss.forward`."""
        checks.floating("per_token_logps", per_token_logps)
        mask = checks.mask_like("loss_mask", loss_mask, per_token_logps, "per_token_logps")
        loss = losses.sft(per_token_logps, mask)
        return step_loss(loss, mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)


class GPTLMLoss(nn.Module):
    """The mean NLL of the next token, from logits. Math: `logps_from_logits`.

    Args:
        ring_attn_group: must be None: sequences sharded over ranks are not supported.
    """

    def __init__(self, ring_attn_group: Any = None) -> None:
        super().__init__()
        if ring_attn_group is not None:
            raise ValueError(
                "ring_attn_group: got a group, allowed is None; for sequences sharded over ranks, shift the labels "
                "before sharding and use fused_po.logps_from_logits"
            )

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits [..., T, V] for unshifted labels [..., T]; labels of -100 do not count."""
        shifted = shift_labels(labels)
        return -logps_from_logits(logits, shifted).logps.sum() / (shifted != -100).sum().clamp(min=1)


class PairWiseLoss(nn.Module):
    """The pairwise loss of a reward model. Math: `losses.bradley_terry`."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Optional[Tensor] = None) -> Tensor:
        """The mean loss of rewards and margins, all of one shape."""
        checks.same_shape(chosen_reward=chosen_reward, reject_reward=reject_reward, **checks.not_none(margin=margin))
        return mean(losses.bradley_terry(chosen_reward, reject_reward, margin=margin))


class LogExpLoss(nn.Module):
    """The same loss as PairWiseLoss without a margin, log(1 + e^(reject - chosen)), here without overflow."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Optional[Tensor] = None) -> Tensor:
        """The mean loss of rewards of one shape. A margin is an error; OpenRLHF ignores it."""
        if margin is not None:
            raise ValueError("margin: LogExpLoss does not use it, expected None; use PairWiseLoss for a margin")
        checks.same_shape(chosen_reward=chosen_reward, reject_reward=reject_reward)
        return mean(losses.bradley_terry(chosen_reward, reject_reward))


class DPOLoss(nn.Module):
    """DPO's or IPO's loss from sequence log-probs. Math: `losses.dpo`, `losses.ipo` (on sums).

    Args:
        beta: > 0. label_smoothing: in [0, 0.5); an error with IPO, where OpenRLHF ignores it.
        ipo: use IPO instead of DPO.
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        checks.flags(ipo=ipo)
        self.beta = checks.positive("beta", beta)
        allowed = "0 <= label_smoothing < 0.5"
        self.label_smoothing = checks.number("label_smoothing", label_smoothing, allowed, lambda v: 0 <= v < 0.5)
        checks.only_with("label_smoothing", label_smoothing, 0.0, not ipo, "ipo=False")
        self.ipo = ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(mean loss, chosen rewards [B], rejected rewards [B]) from four log-probs [B]; the rewards are detached."""
        checks.per_sequence(
            policy_chosen_logps=policy_chosen_logps,
            policy_rejected_logps=policy_rejected_logps,
            reference_chosen_logps=reference_chosen_logps,
            reference_rejected_logps=reference_rejected_logps,
        )
        policy = (policy_chosen_logps, policy_rejected_logps)
        reference = (reference_chosen_logps, reference_rejected_logps)
        if self.ipo:
            loss = losses.ipo(*policy, *reference, beta=self.beta)
        else:
            loss = losses.dpo(*policy, *reference, beta=self.beta, label_smoothing=self.label_smoothing)
        rewards = (self.beta * (ours - theirs).detach() for ours, theirs in zip(policy, reference))
        return mean(loss), *rewards
