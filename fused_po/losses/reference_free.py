"""Losses without a reference policy: SimPO, CPO, AlphaPO, ORPO, TPO and SFT.

`chosen, rejected` are log-probs of answers [B] in nats: sums over tokens, or means where the function says so
(`sequence_logps(..., average=True)`). Below, s is the sigmoid and d = chosen - rejected. Results are [B], unreduced.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_po import checks
from fused_po.losses.numerics import log1mexp, saturating_expm1, weighted
from fused_po.losses.pairwise import dpo, hinge, ipo, log_ratios, smoothed_logistic, smoothing

CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
TPO_LOSSES = ("sigmoid", "hinge", "ipo", "tpo-l")
SFT_LOSSES = ("nll", "chunked_nll", "dft")


def sft(logps: Tensor, mask: Optional[Tensor] = None, *, loss_type: str = "nll") -> Tensor:
    """The negative log-likelihood of tokens, L = -log p, or DFT's loss, L = -sg(p) log p.

    DFT: Wu et al. 2025, arXiv:2508.05629, eq. 9; its gradient is p times that of the NLL, sg stops the gradient. The
    names are TRL's; "chunked_nll" is the same loss as "nll". `aggregate` reduces the result to one number.

    Args:
        logps: [...], log-probs of tokens. mask: like logps, True where a token counts; masked tokens give 0.
        loss_type: "nll" (or "chunked_nll"), "dft".

    Returns:
        [...], unreduced.
    """
    checks.choice("loss_type", loss_type, SFT_LOSSES)
    checks.floating("logps", logps)
    if mask is not None:
        logps = torch.where(checks.mask_like("mask", mask, logps, "logps"), logps, 0)
    return -weighted(logps.detach().exp(), logps) if loss_type == "dft" else -logps


def simpo(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO on mean log-probs: L = -(1 - e) log s(h) - e log s(-h),  h = beta d - gamma.

    Meng et al. 2024, arXiv:2405.14734, eq. 6; its beta is 2 to 2.5 (TRL's default is 0.1). The smoothing is that of
    TRL's CPO trainer, Liger and torchtune.

    Args:
        chosen, rejected: [B], mean log-probs per token. beta: > 0.
        gamma: the target reward margin, >= 0. TRL's simpo_gamma.
        label_smoothing: e, in [0, 0.5).
    """
    log_ratios(chosen, rejected)
    gamma = checks.number("gamma", gamma, "finite numbers >= 0", lambda v: v >= 0)
    return smoothed_logistic(checks.positive("beta", beta) * (chosen - rejected) - gamma, smoothing(label_smoothing))


def alphapo_reward(logps: Tensor, alpha: float) -> Tensor:
    """AlphaPO's reward for a mean log-prob log p: (1 - p^-alpha) / alpha, or log p for alpha = 0.

    Gupta et al. 2025, arXiv:2501.03884. Beyond alpha |log p| = 20 it continues along its tangent; TRL's overflows.
    """
    checks.floating("logps", logps)
    checks.number("alpha", alpha, "finite numbers", lambda v: True)
    return -saturating_expm1(-alpha * logps) / alpha if alpha else logps


