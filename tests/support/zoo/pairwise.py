"""Rows of the pairwise losses: with a reference (pairwise, anchored, by name), and without (reference_free)."""

from __future__ import annotations

from functools import partial
from math import exp, log, log1p

import torch

from fused_po import losses

from .row import F64, Row

# By hand: w = -1 - -2 = 1, l = -3 - -3.5 = 0.5, w - l = 0.5, and beta = 0.5 unless a row says otherwise.
BY_HAND = (-1.0, -3.0, -2.0, -3.5)
FEW = torch.tensor([2, 3, 5, 1]), torch.tensor([4, 1, 7, 2])  # numbers of tokens


def s(x):
    return 1 / (1 + torch.exp(-x))


log_s = torch.nn.functional.logsigmoid


def softplus(x: float) -> float:
    """-log s(-x), by hand."""
    return log1p(exp(x))


def four():
    return [torch.randn(4, dtype=F64) for _ in range(4)]


def apart(distance: float) -> list:
    """fp32 log-probs: the policy is `distance` above the reference for the chosen answer, below for the rejected."""
    return [torch.tensor([v]) for v in (-2e4 + distance, -2e4 - distance, -2e4, -2e4)]


def lengths(four: tuple) -> dict:
    """The first n of FEW, for n pairs."""
    return {"chosen_length": FEW[0][: len(four[0])], "rejected_length": FEW[1][: len(four[0])]}


def of_ratios(formula):
    """An oracle of the four log-probs, from a formula of w and l."""
    return lambda c, r, rc, rr: formula(c - rc, r - rr)


def pair(name, case, run, formula, expected, peers, **changes) -> Row:
    row = Row(name, case, run, of_ratios(formula), BY_HAND, expected, four, (0, 1), apart, peers)
    return row._replace(**changes)


