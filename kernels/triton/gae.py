"""Generalised advantage estimation: one program a row, two associative scans a block of tokens, from the right.

    delta_t = r_t + gamma V_(t+1) - V_t,   A_t = delta_t + gamma lam A_(t+1),   returns = A + V

over the positions that count. The next value that counts comes from the scan of (value, whether any counts), the
advantage from that of the affine maps A -> delta + decay * A, with decay 1 and delta 0 where a position is skipped.
Tokens are loaded back to front and scanned forwards: a scan in reverse has been wrong in some of Triton's versions
(triton-lang/triton issues 4362 and 8412).
"""

import torch

import triton
import triton.language as tl


@triton.jit
def later_value(later, any_later, value, any_here):
    """The value of the first position that counts."""
    return tl.where(any_here > 0.5, value, later), tl.maximum(any_later, any_here)


@triton.jit
def compose(later, later_decay, x, decay):
    """A -> x + decay * (later + later_decay * A)."""
    return x + decay * later, decay * later_decay


@triton.jit
def value_ahead(value_ptr, mask_ptr, offsets, inside, next_value):
    """The values of the first positions that count from `offsets` on; beyond the block, next_value."""
    if mask_ptr is None:
        value = tl.load(value_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        return tl.where(inside, value, next_value)
    else:
        here = inside & (tl.load(mask_ptr + offsets, mask=inside, other=0) != 0)
        value = tl.load(value_ptr + offsets, mask=here, other=0.0).to(tl.float32)
        value, found = tl.associative_scan((value, here.to(tl.float32)), 0, later_value)
        return tl.where(found > 0.5, value, next_value)


@triton.jit
def gae_kernel(
    reward_ptr, value_ptr, mask_ptr, last_ptr, advantage_ptr, return_ptr, length, gamma, decay, BLOCK: tl.constexpr
):
    """One row of [B, length], contiguous; decay = gamma * lam. A block's lane i is the i-th position from its end."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    first = lane == BLOCK - 1  # the lane of the block's first position, whose results the next block goes on from
    next_value, next_advantage = 0.0, 0.0
    if last_ptr is not None:
        next_value = tl.load(last_ptr + row).to(tl.float32)
    for done in tl.range(0, length, BLOCK):
        t = length - 1 - done - lane
        offsets = row * length + t
        inside = t >= 0
        here = inside
        if mask_ptr is not None:
            here = inside & (tl.load(mask_ptr + offsets, mask=inside, other=0) != 0)
        value = tl.load(value_ptr + offsets, mask=here, other=0.0).to(tl.float32)
        reward = tl.load(reward_ptr + offsets, mask=here, other=0.0).to(tl.float32)
        ahead = value_ahead(value_ptr, mask_ptr, offsets + 1, inside & (t + 1 < length), next_value)
        delta = tl.where(here, reward + gamma * ahead - value, 0.0)
        advantage, decays = tl.associative_scan((delta, tl.where(here, decay, 1.0)), 0, compose)
        advantage += decays * next_advantage
        tl.store(advantage_ptr + offsets, tl.where(here, advantage, 0.0), mask=inside)
        tl.store(return_ptr + offsets, tl.where(here, advantage + value, 0.0), mask=inside)
        next_value = tl.sum(tl.where(first, tl.where(here, value, ahead), 0.0), 0)
        next_advantage = tl.sum(tl.where(first, advantage, 0.0), 0)


def gae(rewards, values, mask, last_values, gamma, lam):
    """(advantages, returns) [B, T], fp32, of contiguous tensors; mask: bool [B, T] or None, last_values [B] or None."""
    n_rows, length = rewards.shape
    advantages, returns = (torch.empty(n_rows, length, dtype=torch.float32, device=rewards.device) for _ in range(2))
    if advantages.numel():
        mask = None if mask is None else mask.view(torch.uint8)
        block = min(1024, triton.next_power_of_2(max(length, 32)))
        gae_kernel[(n_rows,)](
            rewards, values, mask, last_values, advantages, returns, length, gamma, gamma * lam,
            BLOCK=block, num_warps=max(1, block // 128),
        )  # fmt: skip
    return advantages, returns