def alphapo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 2.5,
    gamma: float = 0.25,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AlphaPO: SimPO on the rewards (1 - p^-alpha) / alpha of mean log-probs; alpha = 0 is SimPO.

    Gupta et al. 2025, arXiv:2501.03884.

    Args:
        chosen, rejected: [B], mean log-probs per token. beta: > 0. gamma: the target reward margin, >= 0.
        alpha: any finite number. label_smoothing: in [0, 0.5).
    """
    checks.per_sequence(chosen=chosen, rejected=rejected)
    rewards = alphapo_reward(chosen, alpha), alphapo_reward(rejected, alpha)
    return simpo(*rewards, beta=beta, gamma=gamma, label_smoothing=label_smoothing)


def _contrast(chosen, rejected, loss_type, beta, label_smoothing, margin):
    """The contrastive term of CPO and TPO by name: logistic (with a reward margin), hinge or IPO."""
    if loss_type in ("hinge", "ipo"):
        if label_smoothing:
            raise ValueError(f"label_smoothing: got {label_smoothing}, not used by loss_type={loss_type!r}; pass 0")
        return (hinge if loss_type == "hinge" else ipo)(chosen, rejected, beta=beta)
    return dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing, margin=margin)


def cpo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> Tensor:
    """CPO's preference term: DPO's loss with a uniform reference, L = -log s(beta d), or another loss by name.

    Xu et al. 2024, arXiv:2401.08417, eq. 3. The paper's full loss adds the NLL of the chosen answer: add
    `aggregate(sft(...))`, its mean over tokens, times TRL's cpo_alpha (Liger's alpha). Names and arguments are those
    of TRL's CPO trainer.

    Args:
        chosen, rejected: [B], sums over tokens; means for "ipo", "simpo" and "alphapo".
        beta: > 0. label_smoothing: in [0, 0.5), not for "hinge" and "ipo".
        loss_type: "sigmoid", "hinge", "ipo", "simpo" or "alphapo".
        simpo_gamma: the reward margin of "simpo" and "alphapo".
        alpha: the alpha of AlphaPO's reward, for any loss_type; 0 is log p.
    """
    checks.choice("loss_type", loss_type, CPO_LOSSES)
    checks.per_sequence(chosen=chosen, rejected=rejected)
    if loss_type == "alphapo" and alpha == 0:
        raise ValueError('alpha: got 0 with loss_type="alphapo", expected another number such as 0.25; 0 is "simpo"')
    chosen, rejected = alphapo_reward(chosen, alpha), alphapo_reward(rejected, alpha)
    with_margin = loss_type in ("simpo", "alphapo")
    checks.only_with("simpo_gamma", simpo_gamma, 0.5, with_margin, 'loss_type="simpo" or "alphapo"')
    margin = simpo_gamma if with_margin else 0.0
    return _contrast(chosen, rejected, loss_type, beta, label_smoothing, margin)


def tpo(
    chosen: Tensor,
    rejected: Tensor,
    gold: Optional[Tensor] = None,
    *,
    beta: float = 0.01,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    alpha: float = 1.0,
) -> Tensor:
    """TPO: a preference term for two answers plus the NLL of a third one: L = -log s(beta d) - alpha gold.

    Saeidi et al. 2024, arXiv:2405.16681, section 3; "tpo-l" is the length-normalized form, with the margin gamma. Names
    are those of TRL's TPO trainer. TRL averages the NLL of the gold answers over all tokens of the batch: for that pass
    `gold=None` and add `aggregate(sft(...))`.

    Args:
        chosen, rejected: [B], sums over tokens; means for "ipo" and "tpo-l". gold: [B], mean log-probs per token.
        beta: > 0. loss_type: "sigmoid", "hinge", "ipo" or "tpo-l". label_smoothing: in [0, 0.5).
        gamma: the margin of "tpo-l", TRL's tpo_l_gamma. alpha: >= 0, the weight of the NLL, TRL's tpo_alpha.
    """
    checks.choice("loss_type", loss_type, TPO_LOSSES)
    checks.per_sequence(chosen=chosen, rejected=rejected, **checks.not_none(gold=gold))
    alpha = checks.number("alpha", alpha, "finite numbers >= 0", lambda v: v >= 0)
    checks.only_with("gamma", gamma, 0.5, loss_type == "tpo-l", 'loss_type="tpo-l"')
    checks.only_with("alpha", alpha, 1.0, gold is not None, "gold")
    margin = gamma if loss_type == "tpo-l" else 0.0
    loss = _contrast(chosen, rejected, loss_type, beta, label_smoothing, margin)
    return loss if gold is None else loss - weighted(alpha, gold)


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, nll_coef: float = 1.0) -> Tensor:
    """ORPO on mean log-probs: L = -nll_coef chosen - beta log s(log odds(chosen) - log odds(rejected)).

    odds(log p) = p / (1 - p). Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7; beta is the paper's lambda. TRL and
    Liger average the NLL over all tokens of the batch, TRL with the prompt tokens: for that pass `nll_coef=0` and add
    `aggregate(sft(...))`. They return inf or NaN where p rounds to 1; here p is clamped just below 1.

    Args:
        chosen, rejected: [B], mean log-probs per token, <= 0. beta: > 0. nll_coef: >= 0.
    """
    log_ratios(chosen, rejected)
    nll_coef = checks.number("nll_coef", nll_coef, "finite numbers >= 0", lambda v: v >= 0)
    return -weighted(nll_coef, chosen) - checks.positive("beta", beta) * logsigmoid(log_odds_ratio(chosen, rejected))


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log [odds(chosen) / odds(rejected)] of mean log-probs [B]; TRL's metric log_odds_chosen."""
    checks.per_sequence(chosen=chosen, rejected=rejected)
    return (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
