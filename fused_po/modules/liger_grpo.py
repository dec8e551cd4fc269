"""The GRPO family from hidden states and a head, called as Liger's LigerFusedLinearGRPOLoss 0.8.5: see liger.py."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor, nn

from fused_po import checks, losses
from fused_po.lm_head.logps import linear_logps
from fused_po.reduce import aggregate

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
OF_STEP = ("dapo", "cispo", "vespo")  # means over the tokens of the whole step, on all ranks
LOSSES = (*CLIPPED, "cispo", "sapo", "vespo")
IGNORE = -100
# By argument: its default, and the loss_types that read it.
READERS: dict[str, tuple[object, tuple[str, ...]]] = {
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
    """Losses of the GRPO family, as LigerFusedLinearGRPOLoss. Math: `losses.grpo`, then `reduce.aggregate`.

    Unlike Liger's: masked positions are neither scored nor looked at ("luspo" there takes a mean over padding too,
    which shows with a KL, or with ratios or weights of tokens; "vespo" takes in weights of padding); log-ratios are
    held within +-20, where Liger's overflow; an argument away from its default that the loss_type does not read is an
    error; "cispo" and "sapo" also take ratios of sequences, as TRL's trainer does without Liger. Over ranks, as there,
    "dapo", "cispo" and "vespo" divide by the tokens of all, the others by their own.

    Args:
        beta: >= 0, of the KL (k3) to the reference.
        use_ref_model: False: no KL, whatever beta (Liger's is then 0 too); a reference that is passed is not looked at.
        epsilon_low, epsilon_high: the clip range, 1 - low to 1 + high; "cispo": epsilon_high is the cap on the ratio.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo" or "vespo".
        max_completion_length: for "dr_grpo", which needs it.
        importance_sampling_level: "token" or "sequence"; not "vespo"'s.
        sapo_temperature_pos, sapo_temperature_neg: > 0, "sapo"'s.
        temperature: > 0, of the logits.
        delta: > 1 + epsilon_high, the two-sided bound on the ratio.
        use_bias_correction_kl: multiply the KL by the ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: > 0, "vespo"'s.
    """

    @checks.called(
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
            raise ValueError(f'max_completion_length: got {got}; "dr_grpo" needs it, and no other reads it')
        self.how: dict = {}  # arguments of losses.grpo
        given = dict(
            epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg,
        )  # fmt: skip
        for name, value in given.items():
            default, readers = READERS[name]
            checks.only_with(name, value, default, loss_type in readers, f"loss_type in {readers}")
            if loss_type in readers:
                self.how["epsilon" if name == "epsilon_low" else name] = value
        one = torch.zeros(1, 1)
        losses.grpo(one, one, one, one, loss_type=loss_type, **self.how)  # settings that cannot be are errors already

    @checks.called(
        hidden="_input", weight="lin_weight", labels="selected_token_ids", num_tokens="num_items_in_batch",
        weights="vllm_is_ratio",
    )  # fmt: skip
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
        """(loss, (kl, clip_ratio)), without kl for beta = 0.

        Args:
            _input: [B, T, H], hidden states. lin_weight: [V, H]. bias: [V].
            selected_token_ids, attention_mask: [B, T], labels aligned with _input, and which of them count.
            advantages: [B].
            ref_per_token_logps: [B, T]; or ref_input, ref_weight, ref_bias, from which they are scored.
            old_per_token_logps: [B, T]. None: the policy's own, so that ratios are 1.
            vllm_is_ratio: [B], [B, 1] or [B, T], weights >= 0 for a sampler that is not the old policy.
            num_items_in_batch: tokens of the whole step, over micro-batches and ranks, for "dapo", "cispo", "vespo".
        """
        checks.tensor("selected_token_ids", selected_token_ids)
        mask = checks.mask_like("attention_mask", attention_mask, selected_token_ids, "selected_token_ids")
        labels = torch.where(mask, selected_token_ids, IGNORE)
        logps = linear_logps(_input, lin_weight, labels, bias, temperature=self.temperature).logps
        if checks.floating("advantages", advantages).shape != logps.shape[:1]:
            got, expected = tuple(advantages.shape), tuple(logps.shape[:1])
            raise ValueError(f"advantages: got shape {got}, expected {expected}, one an answer")
        old = logps.detach() if old_per_token_logps is None else old_per_token_logps
        ref = self._reference(labels, ref_per_token_logps, (ref_input, ref_weight, ref_bias))
        checks.alike(logps=logps, old_per_token_logps=old, **checks.given(ref_per_token_logps=ref))
        weights = vllm_is_ratio
        if weights is not None:
            weights = weights[:, None] if checks.floating("vllm_is_ratio", weights).ndim == 1 else weights
            if weights.shape not in (logps.shape, logps[:, :1].shape):
                got = tuple(vllm_is_ratio.shape)
                raise ValueError(
                    f"vllm_is_ratio: got shape {got}, expected [B], [B, 1] or [B, T], {tuple(logps.shape)}"
                )
        kl = {} if ref is None else dict(beta=self.beta, use_bias_correction_kl=self.corrected)
        of_tokens = losses.grpo(
            logps, old, advantages, mask, ref, loss_type=self.loss_type, weights=weights, **kl, **self.how
        )
        loss = self._mean(of_tokens, mask, num_items_in_batch)
        return loss, self._metrics(logps.detach(), old, ref, advantages, mask)

    def _reference(self, labels: Tensor, logps: Optional[Tensor], parts: tuple) -> Optional[Tensor]:
        """[B, T], or None where there is no KL."""
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
        """The loss of the tokens' losses [B, T]."""
        mode, ranks = losses.GRPO_MODES[self.loss_type], 1
        if self.loss_type not in OF_STEP:
            checks.only_with("num_items_in_batch", num_items_in_batch, None, False, f"loss_type in {OF_STEP}")
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
            log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        ratio, gain = log_ratio.clamp(-20, 20).exp(), advantages[:, None]
        clipped = torch.zeros_like(mask)
        if self.loss_type in CLIPPED:
            clipped = ((gain > 0) & (ratio > 1 + self.epsilon_high)) | ((gain < 0) & (ratio < 1 - self.epsilon_low))
        elif self.loss_type == "cispo":
            clipped = (gain > 0) & (ratio > self.epsilon_high)
        clip_ratio = losses.masked_mean(clipped.expand_as(mask).to(logps.dtype), mask)
        if self.beta == 0:
            return (clip_ratio,)
        if ref is None:
            return logps.new_zeros(()), clip_ratio
        kl = losses.kl_estimate(logps, torch.where(mask, ref, logps), "k3")
        return losses.masked_mean(kl * ratio if self.corrected else kl, mask), clip_ratio
