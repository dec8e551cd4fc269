"""Advantages without a value function: group baselines, leave-one-out, whitening, REINFORCE++.

No gradient flows to the rewards. Statistics are fp32 (float64 for float64 rewards) and cover the tensors that are
passed: with several ranks, gather the rewards first. A NaN or infinite reward is an error on CPU, and elsewhere with
FUSED_PO_DEBUG=1; TRL instead removes such answers from their group. GAE is `fused_po.gae`.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_po import checks

SCALES = ("group", "batch", "none")


def _constant(name: str, value: Tensor, ndim: int, mask: Optional[Tensor] = None) -> Tensor:
    """Check `value` and return it detached, in the dtype of the statistics, 0 where the mask is False."""
    if checks.floating(name, value).ndim != ndim:
        expected = {1: "[B]", 2: "[B, T]"}[ndim]
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}")
    checks.finite(name, value, mask)
    value = value.detach() if value.dtype == torch.float64 else value.detach().float()
    return value if mask is None else torch.where(mask, value, 0)


def _group_index(groups: Union[int, Tensor], rewards: Tensor) -> Tensor:
    """[B] group indices in [0, B), from a group size or from arbitrary ids, without a host sync."""
    n = rewards.numel()
    if isinstance(groups, int) and not isinstance(groups, bool):
        if groups < 1 or n % groups:
            raise ValueError(f"groups: got size {groups} for {n} rewards, expected a divisor of the number of rewards")
        return torch.arange(n, device=rewards.device) // groups
    if not isinstance(groups, Tensor):
        raise TypeError(f"groups: got {type(groups).__name__}, expected an integer size or a tensor of group ids")
    groups = checks.integer("groups", groups, rewards.shape, rewards.device, "one id for each reward")
    ordered, order = groups.sort()
    rank = pad((ordered.diff() != 0).cumsum(0), (min(n, 1), 0))
    return torch.empty_like(groups).scatter_(0, order, rank)


def _centered(rewards: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(rewards minus the mean of their group, group sizes), each [B]. Equal rewards give exactly 0.

    Otherwise a rounding error divided by a standard deviation of 0 plus a small eps would become an advantage.
    """
    zeros = torch.zeros_like(rewards)
    sizes = zeros.index_add(0, index, torch.ones_like(rewards))[index]
    shifted = rewards - zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)[index]
    return shifted - zeros.index_add(0, index, shifted)[index] / sizes, sizes


def group_advantages(
    rewards: Tensor, groups: Union[int, Tensor], *, scale: str = "group", eps: Optional[float] = None
) -> Tensor:
    """GRPO's advantage of each answer relative to the other answers to its prompt.

        A_i = (r_i - mean of its group) / (std + eps)

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (outcome supervision). The std divides by n - 1, as in TRL, verl
    and OpenRLHF. It is that of the group or of the batch (Liu et al. 2025, arXiv:2508.08221, "Lite PPO"). Without the
    std this is Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), which argues that the std favors prompts that are too easy
    or too hard.

    eps is 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF. A group of one answer gives 0, as in TRL; in verl it keeps its
    reward. Equal rewards give exactly 0.

    Args:
        rewards: [B], one per answer.
        groups: the size G of consecutive groups, or [B] integer ids in any order.
        scale: "group", "batch" or "none", the values of TRL's `scale_rewards`.
        eps: >= 0, added to the std. None: 1e-4; it must be None with scale="none".

    Returns:
        [B], at least fp32.
    """
    checks.choice("scale", scale, SCALES)
    if scale == "none" and eps is not None:
        raise ValueError(f"eps: got {eps}, expected None with scale='none', which does not divide")
    eps = checks.number("eps", 1e-4 if eps is None else eps, "numbers >= 0", lambda x: x >= 0)
    rewards = _constant("rewards", rewards, 1)
    index = _group_index(groups, rewards)
    centered, sizes = _centered(rewards, index)
    if scale == "none":
        return centered
    spread = centered
    if scale == "batch":
        index = torch.zeros_like(index)
        spread, sizes = _centered(rewards, index)
    squares = torch.zeros_like(rewards).index_add(0, index, spread.square())[index]
    std = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return centered / torch.where(std == 0, 1, std + eps)


def leave_one_out_advantages(rewards: Tensor, groups: Union[int, Tensor]) -> Tensor:
    """RLOO's advantage of each answer over the mean of the other answers to its prompt.

        A_i = r_i - 1 / (n - 1) sum_(j != i) r_j = n / (n - 1) (r_i - mean of its group)

    Ahmadian et al. 2024, arXiv:2402.14740; TRL, OpenRLHF, verl. A group of one answer gives 0, as in TRL; in verl it
    keeps its reward. TRL's `normalize_advantages` is `whiten` of the result.

    Args:
        rewards: [B], one per answer.
        groups: the size of consecutive groups, or [B] integer ids in any order.

    Returns:
        [B], at least fp32.
    """
    rewards = _constant("rewards", rewards, 1)
    centered, sizes = _centered(rewards, _group_index(groups, rewards))
    return centered * (sizes / (sizes - 1).clamp(min=1))


