"""One row's statistics out of those of its parts, each a rank's share of the vocabulary.

A part's softmax is over its own columns. With w_r the probability that a row's softmax gives to part r,

    logp = logp_o + log w_o                          o: the part that has the label
    H    = sum_r w_r (H_r - log w_r)
    KL(p || q) = sum_r w_r (KL_r + log w_r - log v_r)         w of p, v of q
    log sum p^2 = log sum_r exp(L_r + 2 log w_r)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_po.backend.interface import AuxRow, KLRow, Outputs, RowStats, SavedRow


def shares(shift: Tensor, norm: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(shift [n], norm [n], log w [R, n], log w_owner [n]) of parts' shifts and norms [R, n]; log 0 is -inf."""
    top = shift.amax(0)
    above = torch.where(shift == -math.inf, shift, shift - top + norm)  # a part of -inf alone has no norm
    total = above.exp().sum(0).log()
    label_part = owner.clamp(min=0)[None].long()
    own = above.gather(0, label_part)
    others = above.scatter(0, label_part, -math.inf)
    most = others.amax(0, keepdim=True)
    # The label's part may be the largest: then by what the others add to it, and no digits are lost. Or it may be any
    # number of nats below another: then nothing is taken to its size, which would overflow.
    largest = own >= most
    beside = torch.where(others == -math.inf, 0, (others - torch.where(largest, own, most)).exp()).sum(0)
    return top, total, above - total, torch.where(largest[0], -beside.log1p(), own[0] - total)


def of_owner(values: Tensor, log_share: Tensor, owner: Tensor) -> Tensor:
    """The label's log-prob [n] from those in its part [R, n]; 0 for rows without a label."""
    picked = values.gather(0, owner.clamp(min=0)[None].long()).squeeze(0)
    picked = torch.where(log_share == -math.inf, log_share, picked + log_share)
    return torch.where(owner < 0, 0, picked)


def weighted(log_share: Tensor, values: Tensor) -> Tensor:
    """Sum over parts [R, n] of share times value; a part whose share is 0 counts nothing, whatever its value."""
    share = log_share.exp()
    return torch.where(share == 0, 0, share * values).sum(0)


def merge_scores(parts: Tensor, owner: Tensor, n_cols: int, outputs: int) -> RowStats:
    """Statistics, as `score` gives them, from parts [R, F, n] of the vocabulary.

    Fields: shift, norm, logp in the part of the owner [n] (-1 where a row is not scored), then what `outputs` names of
    entropy, sum of logits, is-top-1, log of the sum of squared probabilities. n_cols: of the whole vocabulary.
    """
    shift, norm, log_share, of_label = shares(parts[:, 0], parts[:, 1], owner)
    scored, more, asked = owner >= 0, iter(parts.unbind(1)[SavedRow.COUNT :]), Outputs.of(outputs)

    def kept(value: Tensor) -> Tensor:
        return torch.where(scored, value, 0)

    logp = of_owner(parts[:, 2], of_label, owner)
    logps = logp.clone() if asked.logps else parts.new_empty(0)
    entropy = kept(weighted(log_share, next(more) - log_share)) if asked.entropy else parts.new_empty(0)
    lse = kept(shift + norm) if asked.lse else parts.new_empty(0)
    aux = parts.new_zeros(AuxRow.COUNT, len(owner)) if any(asked.auxiliary) else parts.new_empty(0)
    if asked.mean_logits:
        aux[AuxRow.MEAN_LOGITS] = kept(next(more).sum(0) / n_cols)
    if asked.is_top1:
        ranks = torch.arange(len(parts), device=owner.device)[:, None]
        tops = parts[:, 0].gather(0, owner.clamp(min=0)[None].long())
        beaten = (parts[:, 0] > tops) | ((parts[:, 0] == tops) & (ranks < owner))
        aux[AuxRow.IS_TOP1] = kept(next(more).gather(0, owner.clamp(min=0)[None].long()).squeeze(0) * ~beaten.any(0))
    if asked.log_sum_sq_probs:
        terms = torch.where(log_share == -math.inf, log_share, next(more) + 2 * log_share)
        aux[AuxRow.LOG_SUM_SQ_PROBS] = kept(terms.logsumexp(0))
    return RowStats(logps, entropy, lse, aux, torch.stack([shift, torch.where(scored, norm, math.inf), logp]))


def merge_kl(parts: Tensor, owner: Tensor, direction: str | float) -> Tensor:
    """tokens[9, n], as `kl` gives them, from parts [R, 5 or 8, n]; without KL and its center for the mixture.

    Fields: kl, shift, norm, ref_shift, ref_norm, and with labels logp, ref_logp, entropy.
    """
    of_kl, shift, norm, ref_shift, ref_norm, *more = parts.unbind(1)
    tokens = parts.new_zeros(KLRow.COUNT, len(owner))
    tokens[KLRow.SHIFT], tokens[KLRow.NORM], log_w, own = shares(shift, norm, owner)
    tokens[KLRow.REF_SHIFT], tokens[KLRow.REF_NORM], log_v, ref_own = shares(ref_shift, ref_norm, owner)
    if isinstance(direction, str):
        by, of = (log_w, log_v) if direction == "reverse" else (log_v, log_w)
        tokens[KLRow.KL] = weighted(by, torch.where(of == -math.inf, math.inf, of_kl + (by - of))).clamp_(min=0)
        tokens[KLRow.CENTER] = tokens[KLRow.KL] if direction == "reverse" else 0
    if more:
        logp, ref_logp, entropy = more
        tokens[KLRow.LOGP], tokens[KLRow.REF_LOGP] = of_owner(logp, own, owner), of_owner(ref_logp, ref_own, owner)
        tokens[KLRow.ENTROPY] = weighted(log_w, entropy - log_w)
    tokens[:, owner < 0] = 0
    tokens[KLRow.NORM, owner < 0] = math.inf
    return tokens
