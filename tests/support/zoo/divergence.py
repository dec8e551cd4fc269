"""Rows of the KL losses: per-token estimates, full distributions, Gaussians, Diffusion-DPO."""

from __future__ import annotations

from functools import partial
from math import exp, log, log1p

import torch
from numerics import k3

from fused_po import losses

from .row import F64, Row


def tokens(n: int):
    return lambda: [-torch.rand(3, 5, dtype=F64) * 2 for _ in range(n)]


def apart(distance: float) -> list:
    return [torch.tensor([[-2e4 + distance]]), torch.tensor([[-2e4]])]


def estimate(name, case, run, oracle, expected, peers, **changes) -> Row:
    """Worked out by hand: log pi = -1, log pi_ref = -1.5, so r = 0.5."""
    return Row(name, case, run, oracle, (-1.0, -1.5), expected, tokens(2), (0,), apart, peers)._replace(**changes)


ESTIMATES = [
    estimate(
        "kl_loss", "k1", partial(losses.kl_loss, estimator="k1"), lambda p, q: p - q, 0.5,
        "verl's kl, OpenRLHF's k1 agree; OpenRLHF clamps to +-10",
    ),
    estimate(
        "kl_loss", "k2", partial(losses.kl_loss, estimator="mse"), lambda p, q: (p - q) ** 2 / 2, 0.125,
        "verl's mse, OpenRLHF's k2 agree; OpenRLHF clamps to +-10",
    ),
    estimate(
        "kl_loss", "k3", partial(losses.kl_loss, estimator="low_var_kl"), lambda p, q: k3(p - q), exp(-0.5) - 0.5,
        "TRL, verl's low_var_kl, OpenRLHF's k3 agree; verl clamps r to +-20 and k3 to +-10, TRL overflows",
    ),
    estimate(
        "kl_loss", "abs", partial(losses.kl_loss, estimator="abs"), lambda p, q: (p - q).abs(), 0.5, "verl agrees",
    ),
    estimate(
        "kl_loss", "clamped", partial(losses.kl_loss, estimator="k3", clamp=0.25),
        lambda p, q: k3((p - q).clamp(-0.25, 0.25)), exp(-0.25) - 0.75, "verl, with 20",
    ),
    estimate(
        "kl_loss", "straight through", partial(losses.kl_loss, estimator="k3", straight_through=True),
        lambda p, q: k3(p - q).detach() + (p - q) ** 2 / 2 - ((p - q) ** 2 / 2).detach(), exp(-0.5) - 0.5,
        "verl's k3+ agrees", true_gradient=False,
    ),
    estimate(
        "kl_loss", "of an older policy", lambda p, q, o: losses.kl_loss(p, q, "k3", old_logps=o),
        lambda p, q, o: k3(p - q) * torch.exp(p - o), (exp(-0.5) - 0.5) * exp(-1), "TRL's bias correction agrees",
        values=(-1.0, -1.5, 0.0), sample=tokens(3), extremes=lambda d: [*apart(d), torch.tensor([[-2e4]])],
    ),
]  # fmt: skip


def distributions():
    return [torch.randn(3, 5, dtype=F64).log_softmax(-1) for _ in range(2)]


def gaussians():
    mean_p, mean_q = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    return [mean_p, mean_q, torch.rand(3, dtype=F64) + 0.5, torch.rand(3, dtype=F64) + 0.5]


def gaussian_kl_by_dimension(mean_p, mean_q, std_p, std_q):
    """torch's KL of one-dimensional Gaussians, summed over dimensions."""
    p = torch.distributions.Normal(mean_p, std_p[:, None].expand_as(mean_p))
    q = torch.distributions.Normal(mean_q, std_q[:, None].expand_as(mean_q))
    return torch.distributions.kl_divergence(p, q).sum(-1)


def jsd(p, q, beta, temperature):
    """p and q as probabilities."""
    p, q = (v.div(temperature).softmax(-1) for v in (p, q.detach()))
    if beta in (0, 1):
        return (q * (q / p).log()).sum(-1) if beta == 0 else (p * (p / q).log()).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


def distillation(beta: float, expected: float) -> Row:
    """Worked out by hand: student (3/4, 1/4), teacher (1/4, 3/4)."""
    how = dict(beta=beta, temperature=2.0)
    odds = 2 * log(3)  # of logits, at a temperature of 2
    return Row(
        "generalized_jsd",
        f"beta {beta}",
        partial(losses.generalized_jsd, **how),
        lambda p, q: jsd(p, q, beta, 2.0),
        ([odds, 0.0], [0.0, odds]),
        expected,
        lambda: [torch.randn(3, 5, dtype=F64) for _ in range(2)],
        (0,),
        lambda d: [torch.tensor([[d, 0.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0]])],
        "TRL's GKD agrees (test_divergence.py runs it); Liger's JSD agrees",
    )


# m of beta 0.25: student's share 3/4 * 3/4 + 1/4 * 1/4 = 5/8, and 3/8
M = 0.25 * (0.25 * log(0.4) + 0.75 * log(2)) + 0.75 * (0.75 * log(1.2) + 0.25 * log(2 / 3))
DISTILLATION = [distillation(0.0, 0.5 * log(3)), distillation(1.0, 0.5 * log(3)), distillation(0.25, M)]
WHOLE = [
    Row(
        "categorical_kl", "", losses.categorical_kl, lambda p, q: (p.exp() * p - p.exp() * q).sum(-1),
        ([log(0.2), log(0.8)], [log(0.8), log(0.2)]), 0.6 * log(4),  # 0.2 ln 1/4 + 0.8 ln 4
        distributions, (0, 1), None, "verl's full is not implemented; TRL's GKD has it inside its JSD",
    ),
    Row(
        "gaussian_kl", "", losses.gaussian_kl, gaussian_kl_by_dimension,
        # k = 2: 2 * (ln(2 / 1) + 1 / 8 - 1 / 2) + (3^2 + 4^2) / 8
        (torch.tensor([[3.0, 4.0]], dtype=F64), torch.zeros(1, 2, dtype=F64), 1.0, 2.0), 2 * (log(2) - 0.375) + 25 / 8,
        gaussians, (0, 1, 2, 3), None, "torch.distributions agrees, a dimension",
    ),
    Row(
        "diffusion_dpo", "", partial(losses.diffusion_dpo, beta=0.5),
        lambda c, r, rc, rr: -torch.log(torch.sigmoid(-0.5 * ((c - rc) - (r - rr)))),
        (1.0, 3.0, 2.0, 3.5), log1p(exp(-0.25)),  # -0.5 * ((1 - 2) - (3 - 3.5)) = 0.25
        lambda: [torch.rand(4, dtype=F64) for _ in range(4)], (0, 1),
        lambda d: [torch.tensor([v]) for v in (1e4 + d, 1e4 - d, 1e4, 1e4)], "diffusers agrees, with beta T",
    ),
]  # fmt: skip

ROWS = [*ESTIMATES, *DISTILLATION, *WHOLE]