HALF = dict(beta=0.5)
PAIRWISE = [
    pair(
        "dpo", "", partial(losses.dpo, **HALF), lambda w, l: -s(0.5 * (w - l)).log(),
        softplus(-0.25),  # -log s(0.5 * 0.5)
        "TRL, OpenRLHF, verl, torchtune, Liger agree",
    ),
    pair(
        "dpo", "smoothed", partial(losses.dpo, beta=0.5, label_smoothing=0.1),
        lambda w, l: -0.9 * s(0.5 * (w - l)).log() - 0.1 * s(0.5 * (l - w)).log(),
        0.9 * softplus(-0.25) + 0.1 * softplus(0.25),
        "OpenRLHF, torchtune agree; TRL's sigmoid has no smoothing, Liger's silently ignores it",
    ),
    pair(
        "dpo", "margin, beta per pair", lambda *four: losses.dpo(*four, beta=torch.full_like(four[0], 0.5), margin=1.0),
        lambda w, l: -s(0.5 * (w - l) - 1).log(),
        softplus(0.75),  # 0.5 * 0.5 - 1 = -0.75
        "no other library has it",
    ),
    pair(
        "robust_dpo", "", partial(losses.robust_dpo, beta=0.5, label_smoothing=0.2),
        lambda w, l: (-0.8 * s(0.5 * (w - l)).log() + 0.2 * s(0.5 * (l - w)).log()) / 0.6,
        (0.8 * softplus(-0.25) - 0.2 * softplus(0.25)) / 0.6,
        "TRL agrees",
    ),
    pair(
        "hinge", "", partial(losses.hinge, **HALF), lambda w, l: (1 - 0.5 * (w - l)).clamp(min=0),
        0.75,  # 1 - 0.5 * 0.5
        "TRL, torchtune agree",
    ),
    pair(
        "ipo", "sums", partial(losses.ipo, **HALF), lambda w, l: (w - l - 1) ** 2,
        0.25,  # (0.5 - 1 / (2 * 0.5))^2
        "the paper and OpenRLHF agree; TRL takes means",
    ),
    pair(
        "ipo", "means",
        lambda *f: losses.ipo(*f, beta=0.5, **lengths(f)),
        lambda w, l: (w / FEW[0] - l / FEW[1] - 1) ** 2,
        (1 / 2 - 0.5 / 4 - 1) ** 2,  # lengths 2 and 4
        "TRL agrees; the paper and OpenRLHF take sums; Liger raises",
    ),
    pair(
        "sigmoid_norm", "",
        lambda *f: losses.sigmoid_norm(*f, beta=2.0, **lengths(f)),
        lambda w, l: -s(2 * (w / FEW[0] - l / FEW[1])).log(),
        softplus(-0.75),  # 2 * (1/2 - 0.5/4)
        "TRL agrees",
    ),
    pair(
        "exo_pair", "", partial(losses.exo_pair, beta=0.5, label_smoothing=0.1),
        lambda w, l: sum(s(h) * (s(h) / p).log() for h, p in ((0.5 * (w - l), 0.9), (0.5 * (l - w), 0.1))),
        # s(0.25) = 1 / (1 + e^-0.25)
        (-softplus(-0.25) - log(0.9)) / (1 + exp(-0.25)) + (-softplus(0.25) - log(0.1)) / (1 + exp(0.25)),
        "TRL agrees",
    ),
    pair(
        "discopop", "", partial(losses.discopop, beta=0.5, tau=0.5),
        lambda w, l: -s(l - w) * s(0.5 * (w - l)).log() + s(w - l) * torch.exp(0.5 * (l - w)),
        # h = 0.25, h / tau = 0.5
        softplus(-0.25) / (1 + exp(0.5)) + exp(-0.25) / (1 + exp(-0.5)),
        "TRL agrees, and overflows for h below -88",
    ),
    pair(
        "dpop", "", partial(losses.dpop, beta=0.5, penalty=3.0),
        lambda w, l: -s(0.5 * (w - l - 3 * (-w).clamp(min=0))).log(),
        softplus(1.75),  # w = -1, l = -0.5: 0.5 * (-1 + 0.5 - 3 * 1) = -1.75
        "no other library has it",
        values=(-3.0, -4.0, -2.0, -3.5),
    ),
    pair(
        "rpo", "", lambda *f: losses.rpo(*f, beta=0.5, alpha=3.0, chosen_length=FEW[0][: len(f[0])]),
        None,
        softplus(-0.25) + 1.5,  # the NLL of -1 over 2 tokens, times 3
        'TRL\'s ["sigmoid", "sft"] and OpenRLHF average the NLL over the batch: by preference_loss',
        oracle=lambda c, r, rc, rr: -s(0.5 * (c - rc - r + rr)).log() - 3 * c / FEW[0],
    ),
    pair(
        "nca_pair", "", partial(losses.nca_pair, **HALF),
        lambda w, l: -s(w / 2).log() - s(-w / 2).log() / 2 - s(-l / 2).log() / 2,
        softplus(-0.5) + softplus(0.5) / 2 + softplus(0.25) / 2,
        "TRL, Liger agree",
    ),
    pair(
        "bco_pair", "", partial(losses.bco_pair, **HALF), lambda w, l: -s(w / 2).log() - s(-l / 2).log(),
        softplus(-0.5) + softplus(0.25),
        "TRL, Liger agree",
    ),
    pair(
        "sppo_hard", "", partial(losses.sppo_hard, **HALF), lambda w, l: (w - 1) ** 2 + (l + 1) ** 2,
        2.25,  # (1 - 1)^2 + (0.5 + 1)^2
        "TRL, Liger agree",
    ),
    pair(
        "apo_zero", "", partial(losses.apo_zero, **HALF), lambda w, l: 1 - s(w / 2) + s(l / 2),
        1 / (1 + exp(0.5)) + 1 / (1 + exp(-0.25)),
        "TRL, Liger agree",
    ),
    pair(
        "apo_down", "", partial(losses.apo_down, **HALF), lambda w, l: s(w / 2) + 1 - s((w - l) / 2),
        1 / (1 + exp(-0.5)) + 1 / (1 + exp(0.25)),
        "TRL, Liger agree",
    ),
    pair(
        "aot", "", partial(losses.aot, beta=0.5, label_smoothing=0.1), None,
        # margins of the policy 1, 4 (sorted 1, 4), of the reference 2, 0 (sorted 0, 2): h = 0.5 * (1, 2)
        [0.9 * softplus(-0.5) + 0.1 * softplus(0.5), 0.9 * softplus(-1.0) + 0.1 * softplus(1.0)],
        "TRL agrees",
        values=([-1.0, -1.0], [-5.0, -2.0], [-1.0, -3.0], [-3.0, -3.0]),
        oracle=lambda c, r, rc, rr: (
            lambda h: -0.9 * s(h).log() - 0.1 * s(-h).log()
        )(0.5 * (torch.stack(sorted(c - r)) - torch.stack(sorted(rc - rr)))),
    ),
    pair(
        "aot_unpaired", "", partial(losses.aot_unpaired, beta=0.5), None,
        # w = 2, 0 (sorted 0, 2), l = -2, -1: h = 0.5 * (0 + 2, 2 + 1)
        [softplus(-1.0), softplus(-1.5)],
        "TRL agrees",
        values=([-1.0, -1.0], [-5.0, -2.0], [-3.0, -1.0], [-3.0, -1.0]),
        oracle=lambda c, r, rc, rr: -s(0.5 * (torch.stack(sorted(c - rc)) - torch.stack(sorted(r - rr)))).log(),
    ),
    pair(
        "tdpo", "1", partial(losses.tdpo, beta=0.5, alpha=None), None,
        softplus(0.25),  # 0.5 * (0.5 - (2 - 1)) = -0.25
        "no other library has it",
        values=(*BY_HAND, 1.0, 2.0), sample=lambda: [torch.randn(4, dtype=F64) for _ in range(6)], grads=(0, 1, 4, 5),
        oracle=lambda c, r, rc, rr, kc, kr: -s(0.5 * (c - rc - r + rr - kr + kc)).log(),
        extremes=lambda d: [*apart(d), torch.tensor([abs(d)]), torch.tensor([0.0])],
    ),
    pair(
        "tdpo", "2", partial(losses.tdpo, beta=0.5, alpha=0.5), None,
        softplus(0.0),  # 0.5 * (0.5 - 0.5 * (2 - 1)) = 0
        "no other library has it",
        values=(*BY_HAND, 1.0, 2.0), sample=lambda: [torch.randn(4, dtype=F64) for _ in range(6)], grads=(0, 1, 5),
        oracle=lambda c, r, rc, rr, kc, kr: -s(0.5 * (c - rc - r + rr - 0.5 * (kr - kc.detach()))).log(),
        extremes=lambda d: [*apart(d), torch.tensor([abs(d)]), torch.tensor([0.0])],
    ),
    pair(
        "preference_loss", "mixture",
        lambda *f: losses.preference_loss(
            *f, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.5, **lengths(f)
        ),
        None,
        0.8 * softplus(-0.25) + 0.2 * (softplus(-0.5) + softplus(0.25)) + 0.5,  # the NLL of -1 over 2 tokens
        "TRL agrees",
        oracle=lambda c, r, rc, rr: 0.8 * -s(0.5 * (c - rc - r + rr)).log()
        - 0.2 * (s(0.5 * (c - rc)).log() + s(-0.5 * (r - rr)).log())
        - c * 4 / FEW[0].sum(),
    ),
]  # fmt: skip

