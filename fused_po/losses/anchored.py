"""Losses of pairs that use the reward of each answer, not only their difference, or that sort the batch (AOT).

Arguments, symbols and shapes are those of pairwise.py: `chosen, rejected, ref_chosen, ref_rejected` [B] in, [B] out,
w and l are the log-ratios, s is the sigmoid. Scores of an f-divergence cannot replace the log-ratios here, because
their unknown constant would not cancel.
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

    Chen et al. 2024, arXiv:2402.05369, for two answers with weights 1 and 0 (in the paper the softmax of the rewards).
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

    Jung et al. 2024, arXiv:2404.04656: the binary cross-entropy without the reward shift delta, which `bco` has. TRL's
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

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7, with win probabilities 1 and 0 and eta = 1 / beta. TRL's "sppo_hard".
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
    """Paired AOT: the distribution of the policy's margins over the batch should dominate the reference's.

    L_i = -(1 - e) log s(h_i) - e log s(-h_i),  h_i = beta (sort(c - r)_i - sort(ref_c - ref_r)_i)

    Melnyk et al. 2024, arXiv:2406.05882, paired. TRL's "aot". L_i belongs to a rank in the sorted batch, not to a
    pair, so weights per pair and batches of 1 make no sense.
    """
    log_ratios(chosen, rejected, ref_chosen, ref_rejected)  # checks the shapes
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
    """Unpaired AOT: the distribution of the chosen log-ratios over the batch should dominate the rejected ones'.

    L_i = -(1 - e) log s(h_i) - e log s(-h_i),  h_i = beta (sort(w)_i - sort(l)_i)

    Melnyk et al. 2024, arXiv:2406.05882, unpaired. TRL's "aot_unpaired". L_i belongs to a rank, as in `aot`.
    """
    w, l = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    h = checks.positive("beta", beta) * (w.sort(dim=0).values - l.sort(dim=0).values)
    return smoothed_logistic(h, smoothing(label_smoothing))
