"""Losses for reward models. They take rewards of answers and return [B], unreduced. s is the sigmoid."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_po import checks


def bradley_terry(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Optional[Union[float, Tensor]] = None,
    centering: float = 0.0,
) -> Tensor:
    """Bradley-Terry negative log-likelihood of a preference: L = -log s(r_c - r_r - margin) + centering (r_c + r_r)^2.

    Bradley and Terry 1952; the margin: Touvron et al. 2023 (Llama 2), arXiv:2307.09288, eq. 2; the centering:
    Eisenstein et al. 2023, arXiv:2312.09244, eq. 2. TRL's RewardTrainer has both (center_rewards_coefficient, 0.01
    recommended); OpenRLHF's PairWiseLoss has the margin. OpenRLHF's LogExpLoss writes the same loss as
    log(1 + e^(r_r - r_c)), which overflows, and ignores its margin argument.

    Args:
        chosen_rewards, rejected_rewards: [B].
        margin: how much larger the chosen reward should be, a number or [B]; no gradient. None: 0.
        centering: >= 0, the weight of the penalty that keeps rewards centered on 0.

    Returns:
        [B], unreduced.
    """
    checks.same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    centering = checks.number("centering", centering, "finite numbers >= 0", lambda v: v >= 0)
    difference = chosen_rewards - rejected_rewards
    if isinstance(margin, Tensor):
        checks.same_shape(chosen_rewards=chosen_rewards, margin=margin)
        checks.finite("margin", margin)
        difference = difference - margin.detach()
    elif margin is not None:
        difference = difference - checks.number("margin", margin, "finite numbers", lambda v: True)
    loss = -logsigmoid(difference)
    return loss + centering * (chosen_rewards + rejected_rewards).square() if centering else loss


def plackett_luce(rewards: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Plackett-Luce negative log-likelihood of a ranking, best first: L = sum_k [log sum_{j >= k} e^r_j - r_k].

    Luce 1959, Plackett 1975; with r = beta (logps - ref_logps) this is DPO for rankings (Rafailov et al. 2023,
    arXiv:2305.18290, appendix A.3, eqs. 18 to 20). It is computed as the sum of
    -log s(r_k - log sum_{j > k} e^r_j), so two answers give exactly `bradley_terry`. TRL, OpenRLHF, verl and Liger
    have pairs only.

    Args:
        rewards: [B, K], the rewards of the answers in the order of the ranking, best first.
        mask: [B, K], True where there is an answer, for lists of unequal lengths. None: everywhere.

    Returns:
        [B], unreduced; a list with fewer than two answers gives 0.
    """
    if checks.floating("rewards", rewards).ndim != 2:
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected [B, K], the best answer first")
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    mask = checks.mask_like("mask", mask, rewards, "rewards")
    if rewards.shape[1] < 2:
        return torch.where(mask, rewards, 0).sum(1) * 0
    lowest = torch.finfo(rewards.dtype).min / 4  # e^lowest is 0, and 2 * lowest is finite
    kept = torch.where(mask, rewards, lowest)
    # [B, K - 1]: log sum of e^r after k. The gradient of logcumsumexp is NaN at -inf, so -inf is inserted afterwards.
    rest = kept.clamp(min=lowest).flip(1).logcumsumexp(1).flip(1)[:, 1:]
    most = torch.where(mask, rewards.detach(), -torch.inf).flip(1).cummax(1).values.flip(1)[:, 1:]
    rest = torch.where(most == -torch.inf, most, rest)
    choices = mask[:, :-1] & mask.flip(1).cummax(1).values.flip(1)[:, 1:]
    difference = torch.where(choices, kept[:, :-1] - rest, 0)
    return torch.where(choices, -logsigmoid(difference), 0).sum(1)
