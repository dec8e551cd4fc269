"""Log-probs of sequences from hidden states and LM heads, as the losses of liger.py need them."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fused_po import checks, losses
from fused_po.lm_head.logps import linear_logps
from fused_po.reduce import mean, sequence_logps

Result = tuple[Tensor, tuple[Tensor, ...]]

# Errors of inner functions name the arguments of the modules.
with_liger_names = checks.rename_in_errors(hidden="_input", weight="lin_weight", labels="target")
with_reference_names = checks.rename_in_errors(
    hidden="ref_input", weight="ref_weight", bias="ref_bias", labels="target"
)


class Scored(NamedTuple):
    """Log-probs of S sequences under one head."""

    tokens: Tensor  # [S, T] log-probs, 0 for ignored tokens
    mask: Tensor  # [S, T]
    sequences: Tensor  # [S], sums or means over tokens
    mean_logits: Tensor  # [S], means over all positions (scored or not) and the vocabulary

    def halves(self) -> tuple[Tensor, Tensor]:
        """(chosen [B], rejected [B])"""
        return self.sequences.chunk(2)

    def logits_means(self) -> tuple[Tensor, Tensor]:
        """The mean logit of the chosen answers and of the rejected answers."""
        chosen, rejected = self.mean_logits.chunk(2)
        return mean(chosen), mean(rejected)

    def chosen_nll(self) -> Tensor:
        """The mean NLL over the tokens of the chosen answers."""
        tokens, mask = self.tokens.chunk(2)[0], self.mask.chunk(2)[0]
        return losses.sft(tokens).sum() / mask.sum().clamp(min=1)


@with_liger_names
def score(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Optional[Tensor], ignore_index: int, average: bool
) -> Scored:
    if checks.floating("hidden", hidden).ndim != 3:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected [B, T, H]")
    logps = linear_logps(hidden, weight, target, bias, ignore_index=ignore_index).logps
    mask = target != ignore_index
    return Scored(logps, mask, sequence_logps(logps, mask, average=average), mean_logits(hidden, weight, bias))


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """[S] means over positions and vocabulary: (mean of hidden) times (mean of the rows of the head)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    means = (hidden.mean(1, dtype=dtype) * weight.mean(0, dtype=dtype)).sum(-1)
    means = means if hidden.shape[1] else torch.zeros_like(means)
    return means if bias is None else means + bias.mean(dtype=dtype)


def score_pairs(hidden: Tensor, *rest) -> Scored:
    """`score` for pairs: the chosen sequences, then as many rejected ones."""
    if checks.tensor("_input", hidden).ndim != 3:
        raise ValueError(f"_input: got shape {tuple(hidden.shape)}, expected [2B, T, H], chosen first")
    if len(hidden) % 2:
        raise ValueError(f"_input: got {len(hidden)} sequences, expected an even number, chosen first")
    return score(hidden, *rest)


@with_reference_names
def score_reference(
    like: Scored, target: Tensor, reference: tuple, used: bool, ignore_index: int, average: bool
) -> Tensor:
    """[S] log-probs under the reference (input, weight, bias), without gradients; zeros if not used."""
    if not used:
        return torch.zeros_like(like.sequences)
    if reference[0] is None or reference[1] is None:
        raise ValueError("ref_input, ref_weight: got None; pass both, or construct with use_ref_model=False")
    with torch.no_grad():
        logps = linear_logps(*reference[:2], target, reference[2], ignore_index=ignore_index).logps
    return sequence_logps(logps, like.mask, average=average)


def pair_result(
    pairs: Scored, loss: Tensor, nll: Optional[Tensor], alpha: float, rewards: tuple, more: tuple = ()
) -> Result:
    """(loss, aux) of Liger's pairwise losses.

    loss: the mean loss plus alpha times the NLL. aux: chosen_logps, rejected_logps, chosen_logits_mean,
    rejected_logits_mean, nll, chosen_rewards, rejected_rewards, then `more`.
    """
    loss = mean(loss)
    if nll is not None:
        loss = loss + alpha * nll
    nll = loss.new_zeros(()) if nll is None else nll
    results = *pairs.halves(), *pairs.logits_means(), nll, *(r.detach() for r in rewards), *more
    # Copies: trainers all-reduce the results in place, and the backward reads the originals.
    return loss, tuple(value.clone() for value in results)
