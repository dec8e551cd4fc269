"""Losses of reward models: scores of answers in, [B] out, unreduced. s is the sigmoid."""

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
    """Bradley and Terry's likelihood of a preference: L = -log s(r_c - r_r - margin) + centering (r_c + r_r)^2.

    Bradley and Terry 1952; the margin: Touvron et al. 2023 (Llama 2), arXiv:2307.09288, eq. 2; the centring: Eisenstein
    et al. 2023, arXiv:2312.09244, eq. 2. TRL's RewardTrainer has both (center_rewards_coefficient, 0.01 recommended);
    OpenRLHF's PairWiseLoss has the margin. Its LogExpLoss is the same loss as log(1 + e^(r_r - r_c)), which overflows
    and takes a margin that it does not use.

    Args:
        chosen_rewards, rejected_rewards: [B].
        margin: by how much the chosen reward should be the larger, a number or [B]; no gradient. None: 0.
        centering: >= 0, what it costs that rewards are not centred on 0.

    Returns:
        [B], unreduced.
    """
    checks.alike(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    centering = checks.number("centering", centering, "finite numbers >= 0", lambda v: v >= 0)
    difference = chosen_rewards - rejected_rewards
    if isinstance(margin, Tensor):
        checks.alike(chosen_rewards=chosen_rewards, margin=margin)
        checks.finite("margin", margin)
        difference = difference - margin.detach()
    elif margin is not None:
        difference = difference - checks.number("margin", margin, "finite numbers", lambda v: True)
    loss = -logsigmoid(difference)
    return loss + centering * (chosen_rewards + rejected_rewards).square() if centering else loss


def plackett_luce(rewards: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Plackett and Luce's likelihood of a ranking, best first: L = sum_k [log sum_{j >= k} e^r_j - r_k].

    Luce 1959, Plackett 1975; with r = beta (logps - ref_logps) it is DPO for rankings (Rafailov et al. 2023,
    arXiv:2305.18290, appendix A.3, eqs. 18 to 20). Each choice among what is left costs
    -log s(r_k - log sum_{j > k} e^r_j), so that two answers give `bradley_terry` to the bit. TRL, OpenRLHF, verl and
    Liger have pairs only.

    Args:
        rewards: [B, K], the answers' rewards in the order of the ranking, the best first.
        mask: [B, K], True where there is an answer, for lists of unequal lengths. None: everywhere.

    Returns:
        [B], unreduced; a list of one answer, or none, gives 0.
    """
    if checks.floating("rewards", rewards).ndim != 2:
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected [B, K], the best first")
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    mask = checks.mask_like("mask", mask, rewards, "rewards")
    if rewards.shape[1] < 2:
        return torch.where(mask, rewards, 0).sum(1) * 0
    nothing = torch.finfo(rewards.dtype).min / 4  # e^nothing is 0, and twice as much is finite
    kept = torch.where(mask, rewards, nothing)
    # [B, K - 1]: of what comes after k. The gradient of logcumsumexp is NaN at -inf, so that is put in afterwards.
    rest = kept.clamp(min=nothing).flip(1).logcumsumexp(1).flip(1)[:, 1:]
    most = torch.where(mask, rewards.detach(), -torch.inf).flip(1).cummax(1).values.flip(1)[:, 1:]
    rest = torch.where(most == -torch.inf, most, rest)
    choices = mask[:, :-1] & mask.flip(1).cummax(1).values.flip(1)[:, 1:]
    difference = torch.where(choices, kept[:, :-1] - rest, 0)
    return torch.where(choices, -logsigmoid(difference), 0).sum(1)
