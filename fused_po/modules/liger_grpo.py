"""The GRPO family from hidden states and an LM head, with the signature of LigerFusedLinearGRPOLoss: see liger.py."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor, nn

from fused_po import checks, losses
from fused_po.lm_head.logps import linear_logps
from fused_po.losses.policy import clip_sides, importance_ratio, sequence_mean
from fused_po.reduce import aggregate

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
STEP_MEANS = ("dapo", "cispo", "vespo")  # these losses are means over the tokens of the whole step, on all ranks
LOSSES = (*CLIPPED, "cispo", "sapo", "vespo")
IGNORE = -100
# argument -> (its default, the loss_types that use it)
USED_BY: dict[str, tuple[object, tuple[str, ...]]] = {
    "max_completion_length": (None, ("dr_grpo",)),
    "epsilon_low": (0.2, CLIPPED),
    "epsilon_high": (0.2, (*CLIPPED, "cispo")),
    "delta": (None, CLIPPED),
    "importance_sampling_level": ("token", (*CLIPPED, "cispo", "sapo")),
    "sapo_temperature_pos": (1.0, ("sapo",)),
    "sapo_temperature_neg": (1.05, ("sapo",)),
    "vespo_k_pos": (2.0, ("vespo",)),
    "vespo_lambda_pos": (3.0, ("vespo",)),
    "vespo_k_neg": (3.0, ("vespo",)),
    "vespo_lambda_neg": (2.0, ("vespo",)),
}


class FusedLinearGRPOLoss(nn.Module):
    """Losses of the GRPO family, like LigerFusedLinearGRPOLoss. Math: `losses.grpo`, then `reduce.aggregate`.

    Differences from Liger:

    - Masked positions are not scored and have no effect. In Liger, padding enters the mean of "luspo" (visible with a
      KL, or with ratios or weights of tokens) and the weights of "vespo".
    - Log-ratios are clamped to [-20, 20]; Liger's overflow.
    - An argument that is not at its default and that the loss_type does not use is an error.
    - "cispo" and "sapo" also support ratios of sequences, as TRL's trainer does without Liger.

    With several ranks, "dapo", "cispo" and "vespo" divide by the number of tokens on all ranks and the other losses by
    the number on their own rank, as in Liger.

    Args:
        beta: >= 0, the coefficient of the KL (k3) to the reference.
        use_ref_model: False: no KL for any beta (its value in aux is 0, as in Liger), and a reference that is passed is
            ignored.
        epsilon_low, epsilon_high: the clip range, 1 - low to 1 + high. "cispo": epsilon_high is the cap on the ratio.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo" or "vespo".
        max_completion_length: required for "dr_grpo", not allowed for others.
        importance_sampling_level: "token" or "sequence"; not for "vespo".
        sapo_temperature_pos, sapo_temperature_neg: > 0, for "sapo".
        temperature: > 0, divides the logits.
        delta: > 1 + epsilon_high, the two-sided bound on the ratio.
        use_bias_correction_kl: multiply the KL by the ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: > 0, for "vespo".
    """

    @checks.rename_in_errors(
        epsilon="epsilon_low",
        **{name: f"sapo_{name}" for name in ("temperature_pos", "temperature_neg")},
        **{name: f"vespo_{name}" for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")},
    )
    def __init__(
        self,
        beta: float = 0.04,
        *,
        use_ref_model: bool = True,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: Optional[int] = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: Optional[float] = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        checks.choice("loss_type", loss_type, LOSSES)
        checks.flags(use_ref_model=use_ref_model, use_bias_correction_kl=use_bias_correction_kl)
        self.beta = checks.number("beta", beta, "finite numbers >= 0", lambda v: v >= 0)
        self.use_ref_model, self.loss_type, self.level = use_ref_model, loss_type, importance_sampling_level
        self.temperature = checks.positive("temperature", temperature)
        self.max_length, self.corrected = max_completion_length, use_bias_correction_kl
        self.epsilon_low, self.epsilon_high = epsilon_low, epsilon_high
        if (loss_type == "dr_grpo") != (max_completion_length is not None):
            got = f'{max_completion_length} with loss_type="{loss_type}"'
            raise ValueError(f'max_completion_length: got {got}; "dr_grpo" needs it, other losses do not use it')
        self.how = self._used_settings(
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            delta=delta,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
        )
        one = torch.zeros(1, 1)
        losses.grpo(one, one, one, one, loss_type=loss_type, **self.how)  # raises for invalid settings

    def _used_settings(self, **settings: object) -> dict:
        """The arguments of losses.grpo that the loss_type uses. Others must be at their defaults."""
        used = {}
        for name, value in settings.items():
            default, losses_using_it = USED_BY[name]
            is_used = self.loss_type in losses_using_it
            checks.only_with(name, value, default, is_used, "loss_type " + ", ".join(map(repr, losses_using_it)))
            if is_used:
                used["epsilon" if name == "epsilon_low" else name] = value
        return used

    @checks.rename_in_errors(
        hidden="_input",
        weight="lin_weight",
        labels="selected_token_ids",
        num_tokens="num_items_in_batch",
        weights="vllm_is_ratio",
    )
    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Optional[Tensor] = None,
        ref_per_token_logps: Optional[Tensor] = None,
        old_per_token_logps: Optional[Tensor] = None,
        ref_input: Optional[Tensor] = None,
        ref_weight: Optional[Tensor] = None,
        ref_bias: Optional[Tensor] = None,
        vllm_is_ratio: Optional[Tensor] = None,
        num_items_in_batch: Union[float, Tensor, None] = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the loss. Returns (loss, (kl, clip_ratio)), or (loss, (clip_ratio,)) if beta is 0.

        Args:
            _input: [B, T, H], hidden states. lin_weight: [V, H]. bias: [V].
            selected_token_ids, attention_mask: [B, T], labels aligned with _input, and which of them count.
            advantages: [B].
            ref_per_token_logps: [B, T]; or pass ref_input, ref_weight and ref_bias, from which they are computed.
            old_per_token_logps: [B, T]. None: those of the policy, so that ratios are 1.
            vllm_is_ratio: [B], [B, 1] or [B, T], weights >= 0 for a sampler that differs from the old policy.
            num_items_in_batch: the number of tokens of the whole step, over micro-batches and ranks, for "dapo",
                "cispo" and "vespo".
        """
        checks.tensor("selected_token_ids", selected_token_ids)
        mask = checks.mask_like("attention_mask", attention_mask, selected_token_ids, "selected_token_ids")
        labels = torch.where(mask, selected_token_ids, IGNORE)
        logps = linear_logps(_input, lin_weight, labels, bias, temperature=self.temperature).logps
        if checks.floating("advantages", advantages).shape != logps.shape[:1]:
            got, expected = tuple(advantages.shape), tuple(logps.shape[:1])
            raise ValueError(f"advantages: got shape {got}, expected {expected}, one per answer")
        old = logps.detach() if old_per_token_logps is None else old_per_token_logps
        ref = self._reference(labels, ref_per_token_logps, (ref_input, ref_weight, ref_bias))
        checks.same_shape(logps=logps, old_per_token_logps=old, **checks.not_none(ref_per_token_logps=ref))
        weights = None if vllm_is_ratio is None else self._weights(vllm_is_ratio, logps)
        kl = {} if ref is None else dict(beta=self.beta, use_bias_correction_kl=self.corrected)
        token_losses = losses.grpo(
            logps, old, advantages, mask, ref, loss_type=self.loss_type, weights=weights, **kl, **self.how
        )
        loss = self._mean(token_losses, mask, num_items_in_batch)
        return loss, self._metrics(logps.detach(), old, ref, advantages, mask)

    def _weights(self, vllm_is_ratio: Tensor, logps: Tensor) -> Tensor:
        """vllm_is_ratio as [B, 1] or [B, T]."""
        weights = checks.floating("vllm_is_ratio", vllm_is_ratio)
        weights = weights[:, None] if weights.ndim == 1 else weights
        if weights.shape not in (logps.shape, logps[:, :1].shape):
            got = tuple(vllm_is_ratio.shape)
            raise ValueError(f"vllm_is_ratio: got shape {got}, expected [B], [B, 1] or [B, T], {tuple(logps.shape)}")
        return weights

    def _reference(self, labels: Tensor, logps: Optional[Tensor], parts: tuple) -> Optional[Tensor]:
        """The log-probs [B, T] of the reference, or None without a KL."""
        if not self.use_ref_model or self.beta == 0:
            return None
        if logps is not None:
            return logps
        if parts[0] is None or parts[1] is None:
            raise ValueError(
                "ref_per_token_logps: got None; pass them, or ref_input and ref_weight, or construct with "
                "use_ref_model=False"
            )
        with torch.no_grad():
            return linear_logps(*parts[:2], labels, parts[2], temperature=self.temperature).logps

    def _mean(self, loss: Tensor, mask: Tensor, num_items_in_batch: Union[float, Tensor, None]) -> Tensor:
        """Reduce token losses [B, T] to the loss."""
        mode, ranks = losses.GRPO_MODES[self.loss_type], 1
        if self.loss_type not in STEP_MEANS:
            checks.only_with(
                "num_items_in_batch", num_items_in_batch, None, False, "loss_type " + ", ".join(map(repr, STEP_MEANS))
            )
            counts = {} if mode == "token-mean" else dict(num_sequences=len(loss))
            return aggregate(loss, mask, mode, max_length=self.max_length, **counts)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed:
            ranks = torch.distributed.get_world_size()
        if num_items_in_batch is None and distributed:
            num_items_in_batch = mask.sum().float()
            torch.distributed.all_reduce(num_items_in_batch)
        return aggregate(loss, mask, mode, num_tokens=num_items_in_batch, world_size=ranks)

    def _metrics(
        self, logps: Tensor, old: Tensor, ref: Optional[Tensor], advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        log_ratio = torch.where(mask, logps - old.detach(), 0)
        if self.level == "sequence":
            log_ratio = sequence_mean(log_ratio, mask)
        ratio, a = importance_ratio(log_ratio, 20.0), advantages[:, None]
        clipped = torch.zeros_like(mask)
        if self.loss_type in CLIPPED:
            below, above = clip_sides(ratio, a, self.epsilon_low, self.epsilon_high)
            clipped = below | above
        elif self.loss_type == "cispo":
            clipped = (a > 0) & (ratio > self.epsilon_high)
        clip_ratio = losses.masked_mean(clipped.expand_as(mask).to(logps.dtype), mask)
        if self.beta == 0:
            return (clip_ratio,)
        if ref is None:
            return logps.new_zeros(()), clip_ratio
        kl = losses.kl_estimate(logps, torch.where(mask, ref, logps), "k3")
        return losses.masked_mean(kl * ratio if self.corrected else kl, mask), clip_ratio