PAIRWISE.append(
    pair(
        "plackett_luce_dpo",
        "",
        partial(losses.plackett_luce_dpo, beta=0.5),
        None,
        # rewards 1, 0.5, 0: the first beats both others, the second beats the third
        log(exp(1) + exp(0.5) + 1) - 1 + softplus(-0.5),
        "no other library has it",
        values=([[-1.0, -2.0, -3.0]], [[-3.0, -3.0, -3.0]]),
        sample=lambda: [torch.randn(2, 3, dtype=F64) for _ in range(2)],
        grads=(0,),
        oracle=lambda p, q: sum((0.5 * (p - q))[:, k:].exp().sum(1).log() - 0.5 * (p - q)[:, k] for k in range(3)),
        extremes=lambda d: [torch.tensor([[-2e4 + d, -2e4, -2e4 - d]]), torch.full((1, 3), -2e4)],
    )
)
for divergence, formula, hand in (
    ("forward_kl", lambda r: 1 - torch.exp(-r), (1 - exp(-1)) - (1 - exp(-0.5))),
    ("js_divergence", lambda r: torch.log(2 * torch.exp(r) / (torch.exp(r) + 1)), softplus(-0.5) - softplus(-1.0)),
    ("alpha_divergence", lambda r: -2 * (torch.exp(-r / 2) - 1), -2 * (exp(-0.5) - exp(-0.25))),
):
    PAIRWISE.append(
        pair(
            "preference_loss",
            divergence,
            partial(losses.preference_loss, f_divergence=divergence, beta=0.5),
            partial(lambda f, w, l: -log_s(0.5 * (f(w) - f(l))), formula),
            softplus(-0.5 * hand),
            "TRL agrees; beyond exponents of 20 ours follows the tangent, TRL's alpha stops at 80, others overflow",
        )
    )


def two():
    """Mean log-probs of chosen and rejected answers."""
    return [-0.05 - torch.rand(4, dtype=F64) * 3 for _ in range(2)]


def two_apart(distance: float) -> list:
    """fp32 log-probs `distance` apart; the larger one is 0, so p = 1."""
    return [torch.tensor([min(distance, 0.0)]), torch.tensor([min(-distance, 0.0)])]


