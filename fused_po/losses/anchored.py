"""Losses of pairs that look at each answer's own reward, not at their difference alone; or sort the batch's.

Arguments, symbols and shapes are those of pairwise.py: `chosen, rejected, ref_chosen, ref_rejected` [B] in, [B] out,
w and l the log-ratios, s the sigmoid. An f-divergence's score must not take the place of the log-ratios here: its
unknown constant would not cancel.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_po import checks
from fused_po.losses.pairwise import Beta, log_ratios, smoothed_logistic, smoothing


def _rewards(chosen, rejected, ref_chosen, ref_rejected, beta: Beta) -> tuple[Tensor, Tensor]:
    """(beta w, beta l)."""
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    beta = checks.positive_like("beta", beta, w, "chosen")
    return beta * w, beta * l


def nca_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """NCA for pairs: L = -log s(beta w) - log s(-beta w) / 2 - log s(-beta l) / 2.

    Chen et al. 2024, arXiv:2402.05369, with two answers, whose weights, the softmax of their rewards, are 1 and 0.
    TRL's and Liger's "nca_pair".
    """
    w, l = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return -logsigmoid(w) - 0.5 * logsigmoid(-w) - 0.5 * logsigmoid(-l)


def bco_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """BCO for pairs: L = -log s(beta w) - log s(-beta l).

    Jung et al. 2024, arXiv:2404.04656, its binary cross-entropy without the shift delta: that is `bco`'s. TRL's
    "bco_pair".
    """
    w, l = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return -logsigmoid(w) - logsigmoid(-l)


def sppo_hard(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """SPPO with hard labels: L = (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2.

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7, whose winning probabilities are 1 and 0 here, and eta is 1 / beta. TRL's
    "sppo_hard".
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    half = 0.5 / checks.positive_like("beta", beta, w, "chosen")
    return (w - half).square() + (l + half).square()


def apo_zero(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """APO-zero, for chosen answers better than the model's own: L = s(-beta w) + s(beta l).

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7 up to constants. TRL's and Liger's "apo_zero".
    """
    w, l = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return torch.sigmoid(-w) + torch.sigmoid(l)


def apo_down(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """APO-down, for chosen answers worse than the model's own: L = s(beta w) + s(-beta (w - l)).

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8 up to constants. TRL's and Liger's "apo_down".
    """
    w, l = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return torch.sigmoid(w) + torch.sigmoid(l - w)


def aot(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT on pairs: the policy's margins, as a distribution over the batch, above the reference's.

    L_i = -(1 - e) log s(h_i) - e log s(-h_i),  h_i = beta (sort(c - r)_i - sort(ref_c - ref_r)_i)

    Melnyk et al. 2024, arXiv:2406.05882, paired. TRL's "aot". L_i belongs to a rank, not to a pair, so weights per
    pair make no sense, and nor does a batch of 1.
    """
    log_ratios(chosen, rejected, ref_chosen, ref_rejected)  # looks at the shapes
    ours, theirs = chosen - rejected, torch.zeros_like(chosen)
    theirs = theirs if ref_chosen is None else theirs + ref_chosen.detach()
    theirs = theirs if ref_rejected is None else theirs - ref_rejected.detach()
    h = checks.positive("beta", beta) * (ours.sort(dim=0).values - theirs.sort(dim=0).values)
    return smoothed_logistic(h, smoothing(label_smoothing))


def aot_unpaired(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor] = None,
    ref_rejected: Optional[Tensor] = None,
    *,
    beta: Beta = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT without pairs: the chosen answers' log-ratios, as a distribution over the batch, above the rejected ones'.

    L_i = -(1 - e) log s(h_i) - e log s(-h_i),  h_i = beta (sort(w)_i - sort(l)_i)

    Melnyk et al. 2024, arXiv:2406.05882, unpaired. TRL's "aot_unpaired". L_i belongs to a rank, see `aot`.
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    h = checks.positive("beta", beta) * (w.sort(dim=0).values - l.sort(dim=0).values)
    return smoothed_logistic(h, smoothing(label_smoothing))