def whiten(
    values: Tensor, mask: Optional[Tensor] = None, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """Normalize the values that count to mean 0 and variance 1.

        (x - mean) / sqrt(variance + eps),    plus the mean with shift_mean=False

    TRL and verl divide by n - 1 in the variance (`masked_whiten`, eps = 1e-8 as here); OpenRLHF divides by n and clamps
    the variance to at least 1e-8 in place of adding eps. TRL's RLOO divides by (std + 1e-4). A single value gives 0;
    verl raises.

    Args:
        values: any shape; no gradient.
        mask: like values, True where a value counts. None: all count.
        shift_mean: subtract the mean. False keeps the mean and only scales the deviations (as TRL's PPO did with
            rewards).
        unbiased: divide the sum of squares by n - 1 instead of n.
        eps: >= 0.

    Returns:
        Like values, at least fp32, 0 where the mask is False. Equal values give exactly 0 (or their mean).
    """
    checks.flags(shift_mean=shift_mean, unbiased=unbiased)
    eps = checks.number("eps", eps, "numbers >= 0", lambda x: x >= 0)
    checks.floating("values", values)
    mask = (
        torch.ones_like(values, dtype=torch.bool) if mask is None else checks.mask_like("mask", mask, values, "values")
    )
    values = _constant("values", values, values.ndim, mask)
    if not values.numel():
        return values
    count = mask.sum()
    lowest = torch.where(mask, values, torch.inf).amin()
    lowest = torch.where(count > 0, lowest, 0)
    shifted = torch.where(mask, values - lowest, 0)
    mean = shifted.sum() / count.clamp(min=1)
    centered = torch.where(mask, shifted - mean, 0)
    variance = centered.square().sum() / (count - 1 if unbiased else count).clamp(min=1)
    scale = torch.where(variance == 0, 1, variance + eps).rsqrt()
    return torch.where(mask, centered * scale + (0 if shift_mean else mean + lowest), 0)


def _returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma * R at the next counted position. Computed by doubling, in log2(T) steps."""
    returns, discount = rewards, torch.ones_like(rewards).masked_fill(mask, gamma)
    step = 1
    while step < rewards.shape[1]:
        returns = returns + discount * pad(returns[:, step:], (0, step))
        discount = discount * pad(discount[:, step:], (0, step))
        step *= 2
    return returns


def reinforce_plus_plus_advantages(
    rewards: Tensor, mask: Optional[Tensor] = None, *, gamma: float = 1.0, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """REINFORCE++: the discounted reward-to-go of each token, whitened over the batch.

        R_t = r_t + gamma R_(t+1),   A = whiten(R)

    Hu et al. 2025, arXiv:2501.03262. Its token rewards are -beta log(pi / pi_ref), plus the reward of the answer at the
    last token (`kl_in_reward`). Masked positions are skipped. verl resets R to 0 at each of them, so rewards after a
    tool's answer are not credited to tokens before it; OpenRLHF applies the discount at them too. unbiased=True is
    verl's, False OpenRLHF's: see `whiten`.

    Args:
        rewards: [B, T], one per token.
        mask: [B, T], True where a token counts. None: all count.
        gamma: in [0, 1].
        unbiased, eps: of `whiten`.

    Returns:
        [B, T], at least fp32, 0 where the mask is False.
    """
    gamma = checks.number("gamma", gamma, "numbers from 0 to 1", lambda x: 0 <= x <= 1)
    checks.floating("rewards", rewards)
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    mask = checks.mask_like("mask", mask, rewards, "rewards")
    rewards = _constant("rewards", rewards, 2, mask)
    return whiten(_returns_to_go(rewards, mask, gamma), mask, unbiased=unbiased, eps=eps)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor, groups: Union[int, Tensor], mask: Tensor, *, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """REINFORCE++-baseline: the reward minus the mean of its group, at every token, whitened over the batch's tokens.

        A_it = whiten(r_i - mean of its group)

    Hu et al. 2025, arXiv:2501.03262; as in verl. The std is that of the batch, not of the group. OpenRLHF puts the
    centered reward at the last token and adds a KL penalty per token: for that, pass `group_advantages(...,
    scale="none")` at the last tokens to `reinforce_plus_plus_advantages`. A group of one answer counts as 0; in verl
    it keeps its reward.

    Args:
        rewards: [B], one per answer.
        groups: the size of consecutive groups, or [B] integer ids in any order.
        mask: [B, T], True where a token counts.
        unbiased, eps: of `whiten`.

    Returns:
        [B, T], at least fp32, 0 where the mask is False.
    """
    centered = group_advantages(rewards, groups, scale="none")
    if checks.tensor("mask", mask).ndim != 2 or mask.shape[0] != centered.numel():
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected [{centered.numel()}, T], one row per reward")
    checks.same_device("mask", mask, centered.device)
    return whiten(centered[:, None].expand(mask.shape), mask, unbiased=unbiased, eps=eps)