def free(name, case, run, oracle, values, expected, peers, **changes) -> Row:
    return Row(name, case, run, oracle, values, expected, two, (0, 1), two_apart, peers)._replace(**changes)


def odds(p):
    return p / (1 - p)


REFERENCE_FREE = [
    free(
        "simpo", "", partial(losses.simpo, beta=2.0, gamma=0.5), lambda c, r: -s(2 * (c - r) - 0.5).log(),
        (-0.5, -1.0), softplus(-0.5),  # 2 * 0.5 - 0.5
        "TRL's CPO, Liger agree",
    ),
    free(
        "alphapo", "", partial(losses.alphapo, beta=2.0, gamma=0.5, alpha=0.25),
        lambda c, r: -s(2 * ((1 - c.exp() ** -0.25) - (1 - r.exp() ** -0.25)) / 0.25 - 0.5).log(),
        (-4.0, -8.0), softplus(-(2 * (exp(2) - exp(1)) / 0.25 - 0.5)),  # p^-0.25 = e^1 and e^2
        "TRL's CPO agrees, and overflows where p^-alpha does",
    ),
    free(
        "cpo", "", partial(losses.cpo, beta=0.5, label_smoothing=0.1),
        lambda c, r: -0.9 * s((c - r) / 2).log() - 0.1 * s((r - c) / 2).log(),
        (-1.0, -3.0), 0.9 * softplus(-1.0) + 0.1 * softplus(1.0), "TRL, Liger agree; their NLL is apart",
    ),
    free(
        "cpo", "hinge", partial(losses.cpo, beta=0.25, loss_type="hinge"), lambda c, r: (1 - (c - r) / 4).clamp(min=0),
        (-1.0, -3.0), 0.5, "TRL agrees",
    ),
    free(
        "cpo", "ipo", partial(losses.cpo, beta=0.25, loss_type="ipo"), lambda c, r: (c - r - 2) ** 2,
        (-1.0, -2.0), 1.0, "TRL agrees",
    ),
    free(
        "cpo", "simpo", partial(losses.cpo, beta=2.0, loss_type="simpo"), lambda c, r: -s(2 * (c - r) - 0.5).log(),
        (-0.5, -1.0), softplus(-0.5), "TRL agrees",
    ),
    free(
        "tpo", "", partial(losses.tpo, beta=0.5, alpha=2.0), lambda c, r, g: -s((c - r) / 2).log() - 2 * g,
        (-1.0, -3.0, -0.25), softplus(-1.0) + 0.5,
        "TRL agrees except for the NLL, where it averages over the batch's tokens",
        sample=lambda: [*two(), -torch.rand(4, dtype=F64)], grads=(0, 1, 2),
        extremes=lambda d: [*two_apart(d), torch.tensor([-abs(d)])],
    ),
    free(
        "tpo", "tpo-l", partial(losses.tpo, beta=2.0, loss_type="tpo-l"), lambda c, r: -s(2 * (c - r) - 0.5).log(),
        (-0.5, -1.0), softplus(-0.5), "TRL agrees",
    ),
    free(
        "orpo", "", partial(losses.orpo, beta=0.5),
        lambda c, r: -c - 0.5 * s(torch.log(odds(c.exp()) / odds(r.exp()))).log(),
        (log(0.5), log(0.25)), log(2) + 0.5 * log(4 / 3),  # odds 1 and 1/3: s(log 3) = 3/4
        "TRL, Liger agree except for the NLL, averaged over the batch's tokens; not finite where p rounds to 1",
    ),
    free(
        "orpo", "no NLL", partial(losses.orpo, beta=0.5, nll_coef=0.0),
        lambda c, r: -0.5 * s(torch.log(odds(c.exp()) / odds(r.exp()))).log(),
        (log(0.5), log(0.25)), 0.5 * log(4 / 3), "TRL's odds_ratio_loss agrees with the sign turned",
    ),
    free(
        "sft", "", losses.sft, lambda p: -p, (-0.5,), 0.5, "TRL agrees", sample=lambda: two()[:1], grads=(0,),
        extremes=lambda d: [torch.tensor([-abs(d)])],
    ),
    free(
        "sft", "dft", partial(losses.sft, loss_type="dft"), lambda p: -p.detach().exp() * p, (log(0.25),), log(4) / 4,
        "TRL agrees", sample=lambda: two()[:1], grads=(0,), true_gradient=False,
        extremes=lambda d: [torch.tensor([-abs(d)])],
    ),
]  # fmt: skip

ROWS = [*PAIRWISE, *REFERENCE_FREE]
