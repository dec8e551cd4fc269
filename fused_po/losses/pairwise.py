"""Losses of a pair of answers."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO's sigmoid loss of each pair.

    L = -(1 - e) log s(h) - e log s(-h),  h = beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]

    with s the sigmoid and e the share of preferences taken to be flipped. Rafailov et al. 2023, arXiv:2305.18290,
    eq. 7; the smoothing is cDPO's (Mitchell 2023), as in OpenRLHF and torchtune. TRL's "sigmoid" takes none.

    Args:
        chosen, rejected: [B], the policy's log-probs of the answers, summed over tokens, in nats.
        ref_chosen, ref_rejected: [B], the reference's.
        beta: > 0, the strength of the KL constraint.
        label_smoothing: e, in [0, 0.5).

    Returns:
        [B], unreduced.
    """
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
